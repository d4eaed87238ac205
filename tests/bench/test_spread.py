"""Mean, t-interval and winner over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from edgestill.bench.spread import find_winner, spread


def test_the_interval_is_that_of_scipy() -> None:
    values = [0.31, 0.28, 0.36, 0.30]
    found = spread(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean, found.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_it_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [spread(row) for row in rng.normal(5, 2, (2000, 3)).tolist()]
    covered = np.mean([s.low < 5 < s.high for s in found if s.low is not None and s.high is not None])
    assert 0.935 < covered < 0.965


def test_a_single_seed_has_no_interval() -> None:
    found = spread([0.5])
    assert (found.mean, found.sd, found.low, found.high) == (0.5, None, None, None)


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0]])
def test_nothing_and_nan_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        spread(values)


def test_a_winner_only_where_intervals_separate() -> None:
    apart = {"a": spread([0.10, 0.11, 0.12]), "b": spread([0.50, 0.51, 0.52]), "c": spread([0.90, 0.91, 0.92])}
    assert find_winner(apart, "lower").name == "a"
    assert find_winner(apart, "higher").name == "c"
    near = {**apart, "d": spread([0.11, 0.13, 0.12])}
    assert find_winner(near, "lower").name is None
    assert "overlap" in find_winner(near, "lower").reason
    assert find_winner(near, "higher").name == "c"


def test_a_noisy_loser_hides_the_winner() -> None:
    """The third is worst on average, but one of its seeds was as good as the best."""
    spreads = {"a": spread([0.10, 0.11]), "b": spread([0.50, 0.51]), "c": spread([0.10, 1.90])}
    assert find_winner(spreads, "lower").name is None


def test_who_never_wins() -> None:
    assert "one seed" in find_winner({"a": spread([0.1]), "b": spread([0.9])}, "lower").reason
    same = {"a": spread([0.1, 0.1]), "b": spread([0.9, 0.9])}
    assert find_winner(same, "lower").name is None
    assert "the seed changes neither" in find_winner(same, "lower").reason
    assert find_winner({"a": spread([0.1, 0.2])}, "lower").name is None
