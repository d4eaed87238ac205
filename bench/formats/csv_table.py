"""CSV (RFC 4180): a row a measurement, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from typing import Any

from ..records import Measurement
from .results import Results

__all__ = ["COLUMNS", "to_csv"]

COLUMNS = (
    "target", "subject", "metric", "value", "unit", "low", "high", "level", "statistic", "samples", "launches", "p50",
    "p90", "p95", "p99", "source", "origin", "reason", "against", "data", "context", "kv_dtype", "threads", "runtime",
    "runtime_version", "backend", "device", "busy", "artifact_id",
)  # fmt: skip
"""The header, described in docs/formats-out.md."""

# What spreadsheets take for the start of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(results: Results) -> str:
    """A header and a row a measurement; what is not known is an empty cell. Numbers are written so that reading them
    gives the same float; a text that a spreadsheet would run as a formula gets an apostrophe before it."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(value) for value in _row(row)] for row in results.measurements)
    return out.getvalue()


def _row(row: Measurement) -> tuple[Any, ...]:
    summary = row.summary
    values: tuple[Any, ...] = (None,) * 6
    percentiles: Any = {}
    if summary is not None:
        values = (summary.value, summary.low, summary.high, summary.level, summary.statistic, summary.n)
        percentiles = summary.percentiles
    value, low, high, level, statistic, count = values
    launches = len(row.samples) if row.samples else None
    return (
        row.target, row.subject, row.metric, value, row.unit, low, high, level, statistic, count, launches,
        *(percentiles.get(name) for name in ("p50", "p90", "p95", "p99")), row.source, row.origin, row.reason,
        row.against, row.data, row.context, row.kv_dtype, row.threads or None, row.runtime, row.runtime_version,
        row.backend, row.device, row.environment.get("busy"), row.artifact_id,
    )  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
