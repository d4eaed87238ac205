"""Which process is launched when: interleaved, seeded, so that drift of the machine hits every subject alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Launch", "plan_launches"]

Kind = Literal["speed", "cold", "memory", "depth", "sustained"]


@dataclass(frozen=True)
class Launch:
    """One fresh process: ``kind`` says what is taken in it, ``round`` counts the launches of a subject from 0.

    ``control`` marks the second half of the A/A pair: the same subject again, measured as if it were another one.
    """

    subject: str
    round: int
    kind: Kind
    control: bool = False


def plan_launches(
    subjects: Sequence[str],
    launches: int,
    *,
    control: str | None = None,
    kinds: Sequence[Kind] = ("speed", "cold", "memory"),
    seed: int = 0,
) -> list[Launch]:
    """The order of all launches.

    Speed first, in rounds: every subject once a round (and ``control`` once more), each even round in a fresh seeded
    order and the odd one after it backwards (A B C, C B A), so that a linear drift cancels. Cold loads, memory
    and long runs come after, one launch a subject, since they would disturb the timings beside them.
    """
    chooser = random.Random(seed)
    entries = [(name, False) for name in subjects]
    if control is not None:
        if control not in subjects:
            raise ValueError(f"the control {control!r} is not among the subjects {', '.join(subjects)}")
        entries.append((control, True))
    planned: list[Launch] = []
    if "speed" in kinds:
        order = list(entries)
        for index in range(launches):
            if index % 2:
                order = order[::-1]
            else:
                chooser.shuffle(order)
            planned += [Launch(name, index, "speed", again) for name, again in order]
    for kind in kinds:
        if kind != "speed":
            planned += [Launch(name, 0, kind) for name in subjects]
    return planned
