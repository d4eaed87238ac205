"""JSON lines: a measurement a line, as in a run folder's ``measurements.jsonl`` (``schemas/measurement.json``)."""

from __future__ import annotations

import dataclasses

from ...files import canonical_json
from .results import Results

__all__ = ["to_json_lines"]


def to_json_lines(results: Results) -> str:
    """Everything that was measured, raw samples included; the others (comparisons) can be computed from it."""
    return "".join(canonical_json(dataclasses.asdict(row)) + "\n" for row in results.measurements)
