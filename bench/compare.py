"""Subjects side by side: how much faster, smaller, leaner than a baseline, and whether the noise allows to say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError, nearest
from .metrics import METRICS
from .paired import paired_ratio
from .records import Measurement
from .statistics import Interval

__all__ = ["Comparison", "Decision", "compare", "decide", "find_row"]

Outcome = Literal["better", "worse", "same", "inconclusive", "unknown"]
_RESOLUTION = 0.05
_TIMED = ("speed", "energy")


@dataclass(frozen=True)
class Comparison:
    """``ratio`` = subject / baseline of one metric, with its 99 % interval (none for exact quantities such as sizes).

    ``outcome`` is in the metric's own direction. ``better`` or ``worse``: the interval does not hold 1 and the ratio
    lies beyond ``noise_floor`` (what the same subject differs from itself). ``same``: the whole interval lies within
    the resolution of the measurement. ``inconclusive``: the noise is larger than that, with the ``reason``; or the
    machine was ``busy``, where two subjects that look alike may differ on a quiet one. ``unknown``: one side was not
    measured.
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
    target: str = "host"
    busy: bool = False


@dataclass(frozen=True)
class Decision:
    """Whether ``subject`` is slower than the baseline by more than was allowed: ``pass``, ``fail`` or
    ``inconclusive``, by the bound of the interval of ``metric``."""

    metric: str
    subject: str
    outcome: Literal["pass", "fail", "inconclusive"]
    limit: float
    reason: str
    target: str = "host"


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
    measurements: Sequence[Measurement], baseline: str, *, metrics: Iterable[str] | None = None
) -> list[Comparison]:
    """Every subject against ``baseline``, one row a metric of speed, memory, energy and size (accuracy has its own
    reference; what sensors say is no property of a subject), on each target apart.

    Raises :class:`UsageError` when nothing of that name was measured.
    """
    subjects = list(dict.fromkeys(row.subject for row in measurements))
    if baseline not in subjects:
        raise UsageError(f"nothing was measured of {baseline!r}", hint=nearest(baseline, subjects))
    kept = [name for name, metric in METRICS.items() if metric.kind not in ("accuracy", "sensor")]
    wanted = list(metrics) if metrics is not None else kept
    found = []
    for target in dict.fromkeys(row.target for row in measurements):
        here = [row for row in measurements if row.target == target]
        for metric in wanted:
            base = find_row(here, baseline, metric)
            if base is None:
                continue
            for subject in subjects:
                row = find_row(here, subject, metric)
                if subject != baseline and row is not None:
                    found.append(_compare(row, base))
    return found


def decide(comparisons: Sequence[Comparison], limit: float) -> list[Decision]:
    """Is a subject slower than the baseline by more than ``limit`` (``0.05``: five per cent)? One answer for each
    subject and target: of the tokens a second of a decoder, else of latency.

    ``fail`` when the whole interval lies beyond the limit, ``pass`` when none of it does and the machine was not busy,
    else ``inconclusive``.
    """
    found: dict[tuple[str, str], Comparison] = {}
    for metric in ("latency_ms", "decode_tokens_per_s"):
        found |= {(row.target, row.subject): row for row in comparisons if row.metric == metric}
    return [_decide(row, limit) for row in found.values()]


def _decide(row: Comparison, limit: float) -> Decision:
    def answer(outcome: Literal["pass", "fail", "inconclusive"], reason: str) -> Decision:
        return Decision(row.metric, row.subject, outcome, limit, reason, row.target)

    if row.ratio is None or row.low is None or row.high is None:
        return answer("inconclusive", row.reason or "it has no interval")
    slower = (row.low, row.high) if METRICS[row.metric].better == "lower" else (1 / row.high, 1 / row.low)
    told = f"takes {slower[0]:.3f} to {slower[1]:.3f} times as long as {row.baseline}"
    if slower[1] <= 1 + limit:
        return answer("inconclusive", f"{told}, on a busy machine") if row.busy else answer("pass", told)
    if slower[0] > 1 + limit:
        return answer("fail", told)
    return answer("inconclusive", f"{told}: the interval holds the limit {1 + limit:.3f}")


def _compare(row: Measurement, base: Measurement) -> Comparison:
    reason = ""
    if row.summary is None:
        reason = row.reason or "not measured"
    elif base.summary is None:
        reason = f"{base.subject}: {base.reason or 'not measured'}"
    elif base.summary.value == 0:
        reason = f"{base.subject} measured 0"

    def answer(outcome: Outcome, interval: Interval | None = None, reason: str = "") -> Comparison:
        ratio, low, high = interval or (None, None, None)
        floor = row.protocol.get("noise_floor") if timed else None
        names = (row.metric, row.subject, base.subject)
        return Comparison(*names, outcome, ratio, low, high, floor, reason, row.target, timed and busy)

    metric = METRICS[row.metric]
    busy = bool(row.environment.get("busy") or base.environment.get("busy"))
    timed = metric.kind in _TIMED
    if reason or row.summary is None or base.summary is None:
        return answer("unknown", reason=reason)
    ratio = row.summary.value / base.summary.value
    if not timed:
        # A count repeats to its own floor, whatever the machine does; sizes are exact.
        noise = float(row.protocol.get("noise_floor") or 0.0) if metric.kind == "instructions" else 0.0
        apart = ratio > 1 + noise or ratio < 1 / (1 + noise)
        outcome = _direction(ratio, row.metric) if apart else "same"
        return Comparison(row.metric, row.subject, base.subject, outcome, ratio, target=row.target)
    if row.summary.statistic != "median" or min(len(row.samples), len(base.samples)) < 2:
        why = "a single launch" if row.summary.statistic == "median" else "no samples of its own"
        found = answer("inconclusive", reason=f"{why}: nothing says how much of the difference is noise")
        return dataclasses.replace(found, ratio=ratio)
    interval = paired_ratio(row.samples, base.samples, better=metric.better)
    return answer(*_judge(interval, row, busy))


def _judge(interval: Interval, row: Measurement, busy: bool) -> tuple[Outcome, Interval, str]:
    floor = row.protocol.get("noise_floor") or 0.0
    resolution = row.protocol.get("resolution") or _RESOLUTION
    apart = interval.low > 1 or interval.high < 1
    if apart and not 1 / (1 + floor) <= interval.value <= 1 + floor:
        return _direction(interval.value, row.metric), interval, ""
    told = f"{interval.low:.3f} to {interval.high:.3f} with a noise floor of {floor:.1%}"
    if not (1 / (1 + resolution) <= interval.low and interval.high <= 1 + resolution):
        return "inconclusive", interval, f"{told}{' on a busy machine' if busy else ''}: measure again, or longer"
    if busy:
        return "inconclusive", interval, f"{told} on a busy machine: alike here, perhaps not on a quiet one"
    return "same", interval, ""


def _direction(ratio: float, metric: str) -> Outcome:
    if ratio == 1:
        return "same"
    return "better" if (ratio < 1) == (METRICS[metric].better == "lower") else "worse"
