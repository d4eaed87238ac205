"""How long a decoder takes to become an ONNX file: our writer beside ``torch.onnx.export``."""

from __future__ import annotations

import sys
from pathlib import Path

from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import ratio_interval
from edgestill.errors import EdgestillError

from ..context import Context, busy_note
from ..processes import PROGRAMS, Launch, launch_measured
from ..registry import Taken, Unavailable, figure

_TO = "onnx:int4"


@figure(
    "onnx_export_time", group="export", title="time of a decoder's export to ONNX over torch.onnx.export's",
    unit="ratio", limit=0.25, peer="torch.onnx.export(dynamo=True)", slow="two minutes for each export of the peer",
)  # fmt: skip
def onnx_export_time(context: Context, variant: str) -> Taken:
    model = context.model("decoder").path
    theirs: list[Launch] = []
    ours: list[Launch] = []

    def one(program: str, *arguments: str | Path) -> Launch:
        context.progress(program)
        return launch_measured(
            Path(sys.executable), PROGRAMS / program, [model, *arguments], threads=context.threads, cwd=context.scratch
        )

    def peer() -> Launch:
        try:
            return one("export_torch_decoder.py", context.scratch / "theirs.onnx")
        except EdgestillError as error:
            raise Unavailable(f"torch.onnx.export refuses this model: {error.message}") from error

    try:
        with LoadProbe() as probe:
            for index in range(context.repeats):
                if index % 2:
                    theirs.append(peer())
                ours.append(one("export_ours.py", context.scratch / "ours", _TO))
                if not index % 2:
                    theirs.append(peer())
    finally:
        for path in context.scratch.glob("theirs.onnx*"):
            path.unlink()
    found = ratio_interval([[launch.seconds] for launch in ours], [[launch.seconds] for launch in theirs])
    busy = busy_note(probe)
    how = (
        f"ratio of medians, {_TO} over torch.onnx.export(dynamo=True) with its cache, {len(ours)} fresh processes of "
        f"each, in turns, imports included, {context.model_note('decoder')}"
    )
    interval = (found.low, found.high) if len(ours) > 1 else None
    return Taken(found.value, f"{how}; {busy}" if busy else how, interval, void=context.void)
