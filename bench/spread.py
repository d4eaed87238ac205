"""What several seeds say: mean, standard deviation, a t-interval, and who wins where the intervals separate.

The interval is Student's over seeds, ``mean ± t(0.975, n − 1) · sd / √n`` (a bootstrap of three values has nothing to
draw from). It speaks of training again with another seed, on the same text; not of other text. Two 95 % intervals that
do not touch are a stricter demand than a test of the difference at 5 %, which is wanted here: several are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .statistics import student_interval

__all__ = ["Spread", "Winner", "find_winner", "spread"]


@dataclass(frozen=True)
class Spread:
    """``values`` of one quantity, one a seed. ``sd`` (n − 1) and the 95 % interval are ``None`` for a single seed."""

    values: tuple[float, ...]
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Winner:
    """``name`` of the best one if its interval touches no other's, else ``None``; ``reason`` says why."""

    name: str | None
    reason: str


def spread(values: Sequence[float], level: float = 0.95) -> Spread:
    """Mean, standard deviation and t-interval of one value a seed.

    >>> found = spread([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.low, 3), round(found.high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    count = len(values)
    if not count or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a spread needs finite values, got {list(values)}")
    mean = math.fsum(values) / count
    if count == 1:
        return Spread(tuple(values), mean)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_interval(values, level)[1]
    return Spread(tuple(values), mean, sd, mean - half, mean + half)


def find_winner(spreads: Mapping[str, Spread], better: Literal["higher", "lower"]) -> Winner:
    """Who is better than all others by more than chance can explain.

    Nobody is with one seed; nor where two intervals have no width at all: seeds that change nothing tell nothing.
    """
    if len(spreads) < 2:
        return Winner(None, "nothing to compare with")
    sign = 1 if better == "higher" else -1
    ranked = sorted(spreads, key=lambda name: -sign * spreads[name].mean)
    best = spreads[ranked[0]]
    for name in ranked[1:]:
        low, high, other = best.low, best.high, spreads[name]
        if low is None or high is None or other.low is None or other.high is None:
            return Winner(None, "one seed: no interval, so no winner")
        if (low <= other.high) if sign > 0 else (other.low <= high):
            return Winner(None, f"the intervals of {ranked[0]} and {name} overlap")
        if low == high and other.low == other.high:
            return Winner(None, f"the seed changes neither {ranked[0]} nor {name}")
    return Winner(ranked[0], f"its interval lies apart from that of {ranked[1]}, the next best")
