"""Whether our sessions cost speed: an artifact in our worker against the same file in the plain runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgestill.artifact import Artifact
from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import ratio_interval
from edgestill.errors import EdgestillError
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

from ..context import Context, busy_note
from ..models import Kind
from ..processes import PlainRuntime
from ..registry import Taken, figure

VARIANTS = (
    "onnx:fp32", "onnx:fp16", "onnx:int8", "onnx:int4", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:q4_0",
)  # fmt: skip
PLAIN = {"onnx": ("plain_onnxruntime", "onnxruntime"), "gguf": ("plain_llamacpp", "llama_cpp.Llama")}
PEER = "onnxruntime and llama_cpp.Llama called directly"

PROMPT_TOKENS, NEW_TOKENS = 16, 16
ENCODE_TOKENS, ENCODE_CALLS = 128, 6
BLOCKS = 3  # ABBA each, in every pair of processes
_WARM_UP = 2

Turn = Callable[[], Sequence[float]]
Turns = Callable[[LocalWorker, PlainRuntime, int], tuple[Turn, Turn]]


@figure(
    "decode_speed_ratio", group="decode", title="decode speed, our session over the plain runtime", unit="ratio",
    limit=0.95, sense="at_least", variants=VARIANTS, peer=PEER,
)  # fmt: skip
def decode_speed_ratio(context: Context, variant: str) -> Taken:
    what = f"median time a token, {NEW_TOKENS} new tokens after {PROMPT_TOKENS}"
    return _compare(context, variant, "decoder", what, _decode_turns)


@figure(
    "encode_speed_ratio", group="encode", title="encoder speed, our session over the plain runtime", unit="ratio",
    limit=0.95, sense="at_least", variants=VARIANTS, peer=PEER,
)  # fmt: skip
def encode_speed_ratio(context: Context, variant: str) -> Taken:
    what = f"median time of a forward pass, batch 1 x {ENCODE_TOKENS} tokens"
    return _compare(context, variant, "encoder", what, _encode_turns)


def _compare(
    context: Context,
    to: str,
    kind: Kind,
    what: str,
    turns: Turns,
) -> Taken:
    """Plain seconds over ours: above 1, ours is faster. Each pair of processes is a launch of the statistics."""
    ours: list[list[float]] = []
    plain: list[list[float]] = []
    program, name = PLAIN[to.partition(":")[0]]
    with context.artifact(kind, to) as artifact, LoadProbe() as probe:
        for pair in range(context.repeats):
            context.progress(f"{to}: pair {pair + 1} of {context.repeats}")
            sides, version = _pair(context, artifact, program, turns, ours_first=pair % 2 == 0)
            ours.append(sides[0])
            plain.append(sides[1])
    found = ratio_interval(plain, ours)
    how = (
        f"{what}; {name} {version} on the same file over our worker; {context.repeats} pairs of processes, "
        f"{len(ours[0])} samples of each side in each, interleaved ABBA, {context.threads} threads, "
        f"{context.model_note(kind)}"
    )
    busy = busy_note(probe)
    return Taken(found.value, f"{how}; {busy}" if busy else how, (found.low, found.high), void=context.void)


def _pair(
    context: Context,
    artifact: Artifact,
    program: str,
    turns: Turns,
    *,
    ours_first: bool,
) -> tuple[tuple[list[float], list[float]], str]:
    """Samples of both sides from two processes that stand next to each other and work in turns."""
    samples: tuple[list[float], list[float]] = ([], [])
    options = SessionOptions(threads=context.threads)
    with (
        PlainRuntime(program, artifact.entry, context.threads, artifact.manifest.task) as plain,
        LocalWorker(artifact.path, options) as ours,
    ):
        sides = turns(ours, plain, artifact.manifest.vocab_size)
        for _ in range(_WARM_UP):
            for side in sides:
                side()
        for block in range(BLOCKS):
            order = (0, 1, 1, 0) if ours_first == (block % 2 == 0) else (1, 0, 0, 1)
            for index in order:
                samples[index].extend(sides[index]())
    return samples, plain.version


def _decode_turns(ours: LocalWorker, plain: PlainRuntime, vocab_size: int) -> tuple[Turn, Turn]:
    """A generation a turn. Both must write the same tokens, else they don't do the same work."""
    prompt = np.random.default_rng(0).integers(3, vocab_size, PROMPT_TOKENS).tolist()
    request = {"prompt": prompt, "count": NEW_TOKENS}
    theirs = plain.ask(request)["ids"]
    own = [token.id for token in ours.decode(prompt, NEW_TOKENS)]
    if own != theirs:
        at = next(i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b)
        raise EdgestillError(f"the plain runtime decodes other tokens on the same file, from token {at} on")

    def our_turn() -> Sequence[float]:
        [run] = ours.time_decode(prompt, NEW_TOKENS, repeats=1, warmup=0)
        return [float(seconds) for seconds in run["tokens_s"]]

    return our_turn, lambda: list(plain.ask(request)["seconds"])


def _encode_turns(ours: LocalWorker, plain: PlainRuntime, vocab_size: int) -> tuple[Turn, Turn]:
    """A few forward passes a turn, without the first: it pays for what the other side (and, in our worker, the garbage
    collection before a timing) left in the processor's caches, a cost of taking turns and not of the session. In
    decoding the first token, which is not counted either, takes that part. Both must give the same embedding."""
    ids = np.random.default_rng(0).integers(5, vocab_size, (1, ENCODE_TOKENS))
    request = {"ids": ids[0].tolist(), "calls": ENCODE_CALLS}
    theirs = np.array(plain.ask(request)["vector"])
    own = ours.forward(ids, np.ones_like(ids))[0]
    cosine = float(own @ theirs / (np.linalg.norm(own) * np.linalg.norm(theirs)))
    if not cosine > 0.99999:
        raise EdgestillError(f"the plain runtime gives another embedding on the same file: cosine {cosine:.6f}")

    def our_turn() -> Sequence[float]:
        return ours.time_forward(ids, np.ones_like(ids), repeats=ENCODE_CALLS, warmup=0)[1:]

    return our_turn, lambda: list(plain.ask(request)["seconds"][1:])
