"""How fast the command line answers: the one absolute promise of the house."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import bootstrap_interval, ratio_interval

from ..context import Context, busy_note
from ..processes import Launch, launch
from ..registry import Taken, Unavailable, figure

_LAUNCHES_A_REPEAT = 4  # ABBA gives each side two at a time; a launch takes tenths of a second
_LIMIT_SECONDS = 0.3

Sides = tuple[list[Launch], list[Launch]]


@figure(
    "cli_startup", group="cli", title="`edgestill --help`, median", unit="s", limit=_LIMIT_SECONDS,
    peer="none: an absolute promise",
)  # fmt: skip
def cli_startup(context: Context, variant: str) -> Taken:
    (ours, _), busy = _launches(context)
    seconds = np.array([one.seconds for one in ours])
    processor = float(np.median([one.cpu_seconds for one in ours]))
    how = f"wall time, median of {len(seconds)} launches after one to warm the page cache; {processor:.3g} s of CPU"
    return Taken(float(np.median(seconds)), how, bootstrap_interval(seconds, "median"), busy)


@figure(
    "cli_startup_ratio", group="cli", title="the same over `python -c pass`", unit="ratio",
    peer="the bare interpreter",
)  # fmt: skip
def cli_startup_ratio(context: Context, variant: str) -> Taken:
    (ours, bare), busy = _launches(context)
    found = ratio_interval([[one.seconds] for one in ours], [[one.seconds] for one in bare])
    how = f"ratio of medians, {len(ours)} launches of each, interleaved ABBA"
    return Taken(found.value, f"{how}; {busy}" if busy else how, (found.low, found.high))


def _launches(context: Context) -> tuple[Sides, str]:
    """Launches of `edgestill --help` and of `python -c pass`, interleaved, and whether the machine was busy."""
    command = Path(sys.executable).with_name("edgestill")
    if not command.exists():
        raise Unavailable(f"there is no {command.name} beside {Path(sys.executable).name}: install the package")
    subjects: tuple[list[str], list[str]] = ([str(command), "--help"], [sys.executable, "-c", "pass"])

    def take() -> tuple[Sides, str]:
        context.progress("starting the command line")
        for subject in subjects:
            launch(subject)
        sides: Sides = ([], [])
        with LoadProbe() as probe:
            for _ in range(context.repeats * _LAUNCHES_A_REPEAT // 2):
                for side in (0, 1, 1, 0):
                    sides[side].append(launch(subjects[side]))
        return sides, busy_note(probe)

    return context.once("cli", take)
