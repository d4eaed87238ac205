"""Subjects side by side: how much faster, smaller, leaner than a baseline, and whether the noise allows to say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError, nearest
from .metrics import METRICS
from .records import Measurement
from .statistics import ratio_interval

__all__ = ["Comparison", "compare", "find_row"]

Outcome = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True)
class Comparison:
    """``ratio`` = subject / baseline of one metric, with its interval (none for exact quantities such as sizes).

    ``outcome`` is in the metric's own direction: ``better`` or ``worse`` only when the whole interval lies beyond
    ``noise_floor`` (what the same subject differs from itself), ``same`` when it does not, ``unknown`` with a
    ``reason`` where one side was not measured.
    """

    metric: str
    subject: str
    baseline: str
    outcome: Outcome
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    noise_floor: float | None = None
    reason: str = ""


def find_row(
    rows: Iterable[Measurement], subject: str, metric: str, *, against: str | None = None, data: str | None = None
) -> Measurement | None:
    """The first row of ``subject`` and ``metric`` (and, when given, taken against or on this)."""
    for row in rows:
        fits = (against is None or row.against == against) and (data is None or row.data == data)
        if fits and row.subject == subject and row.metric == metric:
            return row
    return None


def compare(
    measurements: Sequence[Measurement], baseline: str, *, metrics: Iterable[str] | None = None, seed: int = 0
) -> list[Comparison]:
    """Every subject against ``baseline``, one row a metric of speed, memory and size (accuracy has its own reference).

    Raises :class:`UsageError` when nothing of that name was measured.
    """
    subjects = list(dict.fromkeys(row.subject for row in measurements))
    if baseline not in subjects:
        raise UsageError(f"nothing was measured of {baseline!r}", hint=nearest(baseline, subjects))
    wanted = list(metrics) if metrics is not None else [n for n, m in METRICS.items() if m.kind != "accuracy"]
    found = []
    for metric in wanted:
        base = find_row(measurements, baseline, metric)
        if base is None:
            continue
        for subject in subjects:
            row = find_row(measurements, subject, metric)
            if subject != baseline and row is not None:
                found.append(_compare(row, base, seed))
    return found


def _compare(row: Measurement, base: Measurement, seed: int) -> Comparison:
    reason = ""
    if row.summary is None:
        reason = row.reason or "not measured"
    elif base.summary is None:
        reason = f"{base.subject}: {base.reason or 'not measured'}"
    elif base.summary.value == 0:
        reason = f"{base.subject} measured 0"
    if reason or row.summary is None or base.summary is None:
        return Comparison(row.metric, row.subject, base.subject, "unknown", reason=reason)
    metric = METRICS[row.metric]
    if metric.kind != "speed" or row.summary.statistic != "median" or base.summary.statistic != "median":
        ratio = row.summary.value / base.summary.value
        # A count repeats to its own floor, whatever the machine does; sizes are exact.
        noise = float(row.protocol.get("noise_floor") or 0.0) if metric.kind == "instructions" else 0.0
        return Comparison(row.metric, row.subject, base.subject, _direction(ratio, ratio, row.metric, noise), ratio)
    interval = ratio_interval(row.samples, base.samples, seed=seed)
    floor = row.protocol.get("noise_floor")
    outcome = _direction(interval.low, interval.high, row.metric, floor or 0.0)
    return Comparison(row.metric, row.subject, base.subject, outcome, *interval, noise_floor=floor)


def _direction(low: float, high: float, metric: str, floor: float) -> Outcome:
    smaller = METRICS[metric].better == "lower"
    if high < 1 / (1 + floor):
        return "better" if smaller else "worse"
    if low > 1 + floor:
        return "worse" if smaller else "better"
    return "same"
