from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from edgestill.bench.statistics import (
    bootstrap_interval,
    ratio_interval,
    student_interval,
    summarise,
    supported_percentiles,
)


def test_the_interval_of_a_mean_agrees_with_student_t() -> None:
    samples = np.random.default_rng(1).normal(10, 2, size=200)
    low, high = bootstrap_interval(samples, "mean", resamples=4000)
    expected = stats.t.interval(0.95, 199, loc=samples.mean(), scale=stats.sem(samples))
    assert (low, high) == pytest.approx(expected, abs=0.04)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.normal(0, 1, size=12), "mean", resamples=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_whole_groups_are_resampled() -> None:
    # 20 windows of 50 equal tokens: 1000 rows, but only 20 independent values.
    level = np.random.default_rng(3).normal(size=20)
    samples, groups = np.repeat(level, 50), np.repeat(np.arange(20), 50)
    naive = np.subtract(*bootstrap_interval(samples, "mean")[::-1])
    clustered = np.subtract(*bootstrap_interval(samples, "mean", groups=groups)[::-1])
    alone = np.subtract(*bootstrap_interval(level, "mean")[::-1])
    assert clustered == pytest.approx(alone, rel=1e-9)
    assert clustered > 5 * naive


def test_groups_may_be_unequal_and_in_any_order() -> None:
    generator = np.random.default_rng(4)
    samples, groups = generator.normal(5, 1, 103), generator.integers(12, size=103)
    order = generator.permutation(103)
    one = bootstrap_interval(samples, "mean", groups=groups)
    other = bootstrap_interval(samples[order], "mean", groups=groups[order])
    assert one == pytest.approx(other, rel=1e-12)
    assert one[0] < samples.mean() < one[1]


def test_a_function_of_columns_is_a_statistic() -> None:
    generator = np.random.default_rng(5)
    table = np.stack([generator.normal(2, 0.1, 400), generator.normal(1, 0.1, 400)], axis=1)
    low, high = bootstrap_interval(table, lambda x: x[..., 0].mean(axis=1) / x[..., 1].mean(axis=1))
    assert low < 2 < high
    assert high - low < 0.1


def test_same_seed_same_interval() -> None:
    samples = np.arange(50.0)
    assert bootstrap_interval(samples, "mean", seed=7) == bootstrap_interval(samples, "mean", seed=7)
    assert bootstrap_interval(samples, "mean", seed=7) != bootstrap_interval(samples, "mean", seed=8)


def test_one_sample_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_interval([1.0], "mean")


@pytest.mark.parametrize(("n", "expected"), [(0, ()), (28, ()), (29, (90,)), (58, (90,)), (59, (90, 95)),
                                             (298, (90, 95)), (299, (90, 95, 99))])  # fmt: skip
def test_supported_percentiles(n: int, expected: tuple[int, ...]) -> None:
    assert supported_percentiles(n) == expected


def test_summary_keeps_only_supported_percentiles() -> None:
    few = summarise([list(range(10)), list(range(10))])
    many = summarise([list(range(15)), list(range(15))])
    assert few.percentiles == {}
    assert many.percentiles == {"p90": 13.0}
    assert (few.value, few.n) == (4.5, 20)
    assert few.low is not None
    assert few.high is not None
    assert few.low <= 4.5 <= few.high


def test_the_summary_sees_the_spread_between_launches() -> None:
    generator = np.random.default_rng(6)
    launches = [list(generator.normal(center, 0.01, 30)) for center in (9, 10, 11)]
    summary = summarise(launches)
    assert summary.low is not None
    assert summary.high is not None
    assert summary.low < 9.1
    assert summary.high > 10.9


# Launches that differ among themselves more, as much, and less than their samples do: logarithms, the truth is 0.
NOISES = {
    "launches differ": lambda g, k, m: g.normal(0, 0.02, (k, 1)) + g.normal(0, 0.002, (k, m)),
    "both": lambda g, k, m: g.normal(0, 0.02, (k, 1)) + g.normal(0, 0.02, (k, m)),
    "samples differ": lambda g, k, m: g.normal(0, 0.002, (k, 1)) + g.normal(0, 0.05, (k, m)),
}


@pytest.mark.parametrize("launches", [3, 5, 10])
@pytest.mark.parametrize("noise", NOISES)
def test_the_interval_of_few_launches_covers_the_truth(noise, launches):
    """At least 93 of 100 (95, less the error of 800 trials), and not 100: the interval is no wider than it must be."""
    generator, trials = np.random.default_rng(launches), 800
    hits = 0
    for _ in range(trials):
        taken = 10 * np.exp(NOISES[noise](generator, launches, 9))
        summary = summarise([list(launch) for launch in taken])
        assert summary.low <= summary.value <= summary.high
        hits += summary.low <= 10 <= summary.high
    assert 0.93 <= hits / trials <= 0.98


def test_the_interval_over_launches_is_students_of_their_logarithms():
    launches = [[1.0, 2.0, 9.0], [2.5], [3.0, 4.0]]
    logs = np.log([2.0, 2.5, 3.5])
    expected = np.exp(stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs)))
    found = summarise(launches)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.value == 2.75
    means = summarise([[0.0, 2.0], [3.0], [-1.0]], "mean")  # not all positive: as they are
    expected = stats.t.interval(0.95, 2, loc=1, scale=stats.sem([1, 3, -1]))
    assert (means.low, means.high) == pytest.approx(expected)
    assert student_interval([4.0, 4.0]) == (4.0, 0.0)


def test_one_launch_speaks_of_its_own_median():
    """scipy's binomial interval of the median: the samples between which it lies, whatever their distribution."""
    values = list(np.random.default_rng(8).exponential(1, 40))
    found = summarise([values])
    left_out = int(stats.binom.ppf(0.025, 40, 0.5))
    assert (found.low, found.high) == (sorted(values)[left_out - 1], sorted(values)[40 - left_out])
    assert summarise([values[:5]]).low is None  # the range of five holds it in 93.75 of 100
    assert (summarise([values[:6]]).low, summarise([values[:6]]).high) == (min(values[:6]), max(values[:6]))
    logs = np.log([1, 2, 3])
    low, _ = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert summarise([[1.0, 2.0, 3.0]], "mean").low == pytest.approx(np.exp(low))


def test_exact_and_max_have_no_interval() -> None:
    assert summarise([[7.0], [7.0]], "exact").low is None
    assert summarise([[1.0, 3.0], [2.0]], "max").value == 3.0
    with pytest.raises(ValueError, match="differ"):
        summarise([[7.0], [8.0]], "exact")
    with pytest.raises(ValueError, match="no samples"):
        summarise([[], []])
    with pytest.raises(ValueError, match="NaN"):
        summarise([[float("nan")]])


def test_pairing_cancels_slow_phases_of_the_machine() -> None:
    generator = np.random.default_rng(7)
    drift = [1.0, 1.5, 0.8, 1.2, 2.0]
    a = [list(2 * d * generator.normal(1, 0.01, 30)) for d in drift]
    b = [list(d * generator.normal(1, 0.01, 30)) for d in drift]
    paired = ratio_interval(a, b, statistic="mean")
    apart = ratio_interval(a, b, statistic="mean", paired=False)
    assert paired.low < 2 < paired.high
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)


def test_ratio_of_unequal_launches_agrees_with_a_loop() -> None:
    generator = np.random.default_rng(9)
    a = [list(generator.normal(2, 0.3, n)) for n in (20, 25, 30, 28)]
    b = [list(generator.normal(1, 0.2, n)) for n in (30, 22, 26, 24)]
    drawn = []
    for _ in range(4000):
        launches = generator.integers(4, size=4)
        over = [generator.choice(a[i], 30) for i in launches]
        under = [generator.choice(b[i], 30) for i in launches]
        drawn.append(np.median(np.concatenate(over)) / np.median(np.concatenate(under)))
    tail = stats.norm.cdf(np.sqrt(4 / 3) * stats.t.ppf(0.025, 3))
    found = ratio_interval(a, b, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])), abs=0.04)
    assert found.value == pytest.approx(np.median(np.concatenate(a)) / np.median(np.concatenate(b)))
