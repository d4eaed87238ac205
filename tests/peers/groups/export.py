"""What an export costs: time and peak memory of a fresh process, ours and that of each format's own tool."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import bootstrap_interval, ratio_interval
from edgestill.errors import EdgestillError

from ..context import Context, busy_note
from ..environments import LLAMA_CPP_CONVERTER
from ..models import Kind
from ..processes import PROGRAMS, Launch, launch_measured
from ..registry import Taken, Unavailable, figure

VARIANTS = (
    "onnx:fp32", "onnx:fp16", "onnx:int8", "onnx:int4", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:q4_0",
    "coreml:fp16", "coreml:int8",
)  # fmt: skip
# Where a format's own tool makes the same artifact from the same folder.
AGAINST = ("onnx:fp32", "gguf:f16", "gguf:q8_0")
PEER = "torch.onnx.export(dynamo=True); convert_hf_to_gguf.py of llama.cpp"

Quantity = Literal["seconds", "peak_bytes"]

__all__ = ["artifacts", "beside", "ratio"]


@figure("export_seconds", group="export", title="time of an export", unit="s", variants=VARIANTS, peer="none")
def export_seconds(context: Context, variant: str) -> Taken:
    ours, busy = _ours(context, variant)
    return _absolute(context, [one.seconds for one in ours], "wall time of a fresh process, imports included", busy)


@figure(
    "export_peak_memory_bytes", group="export", title="peak memory of an export", unit="bytes", variants=VARIANTS,
    peer="none",
)  # fmt: skip
def export_peak_memory_bytes(context: Context, variant: str) -> Taken:
    ours, _ = _ours(context, variant)
    peaks = [float(one.peak_bytes or 0) for one in ours]
    size = context.model("encoder").size_bytes
    imports = context.once("imports", lambda: _run(context, "import_ours.py").peak_bytes or 0)
    beyond = (float(np.median(peaks)) - imports) / size
    return _absolute(
        context, peaks, f"peak resident set of a fresh process; beyond its light imports {beyond:.2f} x the weights", ""
    )


@figure(
    "export_seconds_ratio", group="export", title="time of an export over the format's own tool", unit="ratio",
    limit=1.0, variants=AGAINST, peer=PEER, environment=LLAMA_CPP_CONVERTER,
)  # fmt: skip
def export_seconds_ratio(context: Context, variant: str) -> Taken:
    return ratio(context, variant, "seconds")


@figure(
    "export_peak_memory_ratio", group="export", title="peak memory of an export over the format's own tool",
    unit="ratio", limit=1.0, variants=AGAINST, peer=PEER, environment=LLAMA_CPP_CONVERTER,
)  # fmt: skip
def export_peak_memory_ratio(context: Context, variant: str) -> Taken:
    return ratio(context, variant, "peak_bytes")


def _absolute(context: Context, samples: list[float], what: str, busy: str) -> Taken:
    how = f"{what}; median of {len(samples)} launches, {context.model_note('encoder')}"
    interval = bootstrap_interval(samples, "median") if len(samples) > 1 else None
    return Taken(float(np.median(samples)), f"{how}; {busy}" if busy else how, interval, void=context.void)


def _ours(context: Context, to: str) -> tuple[list[Launch], str]:
    """Fresh processes of our export: those that stood beside a peer, where there is one."""
    if to in AGAINST:
        try:
            (ours, _), busy = beside(context, to)
        except Unavailable:
            pass  # ours can be measured without it
        else:
            return ours, busy
    model = context.model("encoder")

    def take() -> tuple[list[Launch], str]:
        with LoadProbe() as probe:
            launches = [_export(context, model.path, to) for _ in range(context.repeats)]
        return launches, busy_note(probe)

    return context.once(("export", to), take)


def ratio(context: Context, to: str, quantity: Quantity, kind: Kind = "encoder") -> Taken:
    """The median of ours over that of the format's own tool."""
    (ours, theirs), busy = beside(context, to, kind)
    left, right = ([[float(getattr(one, quantity))] for one in side] for side in (ours, theirs))
    found = ratio_interval(left, right)
    how = (
        f"ratio of medians over {_peer_name(to)}, {len(left)} fresh processes of each, interleaved, imports included, "
        f"{context.model_note(kind)}"
    )
    interval = (found.low, found.high) if len(left) > 1 else None
    return Taken(found.value, f"{how}; {busy}" if busy and quantity == "seconds" else how, interval, void=context.void)


def beside(context: Context, to: str, kind: Kind = "encoder") -> tuple[tuple[list[Launch], list[Launch]], str]:
    """Ours and the peer's launches in turns (ours first, then the peer first …), and whether others used the machine.

    The last artifacts stay in the scratch folder as :func:`artifacts` says.
    """
    model = context.model(kind)

    def take() -> tuple[tuple[list[Launch], list[Launch]], str]:
        peer = _peer(context, to, kind)
        sides: tuple[list[Launch], list[Launch]] = ([], [])
        runs: tuple[Callable[[], Launch], Callable[[], Launch]] = (lambda: _export(context, model.path, to), peer)
        with LoadProbe() as probe:
            for index in range(context.repeats):
                for side in (0, 1) if index % 2 == 0 else (1, 0):
                    sides[side].append(runs[side]())
        return sides, busy_note(probe)

    return context.once(("beside", to, kind), take)


def artifacts(context: Context) -> tuple[Path, Path]:
    """Where our artifact folder and the peer's file of the last :func:`beside` lie."""
    return context.scratch / "ours", context.scratch / "theirs.bin"


def _export(context: Context, model: Path, to: str) -> Launch:
    context.progress(f"exporting {to}")
    return _run(context, "export_ours.py", model, artifacts(context)[0], to)


def _peer_name(to: str) -> str:
    return "torch.onnx.export(dynamo=True)" if to.startswith("onnx") else "llama.cpp's convert_hf_to_gguf.py"


def _peer(context: Context, to: str, kind: Kind) -> Callable[[], Launch]:
    """One run of the format's own tool, tried once before anything is timed."""
    model = context.model(kind).path
    target = artifacts(context)[1]
    if to.startswith("onnx"):

        def run() -> Launch:
            context.progress("torch.onnx.export")
            return _run(context, "export_torch.py", model, target.with_suffix(".onnx"))

    else:
        prepared = context.environment(LLAMA_CPP_CONVERTER)
        script = prepared.source / "vendor/llama.cpp/convert_hf_to_gguf.py"
        arguments: list[str | Path] = [
            _for_older_transformers(model, context.scratch / "plain"),
            "--outfile",
            target,
            "--outtype",
            to.partition(":")[2],
        ]

        def run() -> Launch:
            context.progress("convert_hf_to_gguf.py")
            return launch_measured(
                prepared.python, script, arguments, threads=context.threads, cwd=context.scratch
            )  # fmt: skip

    try:
        run()  # warms the page cache and compiles the peer's modules, too
    except EdgestillError as error:
        raise Unavailable(f"{_peer_name(to)} refuses this model: {error.message}") from error
    return run


def _for_older_transformers(model: Path, folder: Path) -> Path:
    """The same model in ``folder``, with a tokenizer class that the Transformers which the converter pins knows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    described = json.loads((model / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(described | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def _run(context: Context, program: str, *arguments: str | Path) -> Launch:
    """A program of ours in the locked environment."""
    return launch_measured(
        Path(sys.executable), PROGRAMS / program, arguments, threads=context.threads, cwd=context.scratch
    )  # fmt: skip
