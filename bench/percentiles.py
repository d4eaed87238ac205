"""Percentiles that a number of samples supports, by the early stopping of MLPerf's LoadGen.

The question is how many of ``n`` inferences may be slower than a value before "at most 10 % are" stops being proved.
With ``over`` slower ones it is proved at confidence ``c`` when ``P(Binomial(n, 1 - p) <= over) <= 1 - c``. LoadGen
stops as soon as that holds, and gives the ``over``-th largest sample as its estimate: an upper bound of the percentile,
not its most likely value. Inferences of one process are not independent draws; that is MLPerf's assumption, and ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["CONFIDENCE", "allowed_over", "early_stopping_bound", "needed_samples"]

CONFIDENCE = 0.99


def needed_samples(percentile: int, over: int = 1, *, confidence: float = CONFIDENCE) -> int:
    """The fewest samples that prove percentile ``percentile`` when ``over`` of them are slower.

    LoadGen's own minimum is for one: 64 for the 90th, 662 for the 99th percentile.

    >>> needed_samples(90), needed_samples(99)
    (64, 662)
    """
    from scipy.stats import binom

    share = _share(percentile)
    high = over + 1
    while binom.cdf(over, high, share) > 1 - confidence:
        high *= 2
    low = over  # n = over always has P = 1
    while high - low > 1:
        middle = (low + high) // 2
        if binom.cdf(over, middle, share) <= 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def allowed_over(n: int, percentile: int, *, confidence: float = CONFIDENCE) -> int:
    """How many of ``n`` samples may be slower than a bound that still proves the percentile; 0: ``n`` is too small."""
    from scipy.stats import binom

    counts = np.arange(n + 1)
    proved = np.flatnonzero(binom.cdf(counts, n, _share(percentile)) <= 1 - confidence)
    return int(proved[-1]) if len(proved) else 0


def early_stopping_bound(
    samples: Sequence[float], percentile: int, *, confidence: float = CONFIDENCE
) -> float | None:  # fmt: skip
    """LoadGen's estimate, an upper bound of the percentile at ``confidence``; ``None`` when there are too few."""
    over = allowed_over(len(samples), percentile, confidence=confidence)
    return float(np.sort(np.asarray(samples, np.float64))[-over]) if over else None


def _share(percentile: int) -> float:
    """Of samples that are slower than the percentile."""
    if not 0 < percentile < 100:
        raise ValueError(f"no percentile {percentile}")
    return (100 - percentile) / 100
