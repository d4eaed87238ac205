"""Markdown as GitHub shows it: a table for each target and kind of metric, then what is missing and why."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from ..compare import Comparison
from ..metrics import METRICS
from ..records import Measurement
from .results import Results

__all__ = ["to_markdown"]

_KINDS = {"accuracy": "Accuracy", "speed": "Speed", "energy": "Energy", "memory": "Memory", "size": "Size",
          "sensor": "Sensors"}  # fmt: skip
_MARKS = {"better": " ✔", "worse": " ✘", "same": " =", "inconclusive": " ?"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")


def to_markdown(results: Results) -> str:
    """Headline values with their intervals and, against the baseline, the ratio and what can be said of it."""
    parts = ["# Measurements\n"]
    ratios = {(getattr(c, "target", "host"), c.subject, c.metric): c for c in results.comparisons}
    for target in dict.fromkeys(row.target for row in results.measurements):
        here = [row for row in results.measurements if row.target == target]
        parts.append(f"\n## {_escape(target)}: {_escape(_where(here))}\n")
        for kind, title in _KINDS.items():
            rows = [row for row in here if row.metric in METRICS and METRICS[row.metric].kind == kind]
            if any(row.summary for row in rows):
                parts.append(f"\n### {title}\n\n{_table(rows, ratios, target)}")
        parts.append(_missing(here))
    if results.comparisons:
        base = _escape(results.comparisons[0].baseline)
        parts.append(
            f"\n× is the ratio to {base}: ✔ better, ✘ worse, = the same within what was to be told apart, "
            "? not decided by these measurements. Intervals at 95 %; ratios are judged at 99 %.\n"
        )
    return "".join(parts)


def _where(rows: Sequence[Measurement]) -> str:
    sources = ", ".join(dict.fromkeys(row.source for row in rows))
    busy = " — on a busy machine" if any(row.environment.get("busy") for row in rows) else ""
    return f"{rows[0].device}, {sources}{busy}"


def _table(rows: Sequence[Measurement], ratios: dict[tuple[str, str, str], Comparison], target: str) -> str:
    """Subjects down; across, each metric, once for each text, reference or depth that it was taken with."""
    columns = list(dict.fromkeys((row.metric, row.data, row.against, _depth(row)) for row in rows if row.summary))
    taken = {(row.subject, row.metric, row.data, row.against, _depth(row)): row for row in rows}
    lines = [["", *(_heading(*column) for column in columns)], ["---", *["---:"] * len(columns)]]
    for subject in dict.fromkeys(row.subject for row in rows):
        cells = [_escape(subject)]
        for column in columns:
            row = taken.get((subject, *column))
            cells.append(_cell(row, ratios.get((target, subject, column[0]))))
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _depth(row: Measurement) -> int | None:
    """The context tells rows of one metric apart only where it is what was varied."""
    return row.context if "depth" in row.metric else None


def _heading(metric: str, data: str | None, against: str | None, depth: int | None) -> str:
    more = [
        f"on {data}" if data else "",
        f"to {against}" if against else "",
        f"after {depth}" if depth is not None else "",
    ]
    return " ".join([_escape(metric), *(_escape(text) for text in more if text)])


def _cell(row: Measurement | None, comparison: Comparison | None) -> str:
    if row is None or row.summary is None:
        return "—"
    metric, summary = METRICS[row.metric], row.summary
    text = _escape(metric.show(summary.value))
    if summary.low is not None and summary.high is not None:
        text += f" ({_escape(metric.show(summary.low))} – {_escape(metric.show(summary.high))})"
    if comparison is not None and comparison.ratio is not None:
        text += f"<br>{comparison.ratio:.2f}×{_MARKS.get(comparison.outcome, '')}"
    return text


def _missing(rows: Sequence[Measurement]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.summary is None:
            reasons.setdefault((row.subject, row.reason or "not taken"), []).append(row.metric)
    if not reasons:
        return ""
    lines = [
        f"* {_escape(subject)}: {', '.join(_escape(name) for name in names)}: {_escape(reason)}\n"
        for (subject, reason), names in reasons.items()
    ]
    return "\nNot taken:\n\n" + "".join(lines)


def _escape(text: str) -> str:
    """As it is, whatever Markdown or HTML it looks like; on one line.

    >>> _escape("a|b_c <i>")
    'a\\\\|b\\\\_c &lt;i&gt;'
    """
    line = " ".join(text.split())
    return html.escape(
        _SPECIAL.sub(lambda found: found[0] if found[0] in "<>()-+" else f"\\{found[0]}", line), quote=False
    )
