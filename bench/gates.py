"""The limits of a recipe's ``[gates]`` put to what was measured. A gate is decided by the bound of the interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..recipe import GateConfig
from .metrics import METRICS, find_metric
from .records import Measurement

__all__ = ["GateResult", "gates_exit_code", "judge"]

Outcome = Literal["pass", "fail", "inconclusive", "not_measured"]


@dataclass(frozen=True)
class GateResult:
    """One gate on one subject: ``value`` with its interval against ``limit``, and why the outcome is what it is."""

    metric: str
    subject: str
    outcome: Outcome
    limit: float
    sense: Literal["at_most", "at_least"]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    against: str | None = None
    data: str | None = None
    reason: str = ""


def judge(
    measurements: Sequence[Measurement], gates: Mapping[str, GateConfig], *, subjects: Iterable[str] | None = None
) -> list[GateResult]:
    """Put every gate to every artifact, one result for each limit, subject and data set.

    ``min`` passes when the interval's lower bound reaches it, fails when its upper bound does not, and is
    inconclusive between (``max`` likewise); without an interval the value decides, but for times and energies: how far
    the next launch lies from a single one, nothing says, so they are inconclusive. Rows taken with torch are
    baselines, not artifacts: they are judged only when ``subjects`` names them. Where a metric was taken against
    both teacher and student, the teacher counts. A quantity that can't be taken here is ``not_measured``, with the
    reason of the measurement (the latency of a Core ML program off the Mac); one that nobody tried to take is
    inconclusive. Raises :class:`~edgestill.errors.RecipeError` for an unknown metric.
    """
    wanted = None if subjects is None else set(subjects)
    rows = [row for row in measurements if (row.subject in wanted if wanted is not None else row.runtime != "torch")]
    results = []
    for name, gate in gates.items():
        find_metric(name)
        taken = [row for row in rows if row.metric == name]
        if any(row.against == "teacher" for row in taken):
            taken = [row for row in taken if row.against in ("teacher", None)]
        for limit, sense in ((gate.min, "at_least"), (gate.max, "at_most")):
            if limit is None:
                continue
            at: Literal["at_most", "at_least"] = "at_least" if sense == "at_least" else "at_most"
            results += [_put(row, limit, at) for row in taken]
            seen = {row.subject for row in taken}
            missing = sorted({row.subject for row in rows} - seen) if rows else ["*"]
            results += [
                GateResult(name, subject, "inconclusive", limit, at, reason=f"no measurement of {name}")
                for subject in missing
            ]
    return results


def gates_exit_code(results: Sequence[GateResult]) -> int:
    """1 when a gate failed, 3 when one is inconclusive, else 0 (errors.py gives the meaning of exit codes)."""
    outcomes = {result.outcome for result in results}
    return 1 if "fail" in outcomes else 3 if "inconclusive" in outcomes else 0


def _put(row: Measurement, limit: float, sense: Literal["at_most", "at_least"]) -> GateResult:
    summary = row.summary
    if summary is None:
        reason = row.reason or "not measured"
        return GateResult(
            row.metric, row.subject, "not_measured", limit, sense, against=row.against, data=row.data, reason=reason
        )
    if unsure := _single(row):
        return GateResult(
            row.metric, row.subject, "inconclusive", limit, sense, summary.value, summary.low, summary.high,
            row.against, row.data, unsure,
        )  # fmt: skip
    low = summary.value if summary.low is None else summary.low
    high = summary.value if summary.high is None else summary.high
    sign = 1 if sense == "at_least" else -1
    worst, best = (low, high) if sense == "at_least" else (high, low)
    outcome: Outcome
    if sign * worst >= sign * limit:
        outcome, reason = "pass", ""
    elif sign * best < sign * limit:
        outcome, reason = "fail", f"{summary.value:.6g} is not {sense.replace('_', ' ')} {limit:.6g}"
    else:
        outcome, reason = "inconclusive", f"the interval {low:.6g} to {high:.6g} holds the limit {limit:.6g}"
    return GateResult(
        row.metric, row.subject, outcome, limit, sense, summary.value, summary.low, summary.high, row.against,
        row.data, reason,
    )  # fmt: skip


def _single(row: Measurement) -> str:
    """Why a time or an energy was taken too seldom to be judged. (What is taken alone once in a run of several
    launches, as decode speed at a depth, has its own interval.)"""
    if row.source != "measured" or METRICS[row.metric].kind not in ("speed", "energy"):
        return ""
    if row.summary is None or row.summary.statistic != "median" or len(row.samples) > 1:
        return ""
    if row.protocol.get("launches") == 1:
        return "a single launch: nothing says how much of it is noise; raise `launches`"
    return "too few samples for an interval: raise `repeats`" if row.summary.low is None else ""
