"""The table of all artifacts against the teacher as plain data: for the report, the model card and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...artifact import Task
from ..compare import Comparison, compare, find_row
from ..metrics import METRICS
from ..pick import HEADLINE
from ..records import Measurement, Verdict

__all__ = ["TORCH_SUBJECTS", "Cell", "Column", "Row", "Table", "heading", "summary_rows", "summary_table"]

Badge = Literal["device_verified", "program_verified", "failed", "reference", "not_verified"]

_TITLES = {
    "kl": "KL to teacher", "top1_agreement": "Top-1 agreement", "perplexity_ratio": "Perplexity ratio",
    "spearman": "Spearman", "cosine": "Cosine", "accuracy": "Accuracy", "f1": "F1", "latency_ms": "Latency",
    "decode_tokens_per_s": "Decode", "prefill_tokens_per_s": "Prefill", "time_to_first_token_ms": "First token",
    "peak_memory_bytes": "Peak memory", "load_ms": "Load", "model_bytes": "Size",
    "download_bytes": "Download", "bits_per_weight": "Bits/weight",
}  # fmt: skip

# Accuracy columns beside the headline one, on the first data set that has them.
_SECONDARY: Mapping[Task, tuple[str, ...]] = {
    "feature-extraction": ("accuracy",),
    "text-classification": ("top1_agreement", "kl"),
    "token-classification": ("accuracy", "top1_agreement", "kl"),
    "text-generation": ("top1_agreement", "perplexity_ratio"),
}
_COST: Mapping[Task, tuple[str, ...]] = {
    "feature-extraction": ("latency_ms", "peak_memory_bytes", "load_ms"),
    "text-classification": ("latency_ms", "peak_memory_bytes", "load_ms"),
    "token-classification": ("latency_ms", "peak_memory_bytes", "load_ms"),
    "text-generation": ("decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes"),
}


# What is measured with torch beside the teacher, in the order of reports; the cut is the student before training.
TORCH_SUBJECTS = ("student", "untrained-cut")


@dataclass(frozen=True)
class Column:
    """One quantity: a metric, taken on one data set where that matters; ``unit`` holds for all of its cells (sizes
    carry their own: MB or GB)."""

    metric: str
    title: str
    data: str | None = None

    @property
    def unit(self) -> str:
        """``"ms"``, ``"tok/s"``, ``"nats/token"`` or nothing."""
        shown = METRICS[self.metric].show(1.0).partition(" ")[2]
        return "" if METRICS[self.metric].unit == "bytes" else shown


@dataclass(frozen=True)
class Cell:
    """One number as a human reads it: ``text`` (``—`` when there is none, then ``note`` numbers the reason),
    ``interval`` and ``ratio`` to the baseline (``"0.48×"``) where they exist. ``value`` is the number itself."""

    text: str
    value: float | None = None
    interval: str = ""
    ratio: str = ""
    outcome: Literal["better", "worse", "same", "inconclusive", "unknown"] = "unknown"
    source: str = "measured"
    note: int | None = None


@dataclass(frozen=True)
class Row:
    """One subject: how it was judged, what is inside, and a cell for each column."""

    subject: str
    badge: Badge
    contents: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Columns, rows, and the reasons for what is missing (numbered from 1)."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Notes:
    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def summary_table(
    measurements: Sequence[Measurement],
    verdicts: Sequence[Verdict],
    *,
    task: Task,
    subjects: Sequence[str] | None = None,
    contents: Mapping[str, str] | None = None,
    baseline: str = "teacher",
) -> Table:
    """One row a subject in the given order (default: as measured), one column a quantity that at least one has."""
    names = list(subjects) if subjects is not None else list(dict.fromkeys(row.subject for row in measurements))
    judged = {verdict.subject: verdict for verdict in verdicts}
    columns = _columns(measurements, task)
    ratios: dict[tuple[str, str], Comparison] = {}
    if any(row.subject == baseline for row in measurements):
        cost = [column.metric for column in columns if METRICS[column.metric].kind != "accuracy"]
        ratios = {(found.subject, found.metric): found for found in compare(measurements, baseline, metrics=cost)}
    notes = _Notes()
    rows = []
    for name in names:
        badge = _badge(name, judged, measurements)
        cells = tuple(_cell(name, column, measurements, ratios, notes, baseline, badge) for column in columns)
        rows.append(Row(name, badge, (contents or {}).get(name, ""), cells))
    return Table(tuple(columns), tuple(rows), tuple(notes.texts))


def summary_rows(table: Table) -> list[dict[str, str]]:
    """The table for a terminal: one mapping a subject, from column title to text."""
    found = []
    for row in table.rows:
        texts = {"artifact": row.subject, "verdict": row.badge.replace("_", " ")}
        for column, cell in zip(table.columns, row.cells, strict=True):
            texts[heading(column)] = cell.text + (f" ({cell.ratio})" if cell.ratio else "")
        found.append(texts)
    return found


def heading(column: Column) -> str:
    """Title, unit and data set in one line."""
    title = f"{column.title} ({column.unit})" if column.unit else column.title
    return f"{title} · {column.data}" if column.data else title


def _columns(measurements: Sequence[Measurement], task: Task) -> list[Column]:
    def sets(metric: str) -> list[str | None]:
        rows = [row for row in measurements if row.metric == metric and row.against in ("teacher", None)]
        return list(dict.fromkeys(row.data for row in rows if row.summary is not None))

    sizes = ["model_bytes", *(["download_bytes"] if sets("download_bytes") else [])]
    columns = [Column(metric, _TITLES[metric]) for metric in sizes]
    head = next((metric for metric in HEADLINE[task] if sets(metric)), None)
    if head:
        columns += [Column(head, _TITLES[head], data) for data in sets(head)]
    for metric in _SECONDARY[task]:
        if metric != head and (found := sets(metric)):
            columns.append(Column(metric, _TITLES[metric], found[0]))
    taken = {row.metric for row in measurements}
    return columns + [Column(metric, _TITLES[metric]) for metric in _COST[task] if metric in taken]


def _badge(name: str, judged: Mapping[str, Verdict], measurements: Sequence[Measurement]) -> Badge:
    if name in judged:
        return judged[name].level
    runtimes = {row.runtime for row in measurements if row.subject == name}
    return "reference" if runtimes == {"torch"} else "not_verified"


def _cell(
    name: str,
    column: Column,
    measurements: Sequence[Measurement],
    ratios: Mapping[tuple[str, str], Comparison],
    notes: _Notes,
    baseline: str,
    badge: Badge,
) -> Cell:
    metric = METRICS[column.metric]
    rows = [row for row in measurements if row.against in ("teacher", None)]
    row = find_row(rows, name, column.metric, data=column.data)
    if row is None and name == baseline and metric.kind == "accuracy" and column.metric != "accuracy":
        return Cell("reference")
    if row is None or row.summary is None:
        return Cell(
            "—", note=notes.number(row.reason if row and row.reason else _why_missing(name, badge, metric.kind))
        )
    summary = row.summary
    interval = ""
    if summary.low is not None and summary.high is not None and metric.kind in ("accuracy", "speed"):
        interval = f"{_bare(metric.show(summary.low))}–{_bare(metric.show(summary.high))}"
    found = ratios.get((name, column.metric))
    ratio = "" if found is None or found.ratio is None else f"{found.ratio:.2f}×"
    outcome = found.outcome if found is not None else "unknown"
    text = metric.show(summary.value)
    return Cell(_bare(text) if column.unit else text, summary.value, interval, ratio, outcome, row.source)


def _why_missing(name: str, badge: Badge, kind: str) -> str:
    """The reason where nobody wrote one down, because it was not even tried."""
    if badge == "failed":
        return "not taken of an artifact that failed verification"
    if name == "untrained-cut" and kind != "accuracy":
        return "as large and as fast as the student"
    return "not measured"


def _bare(text: str) -> str:
    """The number without its unit."""
    return text.partition(" ")[0]
