"""Accuracy of a subject as a table that fits 80 columns: metrics down, what is compared with across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .metrics import METRICS
from .records import Measurement, Summary

__all__ = ["AccuracyTable", "accuracy_tables"]

_TITLES = {
    "kl": "KL mean", "kl_median": "KL median", "kl_p99": "KL p99", "kl_max": "KL max",
    "top1_agreement": "top-1 agreement", "top5_agreement": "top-5 agreement", "delta_p": "Δp mean",
    "delta_p_rms": "Δp RMS", "perplexity": "perplexity",
    "perplexity_ratio": "perplexity ratio", "next_token_accuracy": "next token right", "ece": "calibration error",
    "cosine": "cosine", "spearman": "Spearman", "sts_spearman": "Spearman with people", "accuracy": "accuracy",
    "f1": "F1", "accuracy_raw": "accuracy, plain",
    "accuracy_ratio": "accuracy / teacher's", "target_perplexity": "perplexity of a target",
}  # fmt: skip
_TAILS = ("p1", "p5", "p50", "p95", "p99")


@dataclass(frozen=True)
class AccuracyTable:
    """A subject on one data set: ``header`` and ``rows`` of text, and the ``reasons`` for what is missing."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    reasons: tuple[str, ...] = ()


def accuracy_tables(measurements: Sequence[Measurement]) -> list[AccuracyTable]:
    """A table for each target, subject and data set with a metric of accuracy; intervals are 95 %, over documents."""
    rows = [row for row in measurements if METRICS[row.metric].kind == "accuracy"]
    tables = []
    for target, subject, data in dict.fromkeys((row.target, row.subject, row.data) for row in rows):
        mine = [row for row in rows if (row.target, row.subject, row.data) == (target, subject, data)]
        sides = list(dict.fromkeys(row.against for row in mine))
        taken = {(row.metric, row.against): row.summary for row in mine if row.summary is not None}
        lines = []
        for metric in _TITLES:
            found = [taken.get((metric, side)) for side in sides]
            if any(found):
                lines.append((_TITLES[metric], *(_cell(metric, one) for one in found)))
            if metric == "delta_p" and any(one is not None and one.percentiles for one in found):
                lines += _tails(found)
        reasons = [f"{row.against or row.metric}: {row.reason}" for row in mine if row.summary is None]
        header = ("", *(f"against {side}" if side else "value" for side in sides))
        tables.append(AccuracyTable(_title(subject, data, target, mine), header, tuple(lines), tuple(reasons)))
    return tables


def _title(subject: str, data: str | None, target: str, rows: Sequence[Measurement]) -> str:
    place = "" if target == "host" else f", {target}"
    row = next((row for row in rows if row.summary is not None), None)
    if row is None or row.summary is None:
        return f"{subject} on {data}{place}"
    units = row.protocol.get("independent_units")
    examples = "" if units is None or units == row.summary.n else f" of {units} documents"
    return f"{subject} on {data}: {row.summary.n} samples{examples}, {row.runtime}{place}"


def _tails(found: Sequence[Summary | None]) -> list[tuple[str, ...]]:
    show = METRICS["delta_p"].show
    return [
        (f"  {name}", *(show(one.percentiles[name]) if one and name in one.percentiles else "—" for one in found))
        for name in _TAILS
        if any(one is not None and name in one.percentiles for one in found)
    ]


def _cell(metric: str, summary: Summary | None) -> str:
    if summary is None:
        return "—"
    show = METRICS[metric].show
    unit = METRICS[metric].unit
    text = show(summary.value).removesuffix(f" {unit}")
    if summary.low is None or summary.high is None:
        return text
    short = (lambda bound: f"{bound:.3g}") if unit == "nats/token" else show  # 80 columns hold two of them
    low, high = (short(bound).removesuffix(f" {unit}") for bound in (summary.low, summary.high))
    return f"{text}  [{low}, {high}]"
