"""Our ONNX decoders beside the graphs of onnxruntime-genai's model builder: speed, loss and size.

Both run in plain onnxruntime through one loop (``programs/plain_onnxruntime.py``), which knows nothing of either.
Sizes: of ours every file of the artifact, tokenizer and manifest too; of theirs the model's files alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgestill.bench.environment import LoadProbe
from edgestill.bench.reference import make_reference
from edgestill.bench.statistics import bootstrap_interval, ratio_interval
from edgestill.errors import EdgestillError
from edgestill.export import export
from edgestill.recipe import ExportConfig

from ..context import Context, busy_note
from ..environments import ONNXRUNTIME_GENAI
from ..processes import Conversation, PlainRuntime, launch
from ..quality import held_out_data
from ..registry import Taken, Unavailable, figure

FP32, INT4 = "onnx:fp32", "onnx:int4-pure-gptq"
# Compensated codes lose less in the same bytes and the same time a token: 0.0043 nats instead of 0.0058, on 2,399
# tokens with the first 80 % of the matrices compensated. Most of what is left comes from activations in int8 blocks.
INT8 = "onnx:int8-b32-gptq"
INT4_BYTES, INT8_BYTES = 86e6, 150e6
PEER = "onnxruntime-genai 0.18's model builder"
RECIPE = "smollm2-export"
TOKENS = 2500  # predicted, for a divergence
PROMPT_TOKENS, NEW_TOKENS = 16, 16
BLOCKS = 3  # ABBA each, in every pair of processes
_WARM_UP = 2
_SLOW = "minutes: exports of SmolLM2, a graph of the builder, "

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Graph:
    """A graph that onnxruntime opens, and the bytes that count for it."""

    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Loss:
    """KL divergence (nats) to the float model of each predicted token, its window of text, and equal first choices."""

    kl: Floats
    window: npt.NDArray[np.int64]
    top1: float


@figure(
    "onnx_fp32_decode", group="export", title="decode speed of our fp32 graph over the builder's", unit="ratio",
    limit=1.0, sense="at_least", peer=PEER, environment=ONNXRUNTIME_GENAI, slow=f"{_SLOW}decoding",
)  # fmt: skip
def onnx_fp32_decode(context: Context, variant: str) -> Taken:
    return _decode(context, FP32, "fp32")


@figure(
    "onnx_int4_decode", group="export", title="decode speed of our int4 graph (<= 86 MB) over the builder's",
    unit="ratio", limit=1.0, sense="at_least", peer=PEER, environment=ONNXRUNTIME_GENAI,
    slow=f"{_SLOW}error compensation, decoding",
)  # fmt: skip
def onnx_int4_decode(context: Context, variant: str) -> Taken:
    return _decode(context, INT4, "int4", most=INT4_BYTES)


@figure(
    "onnx_int4_kl", group="export", title="KL to the float model of our int4 (<= 86 MB) over the builder's int4",
    unit="ratio", limit=0.5, peer=PEER, environment=ONNXRUNTIME_GENAI,
    slow=f"{_SLOW}error compensation, {TOKENS:,} tokens",
)  # fmt: skip
def onnx_int4_kl(context: Context, variant: str) -> Taken:
    ours, theirs = _loss(context, INT4, _ours(context, INT4, INT4_BYTES)), _builders_loss(context, "int4")
    both = np.stack([ours.kl, theirs.kl], axis=1)
    interval = bootstrap_interval(
        both, lambda drawn: drawn[..., 0].mean(axis=1) / drawn[..., 1].mean(axis=1), groups=ours.window
    )
    how = (
        f"{INT4}: {_said(ours, _ours(context, INT4))}; the builder's int4: "
        f"{_said(theirs, _theirs(context, 'int4'))}; {_sizes()}; {_text(context, ours)}"
    )
    return Taken(float(ours.kl.mean() / theirs.kl.mean()), how, interval, void=_void(context))


@figure(
    "onnx_int8_kl", group="export", title="KL to the float model of our int8 (<= 150 MB)", unit="nats", limit=0.005,
    peer=PEER, environment=ONNXRUNTIME_GENAI, slow=f"{_SLOW}error compensation, {TOKENS:,} tokens",
)  # fmt: skip
def onnx_int8_kl(context: Context, variant: str) -> Taken:
    graph = _ours(context, INT8, INT8_BYTES)
    ours = _loss(context, INT8, graph)
    try:
        beside = f"the builder's int8: {_said(_builders_loss(context, 'int8'), _theirs(context, 'int8'))}; {_sizes()}"
    except Unavailable as reason:
        beside = f"the builder's int8 is not at hand ({reason})"  # ours is judged without it
    interval = bootstrap_interval(ours.kl, "mean", groups=ours.window)
    how = f"{INT8}: {_said(ours, graph)}; {beside}; {_text(context, ours)}"
    return Taken(float(ours.kl.mean()), how, interval, void=_void(context))


@figure(
    "onnx_int8_bytes", group="export", title="size of our int8", unit="bytes", limit=INT8_BYTES, peer="none",
    slow=f"minutes: an export of SmolLM2 to {INT8}",
)  # fmt: skip
def onnx_int8_bytes(context: Context, variant: str) -> Taken:
    how = f"every file of {INT8}, tokenizer and manifest included, {context.model_note('decoder')}"
    return Taken(_ours(context, INT8).size_bytes, how, void=_void(context))


def _decode(context: Context, to: str, precision: str, most: float | None = None) -> Taken:
    """Their seconds over ours: above 1, ours is faster. Each pair of processes is a launch of the statistics."""
    graphs = (_ours(context, to, most), _theirs(context, precision))
    samples: tuple[list[list[float]], list[list[float]]] = ([], [])
    with LoadProbe() as probe:
        for pair in range(context.repeats):
            context.progress(f"{to}: pair {pair + 1} of {context.repeats}")
            taken, version = _pair(context, graphs, ours_first=pair % 2 == 0, same=to == FP32)
            for side, seconds in zip(samples, taken, strict=True):
                side.append(seconds)
    ours, theirs = samples
    found = ratio_interval(theirs, ours)
    how = (
        f"median time a token, {NEW_TOKENS} new tokens after {PROMPT_TOKENS}; {to} ({graphs[0].size_bytes / 1e6:.1f} "
        f"MB) over the builder's {precision} ({graphs[1].size_bytes / 1e6:.1f} MB; {_sizes()}), both in onnxruntime "
        f"{version} by one loop; {context.repeats} pairs of processes, {len(ours[0])} samples of each side in each, "
        f"interleaved ABBA, {context.threads} threads, {context.model_note('decoder')}"
    )
    busy = busy_note(probe)
    return Taken(
        found.value, f"{how}; {busy}" if busy else how, (found.low, found.high), doubt=busy, void=context.void
    )  # fmt: skip


def _pair(
    context: Context, graphs: tuple[Graph, Graph], *, ours_first: bool, same: bool
) -> tuple[tuple[list[float], list[float]], str]:
    """Samples of both sides from two processes that stand next to each other and work in turns; ``same``: they hold
    the same weights, so that they must write the same tokens, else they don't do the same work."""
    samples: tuple[list[float], list[float]] = ([], [])
    vocab_size, head = context.model("decoder").vocab_size, _head_dim(context)
    prompt = np.random.default_rng(0).integers(3, vocab_size, PROMPT_TOKENS).tolist()
    request: Mapping[str, object] = {"prompt": prompt, "count": NEW_TOKENS, "head_dim": head}
    with (
        PlainRuntime("plain_onnxruntime", graphs[0].path, context.threads, "text-generation") as ours,
        PlainRuntime("plain_onnxruntime", graphs[1].path, context.threads, "text-generation") as theirs,
    ):
        sides = (ours, theirs)
        first = [side.ask(request)["ids"] for side in sides]
        if same and first[0] != first[1]:
            raise EdgestillError("the builder's graph of the same weights decodes other tokens than ours")
        for _ in range(_WARM_UP - 1):
            for side in sides:
                side.ask(request)
        for block in range(BLOCKS):
            order = (0, 1, 1, 0) if ours_first == (block % 2 == 0) else (1, 0, 0, 1)
            for index in order:
                samples[index].extend(sides[index].ask(request)["seconds"])
        return samples, ours.version


# ---- graphs and what they lose -------------------------------------------------------------------------------------


def _ours(context: Context, to: str, most: float | None = None) -> Graph:
    """Our artifact, made once; of more than ``most`` bytes it is not what the figure is about."""

    def take() -> Graph:
        context.progress(f"exporting {to}")
        out = context.scratch / f"onnx-{to.partition(':')[2]}"
        data = held_out_data(context, RECIPE)
        texts = data.split("train")[:16] if context.tiny else data.split("calibration")
        artifact = export(context.model("decoder").path, out, ExportConfig(to=to), calibration=texts)
        return Graph(artifact.entry, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))

    graph = context.once(("onnx, ours", to), take)
    if most is not None and graph.size_bytes > most:
        raise EdgestillError(f"{to} takes {graph.size_bytes / 1e6:.1f} MB, which are more than {most / 1e6:.0f} MB")
    return graph


def _theirs(context: Context, precision: str) -> Graph:
    """What the builder makes of the same folder."""

    def take() -> Graph:
        prepared = context.environment(ONNXRUNTIME_GENAI)
        context.progress(f"the model builder: {precision}")
        out = context.scratch / f"builder-{precision}"
        model = context.model("decoder").path
        try:
            launch(
                [prepared.python, "-P", "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out,
                 "-p", precision, "-e", "cpu", "-c", context.scratch / "builder-cache"],
                threads=context.threads, cwd=context.scratch,
            )  # fmt: skip
        except EdgestillError as error:
            raise Unavailable(f"{PEER} refuses this model: {error.message}") from error
        return Graph(out / "model.onnx", sum(file.stat().st_size for file in out.glob("model.onnx*")))

    return context.once(("onnx, theirs", precision), take)


def _builders_loss(context: Context, precision: str) -> Loss:
    return _loss(context, f"the builder's {precision}", _theirs(context, precision))


def _loss(context: Context, what: str, graph: Graph) -> Loss:
    def take() -> Loss:
        reference = _reference(context)
        context.progress(f"what {what} loses")
        arguments: list[str | Path] = [graph.path, str(context.threads), reference, str(_head_dim(context))]
        with Conversation(Path(sys.executable), "kl_onnxruntime", arguments, context.threads) as talk:
            found = talk.ask({})
        return Loss(np.array(found["kl"]), np.array(found["window"]), found["top1"])

    return context.once(("onnx loss", graph.path), take)


def _reference(context: Context) -> Path:
    def take() -> Path:
        context.progress("what the float model says")
        texts = held_out_data(context, RECIPE).split("test")
        return make_reference(
            context.model("decoder").path, context.scratch / "onnx-reference", texts=texts,
            limit=150 if context.tiny else TOKENS, threads=context.threads,
        )  # fmt: skip

    return context.once("onnx reference", take)


def _head_dim(context: Context) -> int:
    config = json.loads((context.model("decoder").path / "config.json").read_text())
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _said(loss: Loss, graph: Graph) -> str:
    return f"{loss.kl.mean():.5f} nats, top-1 equal on {loss.top1:.1%}, {graph.size_bytes / 1e6:.1f} MB"


def _sizes() -> str:
    return "sizes: of ours every file, of theirs the model's alone"


def _text(context: Context, loss: Loss) -> str:
    return (
        f"{len(loss.kl):,} predicted tokens of {len(set(loss.window.tolist()))} windows of held-out text, float64, "
        f"against torch in fp32, {context.model_note('decoder')}"
    )


def _void(context: Context) -> str:
    return "a tiny model" if context.tiny else ""
