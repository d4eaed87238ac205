"""Early stopping against the binomial distribution itself, by a sum of exact fractions, and LoadGen's own output."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from edgestill.bench.percentiles import allowed_over, early_stopping_bound, needed_samples


def at_most(over: int, n: int, percentile: int) -> Fraction:
    """P(Binomial(n, 1 - p) <= over), exactly."""
    slow = Fraction(100 - percentile, 100)
    return sum((math.comb(n, k) * slow**k * (1 - slow) ** (n - k) for k in range(over + 1)), Fraction(0))


@pytest.mark.parametrize("percentile", [50, 90, 95, 97, 99])
@pytest.mark.parametrize("over", [0, 1, 2, 7])
def test_the_fewest_samples_are_exactly_those(percentile: int, over: int) -> None:
    n = needed_samples(percentile, over)
    assert at_most(over, n, percentile) <= Fraction(1, 100)
    assert at_most(over, n - 1, percentile) > Fraction(1, 100)


def test_loadgens_own_minimum() -> None:
    """`Processed at least 64 queries`, `would need to process at least 662 total queries` (its summaries)."""
    assert (needed_samples(90), needed_samples(99)) == (64, 662)
    assert allowed_over(63, 90) == 0
    assert allowed_over(64, 90) == 1
    assert allowed_over(661, 99) == 0
    assert allowed_over(662, 99) == 1


@pytest.mark.parametrize(("queries", "discarded"), [(100, 2), (201, 9)])
def test_loadgens_own_summaries(queries: int, discarded: int) -> None:
    """`Would discard 9 highest latency queries` of 201 (published results): its estimate is the largest of the rest."""
    samples = np.random.default_rng(0).permutation(queries).astype(float).tolist()
    assert early_stopping_bound(samples, 90) == sorted(samples)[-1 - discarded]


def test_too_few_samples_bound_nothing() -> None:
    assert early_stopping_bound([1.0] * 63, 90) is None
    assert early_stopping_bound([1.0] * 64, 90) == 1.0
    with pytest.raises(ValueError, match="100"):
        needed_samples(100)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """99 of 100 times the true percentile lies under it, on samples of a skewed distribution."""
    generator = np.random.default_rng(1)
    truth = -math.log(0.1)  # the 90th percentile of an exponential
    held = sum(early_stopping_bound(generator.exponential(1, 100).tolist(), 90) >= truth for _ in range(2000))
    assert held >= 0.985 * 2000
