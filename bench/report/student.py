"""The student card: fidelity, calibration, robustness and cost of a distillation, as plain tables and charts.

The report and ``MODEL_CARD.md`` draw the same tables, so that neither says what the other does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..metrics import METRICS
from ..records import Measurement
from ..robustness import CLEAN, NoiseRow
from .facts import RunFacts
from .plots import reliability_chart

__all__ = ["CardTable", "ReliabilityPlot", "calibration_plots", "cost_rows", "student_tables"]

SUBJECTS = ("teacher", "student", "untrained-cut")
_FIDELITY = ("kl", "top1_agreement", "spearman", "cosine", "f1", "accuracy", "next_token_accuracy", "perplexity",
             "ece")  # fmt: skip
_TITLES = {
    "kl": "KL to teacher", "top1_agreement": "Top-1 agreement", "spearman": "Spearman to teacher",
    "cosine": "Cosine to teacher", "accuracy": "Accuracy", "f1": "F1 of entities",
    "next_token_accuracy": "Next token right", "perplexity": "Perplexity", "ece": "ECE",
    "self_cosine": "Cosine to itself, clean", "self_agreement": "Same label as clean",
}  # fmt: skip
_COST = {
    "teacher_forward_tokens": "tokens that the teacher read", "teacher_generated_tokens": "tokens that it wrote",
    "student_forward_tokens": "tokens that the student read", "student_generated_tokens": "tokens that it wrote itself",
}  # fmt: skip
Cell = tuple[str, str]  # a value, and below it its interval (or nothing)


@dataclass(frozen=True)
class CardTable:
    """A table whose first column names the row; ``rows`` are a name and, for each column, a value and its interval."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    note: str = ""


@dataclass(frozen=True)
class ReliabilityPlot:
    """A reliability diagram of one data set; ``names`` are its lines in the order of their colours."""

    title: str
    svg: str
    names: tuple[str, ...]
    caption: str


def student_tables(run: RunFacts, measurements: Sequence[Measurement]) -> list[CardTable]:
    """Fidelity, task and calibration of teacher, student and untrained cut; then, per data set, what noise costs."""
    if run.student is None:
        return []
    return [table for table in (_fidelity(measurements), *_noise(run.noise)) if table.rows and table.columns]


def _fidelity(measurements: Sequence[Measurement]) -> CardTable:
    taken = {
        (row.subject, row.metric, row.data): row.summary
        for row in measurements
        if row.subject in SUBJECTS and row.metric in _FIDELITY and row.against in ("teacher", None) and row.summary
    }
    keys = sorted({(metric, data) for _, metric, data in taken}, key=lambda key: (_FIDELITY.index(key[0]), str(key[1])))
    rows = []
    for name in SUBJECTS:
        if not any(subject == name for subject, _, _ in taken):
            continue
        cells: list[Cell] = []
        for metric, data in keys:
            found = taken.get((name, metric, data))
            cells.append(
                ("—", "") if found is None else (show(metric, found.value), _interval(metric, found.low, found.high))
            )
        rows.append((name.replace("-", " "), tuple(cells)))
    columns = tuple(f"{_TITLES[metric]} · {data}" if data else _TITLES[metric] for metric, data in keys)
    note = "Float models in torch, on the test split; the untrained cut is the student before it learnt anything."
    return CardTable("Fidelity, task and calibration", columns, tuple(rows), note)


def _noise(rows: Sequence[NoiseRow]) -> Iterable[CardTable]:
    """A table for each data set: a row a noise, a column a figure of a model."""
    for data in dict.fromkeys(row.data for row in rows):
        here = [row for row in rows if row.data == data]
        values = {(row.noise, row.metric, row.subject): row for row in here}
        metrics = [metric for metric in _TITLES if any(row.metric == metric for row in here)]
        columns = [(m, s) for m in metrics for s in SUBJECTS if any(r.metric == m and r.subject == s for r in here)]
        listed = []
        for noise in dict.fromkeys(row.noise for row in here):
            cells: list[Cell] = []
            for metric, subject in columns:
                row = values.get((noise, metric, subject))
                same = row is None and noise != CLEAN and metric.startswith("self_")
                cells.append(
                    ("same tokens" if same else "—", "") if row is None
                    else (show(metric, row.value), _interval(metric, row.low, row.high))
                )  # fmt: skip
            listed.append((noise, tuple(cells)))
        sizes = sorted({row.n for row in here})
        note = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"
        note += ": a subset of the test split, with the same noise for all."
        if {"kl", "spearman"} & set(metrics):
            note += " Fidelity is to the teacher on the same noisy text."
        titles = tuple(f"{_TITLES[metric]} · {subject}" for metric, subject in columns)
        yield CardTable(f"Robustness on {data}", titles, tuple(listed), note)


def show(metric: str, value: float) -> str:
    """A value of the card; figures that compare a model with itself have no row in the table of metrics."""
    if metric == "self_cosine":
        return f"{value:.4f}"
    if metric == "self_agreement":
        return f"{value:.1%}"
    return METRICS[metric].show(value).replace(" nats/token", "").replace(" perplexity", "")


def _interval(metric: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{show(metric, low)} – {show(metric, high)}"


def calibration_plots(run: RunFacts, measurements: Sequence[Measurement]) -> list[ReliabilityPlot]:
    """A reliability diagram for each data set on which calibration was measured."""
    found: dict[str | None, dict[str, tuple[Mapping[str, Sequence[float]], float]]] = {}
    for row in measurements:
        curve = row.protocol.get("reliability")
        if row.metric == "ece" and row.subject in SUBJECTS and row.summary and curve:
            found.setdefault(row.data, {})[row.subject] = (curve, row.summary.value)
    plots = []
    for data, subjects in found.items():
        names = [name for name in SUBJECTS if name in subjects]
        lines = {
            name: list(zip(subjects[name][0]["confidence"], subjects[name][0]["accuracy"], strict=True))
            for name in names
        }
        title = f"Reliability on {data}" if data else "Reliability"
        svg = reliability_chart(lines, label=title)
        errors = ", ".join(f"{name.replace('-', ' ')} {subjects[name][1]:.2%}" for name in names)
        what = {
            "text-generation": "of the next token", "text-classification": "of the class",
            "token-classification": "of a word's label",
            "feature-extraction": "of a linear probe",
        }[run.task]  # fmt: skip
        caption = f"Confidence {what} against how often it is right, bins of equal mass. ECE: {errors}."
        plots.append(ReliabilityPlot(title, svg, tuple(names), caption))
    return plots


def cost_rows(run: RunFacts) -> list[tuple[str, str]]:
    """What the student cost, in tokens and time."""
    if run.distill is None:
        return []
    rows = [("optimiser steps", f"{run.distill.steps:,}"), ("tokens learnt from", f"{run.distill.tokens_seen:,}")]
    rows += [(title, f"{run.distill.cost[name]:,}") for name, title in _COST.items() if run.distill.cost.get(name)]
    if run.distill.seconds:
        rows.append(("training time", f"{run.distill.seconds:,.0f} s"))
    return rows
