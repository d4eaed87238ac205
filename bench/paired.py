"""Comparisons that hold: two subjects' launches against each other, and the A/A floor under which nothing is said.

A launch is one unit, whatever number of samples it has: they share its memory layout, its caches and its neighbours.
Each is reduced to one number, the quartile on the undisturbed side (what interrupts an inference only ever makes it
longer; Chen & Revels, *Robust benchmarking in noisy environments*, 2016, take the minimum for the same reason).
Launches with one index ran side by side, so their log ratios are compared: Student's interval on the mean of these
(Kalibera & Jones, *Rigorous benchmarking in reasonable time*, 2013). A bootstrap of three launches can't leave the
range of three numbers, which misses the truth one time in four.

The quartile, and the floor, were chosen on 45 recorded rounds of three workers on two cores that twenty other processes
fought for (median times there: 30 times the undisturbed ones): two launches side by side differed by 4.5 % (one
standard deviation), and a subject was called different from itself in 1 to 2 of 1,000 comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from .statistics import Interval, student_interval

__all__ = ["DECISION_LEVEL", "half_width", "launch_value", "noise_floor", "paired_ratio"]

DECISION_LEVEL = 0.99
"""Of the interval that two subjects are told apart by: a nominal 1 % of false alarms."""

_UNDISTURBED = 0.25
Better = Literal["higher", "lower"]
Launches = Sequence[Sequence[float]]


def launch_value(samples: Sequence[float], better: Better) -> float:
    """The lower quartile of times, the upper one of speeds.

    >>> launch_value([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0], "lower")
    3.5
    """
    return float(np.quantile(np.asarray(samples, np.float64), _UNDISTURBED if better == "lower" else 1 - _UNDISTURBED))


def paired_ratio(a: Launches, b: Launches, *, better: Better = "lower", level: float = DECISION_LEVEL) -> Interval:
    """a / b with its interval, from samples per launch; launch ``i`` of both ran side by side.

    With unequal numbers of launches nothing is paired, and Welch's interval is taken. Raises :class:`ValueError` for
    fewer than two launches of either (one has no interval), for an empty launch, and for values that are not positive.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("an interval needs at least 2 launches of both")
    if not all(len(launch) for launch in [*a, *b]):
        raise ValueError("a launch without samples")
    left, right = (np.array([launch_value(launch, better) for launch in side]) for side in (a, b))
    if min(left.min(), right.min()) <= 0 or not np.isfinite([*left, *right]).all():
        raise ValueError("a ratio needs positive, finite values")
    centre, half = _student(np.log(left), np.log(right), level)
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def _student(
    left: npt.NDArray[np.float64], right: npt.NDArray[np.float64], level: float
) -> tuple[float, float]:  # fmt: skip
    """Mean difference and half the width of its interval: paired, or Welch's."""
    if len(left) == len(right):
        return student_interval(left - right, level)
    from scipy.special import stdtrit

    parts = [side.var(ddof=1) / len(side) for side in (left, right)]
    centre, total = float(left.mean() - right.mean()), float(sum(parts))
    if total == 0:
        return centre, 0.0
    freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (left, right), strict=True))
    return centre, float(stdtrit(freedom, (1 + level) / 2) * math.sqrt(total))


def half_width(interval: Interval) -> float:
    """How far a ratio may be from its value, as a fraction (``0.02``: two per cent either way)."""
    return math.sqrt(interval.high / interval.low) - 1


def noise_floor(a: Launches, again: Launches, *, better: Better = "lower", level: float = 0.95) -> float:
    """The relative difference that one subject, measured twice as if it were two, shows by chance.

    It is the farther end of the A/A ratio's interval, as a fraction (``0.03``: three per cent). Nothing smaller between
    two subjects is called a difference.
    """
    interval = paired_ratio(a, again, better=better, level=level)
    return max(interval.high, 1 / interval.low) - 1
