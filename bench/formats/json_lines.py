"""JSON lines: a measurement a line, as in a run folder's ``measurements.jsonl`` (``schemas/measurement.json``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ...files import canonical_json
from ..records import Measurement

__all__ = ["to_json_lines"]


class _Measured(Protocol):
    @property
    def measurements(self) -> Sequence[Measurement]: ...


def to_json_lines(results: _Measured) -> str:
    """Everything that was measured, raw samples included; the others (comparisons) can be computed from it."""
    return "".join(canonical_json(dataclasses.asdict(row)) + "\n" for row in results.measurements)
