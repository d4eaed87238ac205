"""Our KL and perplexity against llama-perplexity's on the same GGUF, text and context; f16 against itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.artifact import Artifact
from edgestill.data import load_data
from edgestill.errors import EdgestillError
from edgestill.recipe import DataConfig, load_recipe
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

from ..context import Context
from ..llama_perplexity import Base, parse_output, read_base, scored, store
from ..llamacpp_tools import LLAMA_CPP_TOOLS, llama_tools
from ..processes import surroundings
from ..quality import held_out_data
from ..registry import Taken, Unavailable, figure

VARIANTS = ("gguf:q8_0", "gguf:q4_k_m")
PEER = "llama-perplexity --kl-divergence, linked to the engine of our bindings"
_WINDOW, _WINDOWS = 256, 8
_PHYSICAL = 64  # tokens that our session computes together: then both sides do the same sums in the same order

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ours:
    """What our worker says about a base file's windows, over the positions that the tool scores: an entry a token."""

    kl: Doubles
    logprob: Doubles
    reference_logprob: Doubles

    def words(self) -> str:
        return f"KL {self.kl.mean():.6f}, PPL(Q) {np.exp(-self.logprob.mean()):.4f}"


@figure(
    "kl_peer", group="measure", title="KL, Δp and perplexity, our worker's with the 16-bit store over the tool's",
    unit="last digits", limit=1.0, variants=VARIANTS, peer=PEER, environment=LLAMA_CPP_TOOLS,
)  # fmt: skip
def kl_peer(context: Context, variant: str) -> Taken:
    """The largest difference among the statistics that the tool prints, in units of the last digit that it prints."""
    base, f16 = _base(context)
    with context.artifact("decoder", variant) as artifact:
        printed = parse_output(_run_tool(context, artifact.entry, base.path, kl=True))
        with LocalWorker(artifact.path, SessionOptions(threads=context.threads)) as worker:
            context.progress(f"{variant}: the same in our worker")
            imitated = scored(base, _logits(worker, f16, base)).printed()
            exact = _score(context, worker, base, f16)
    shared = [name for name in imitated if name in printed]
    if len(shared) != len(imitated):
        raise EdgestillError(f"llama-perplexity did not print {sorted(set(imitated) - set(shared))}")
    off = {name: abs(imitated[name] - printed[name][0]) / printed[name][1] for name in shared}
    worst = max(off, key=off.__getitem__)
    how = (
        f"{len(off)} statistics, worst {worst}: ours {imitated[worst]:.7g}, theirs {printed[worst][0]:.7g}; "
        f"without the store ours are {exact.words()}, theirs KL {printed['Mean KLD'][0]:.6f}, "
        f"PPL(Q) {printed['Mean PPL(Q)'][0]:.4f}; {_same_codes(context, base, f16)}; {_note(context, base)}"
    )
    return Taken(off[worst], how)


@figure(
    "kl_self", group="measure", title="KL of f16 against itself, in our worker", unit="nats/token", limit=0.0,
    peer=PEER, environment=LLAMA_CPP_TOOLS,
)  # fmt: skip
def kl_self(context: Context, variant: str) -> Taken:
    base, f16 = _base(context)
    printed = parse_output(_run_tool(context, f16.entry, base.path, kl=True))
    with LocalWorker(f16.path, SessionOptions(threads=context.threads)) as worker:
        ours = _score(context, worker, base, f16)
    theirs = printed["Mean KLD"][0], printed["Maximum KLD"][0]
    return Taken(
        float(np.abs(ours.kl).max()),
        f"largest of {len(ours.kl)} tokens; llama-perplexity says {theirs[0]:.6f} on average and {theirs[1]:.6f} at "
        f"most; {_note(context, base)}",
    )


def _base(context: Context) -> tuple[Base, Artifact]:
    """The tool's base file of the f16 artifact, and the artifact, made once and kept while the figures are taken."""

    def take() -> tuple[Base, Artifact]:
        from edgestill.export import export
        from edgestill.recipe import ExportConfig

        context.once("llama-tools", lambda: llama_tools(context.progress))
        context.progress("exporting gguf:f16")
        f16 = export(context.model("decoder").path, context.scratch / "kl-f16", ExportConfig(to="gguf:f16"))
        path = context.scratch / "base.kld"
        _run_tool(context, f16.entry, path, kl=False)
        base = read_base(path)
        if len(base.tokens) < _WINDOWS:
            raise Unavailable(f"the text has {len(base.tokens)} windows of {_window(context)} tokens")
        return base, f16

    return context.once("kl-base", take)


def _run_tool(context: Context, model: Path, base: Path, *, kl: bool) -> str:
    """One run of the tool: it writes ``base``, or (``kl``) compares with it. What it said."""
    tools = context.once("llama-tools", lambda: llama_tools(context.progress))
    window = _window(context)
    command = [
        str(tools.perplexity), "-m", str(model), "-f", str(_text(context)), "-c", str(window), "-b", str(window), "-ub",
        str(_PHYSICAL), "--chunks", str(_WINDOWS), "-t", str(context.threads), "--no-warmup", "--kl-divergence-base",
        str(base), *(["--kl-divergence"] if kl else []),
    ]  # fmt: skip
    context.progress(f"llama-perplexity {model.parent.name}")
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env=surroundings(context.threads),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode or not base.is_file() or (kl and "Same top p" not in parse_output(said)):
        lines = [line for line in said.splitlines() if line.strip()]
        raise EdgestillError(f"llama-perplexity ended with status {done.returncode}: {(lines or ['no word'])[-1]}")
    return said


def _window(context: Context) -> int:
    return _WINDOW if not context.tiny else 64  # tiny models take 128 tokens


def _text(context: Context) -> Path:
    """A file with text for all windows."""
    path = context.scratch / "kl-text.txt"

    def take() -> Path:
        if context.tiny:
            few = held_out_data(context, "smollm2-half").split("test")
            texts: Sequence[str] = few * (1 + 8 * _WINDOWS * _window(context) // len("".join(few)))
        else:
            one = next(text for text in load_recipe("smollm2").data.text if text.test)
            try:
                texts = load_data(DataConfig(text=(one,)), base=Path.cwd(), progress=context.progress).split("test")
            except EdgestillError as error:
                raise Unavailable(str(error)) from error
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        return path

    return context.once("kl-text", take)


def _fed(f16: Artifact, base: Base) -> Iterator[npt.NDArray[np.int64]]:
    """The windows as the tool feeds them, ``[1, length]`` each: BOS in place of the first token where the model wants
    one."""
    with GgufFile(f16.entry) as file:
        bos = file.metadata.get("tokenizer.ggml.bos_token_id")
        wanted = file.metadata.get("tokenizer.ggml.add_bos_token")
    for window in base.tokens:
        ids = window.astype(np.int64)[None]
        if wanted:
            ids[0, 0] = bos
        yield ids


def _logits(worker: LocalWorker, f16: Artifact, base: Base) -> Iterator[Sequence[Floats]]:
    """Our logits at the positions that the tool scores, a window at a time (0.1 GB of them at most)."""
    for ids in _fed(f16, base):
        yield worker.forward(ids, np.ones_like(ids))[0, base.first : -1]


def _references(context: Context, base: Base, f16: Artifact) -> list[Path]:
    """What f16 says in our worker: a reference folder a window, made once (0.4 GB of logits together)."""

    def take() -> list[Path]:
        folders = []
        context.progress("f16 in our worker")
        with LocalWorker(f16.path, SessionOptions(threads=context.threads)) as worker:
            for index, ids in enumerate(_fed(f16, base)):
                folder = context.scratch / f"kl-reference-{index}"
                folder.mkdir()
                np.save(folder / "ids.npy", ids)
                np.save(folder / "mask.npy", np.ones_like(ids))
                np.save(folder / "logits.npy", worker.forward(ids, np.ones_like(ids)))
                (folder / "reference.json").write_text(json.dumps({"task": "text-generation"}))
                folders.append(folder)
        return folders

    return context.once("kl-references", take)


def _score(context: Context, worker: LocalWorker, base: Base, f16: Artifact) -> Ours:
    """Our own way: the worker's ``score`` against what f16 says."""
    parts: dict[str, list[Doubles]] = {"kl": [], "logprob": [], "reference_logprob": []}
    for folder in _references(context, base, f16):
        scores: dict[str, Any] = worker.score(folder)
        for name, values in parts.items():
            values.append(scores[name][base.first :])
    return Ours(**{name: np.concatenate(values) for name, values in parts.items()})


def _same_codes(context: Context, base: Base, f16: Artifact) -> str:
    """How many of the 16-bit codes in the tool's file we would have written."""

    def take() -> str:
        equal = total = 0
        for index, folder in enumerate(_references(context, base, f16)):
            logits = np.load(folder / "logits.npy", mmap_mode="r")[0, base.first : -1]
            for theirs, values in zip(base.rows(index), logits, strict=True):
                mine = store(np.asarray(values))
                equal += int((mine.codes == theirs.codes).sum()) * (mine.scale == theirs.scale)
                total += len(values)
        return f"{equal:,} of {total:,} codes of the store equal"

    return context.once("kl-codes", take)


def _note(context: Context, base: Base) -> str:
    windows, length = base.tokens.shape
    engine = context.once("llama-tools", lambda: llama_tools(context.progress)).engine
    return f"{windows} windows of {length} tokens, {context.model_note('decoder')}, {engine}"
