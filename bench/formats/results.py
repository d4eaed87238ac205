"""What every format writes: one value that holds all there may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compare import Comparison
from ..gates import GateResult
from ..records import Measurement, Verdict

__all__ = ["Results"]


@dataclass(frozen=True)
class Results:
    """Everything that can be written. ``decisions`` have ``metric subject outcome limit reason target``."""

    measurements: tuple[Measurement, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    gates: tuple[GateResult, ...] = ()
    decisions: tuple[Any, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
