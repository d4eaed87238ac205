"""What :func:`edgestill.distill.distill` gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DistillResult"]


@dataclass(frozen=True)
class DistillResult:
    """A finished student.

    ``keep``: the teacher layers it is made of, of ``teacher_layers``. ``steps``: optimiser steps; ``tokens_seen``:
    real tokens that the student was trained on; ``seconds``: wall time, with that before a kill (which is why it
    stands here and in no file of the student). ``dev_before`` and ``dev_after``: metrics of the cut and of the trained
    student on the dev split (see :meth:`edgestill.distill.evaluate.HeldOut.measure`), empty without dev text.
    ``curves``: the lines of ``training.jsonl``. ``cost``: what it took in tokens of teacher and student, by the field
    names of :class:`edgestill.distill.cost.Cost`.
    """

    path: Path
    keep: tuple[int, ...]
    teacher_layers: int
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    dev_before: Mapping[str, float] = field(default_factory=dict)
    dev_after: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, int] = field(default_factory=dict)
