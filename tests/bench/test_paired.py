"""The statistic that decides, against scipy's tests and against what it promises: few false alarms, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgestill.bench.paired import half_width, launch_value, noise_floor, paired_ratio


def launches(values: list[float], seed: int = 0) -> list[list[float]]:
    """One launch a value: twenty samples, never below it by much, often far above."""
    generator = np.random.default_rng(seed)
    return [[value * (1 + x) for x in generator.exponential(0.05, 20)] for value in values]


def test_the_interval_is_students_on_log_ratios() -> None:
    generator = np.random.default_rng(1)
    a, b = ([[float(x)] for x in generator.normal(10, 0.3, 6)] for _ in range(2))
    found = paired_ratio(a, b, level=0.95)
    logs = [math.log(x[0] / y[0]) for x, y in zip(a, b, strict=True)]
    wanted = stats.t.interval(0.95, 5, loc=np.mean(logs), scale=stats.sem(logs))
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(wanted)))
    assert found.value == pytest.approx(math.exp(np.mean(logs)))
    assert half_width(found) == pytest.approx(math.exp((wanted[1] - wanted[0]) / 2) - 1)


def test_unequal_launches_are_welchs() -> None:
    generator = np.random.default_rng(2)
    a, b = ([[float(x)] for x in generator.normal(10, spread, n)] for spread, n in ((0.3, 4), (0.1, 9)))
    found = paired_ratio(a, b, level=0.95)
    wanted = stats.ttest_ind(np.log(a).ravel(), np.log(b).ravel(), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(wanted.low), math.exp(wanted.high)))


def test_an_interrupted_machine_does_not_move_a_launch() -> None:
    """Two of three samples were interrupted, by far more than what is looked for."""
    calm = [1.0, 1.01, 1.02, 1.005, 1.015] * 4
    assert launch_value(calm + [30.0] * 40, "lower") == pytest.approx(launch_value(calm, "lower"), rel=0.02)
    assert launch_value([1 / x for x in calm + [30.0] * 40], "higher") == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("a", "b", "text"), [
    ([[1.0]], [[1.0], [1.0]], "at least 2"), ([[1.0], []], [[1.0], [1.0]], "without samples"),
    ([[1.0], [0.0]], [[1.0], [1.0]], "positive"), ([[1.0], [math.nan]], [[1.0], [1.0]], "finite"),
])  # fmt: skip
def test_what_has_no_ratio_is_refused(a: list[list[float]], b: list[list[float]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        paired_ratio(a, b)


def test_a_false_alarm_is_as_rare_as_it_says() -> None:
    """Launches that differ by 2 % for no reason: the interval holds 1 in 99 of 100 cases, whatever their number."""
    generator = np.random.default_rng(3)
    for count in (3, 5, 10):
        alarms = 0
        for _ in range(500):
            a, b = (np.exp(generator.normal(0, 0.02, (count, 1))).tolist() for _ in range(2))
            found = paired_ratio(a, b)
            alarms += found.low > 1 or found.high < 1
        assert alarms <= 13, count  # binomial(500, 0.01): more in 1 of 1000


def test_noise_floor_is_small_for_a_steady_machine_and_large_for_a_busy_one() -> None:
    steady = noise_floor(launches([1.0, 1.001, 0.999]), launches([1.0, 1.001, 0.999], 1))
    busy = noise_floor(launches([1.0, 1.3, 0.8]), launches([0.9, 1.0, 1.2], 1))
    assert 0 < steady < 0.03
    assert busy > 0.2


def rule(effect: float, spread: float, seed: int) -> bool:
    """One comparison by the bench's own rule, on launches with log-normal noise: is the subject called different?"""
    for count in range(5, 25):  # as `normal` does
        noise = np.exp(np.random.default_rng(seed).normal(0, spread, (24, 3)))[:count]
        base, again, subject = noise[:, :1].tolist(), noise[:, 1:2].tolist(), (noise[:, 2:] * (1 + effect)).tolist()
        found = paired_ratio(subject, base)
        if max(half_width(found), half_width(paired_ratio(again, base))) <= 0.025:
            break
    floor = noise_floor(base, again)
    apart = found.low > 1 or found.high < 1
    return bool(apart and (found.value > 1 + floor or found.value < 1 / (1 + floor)))


@pytest.mark.parametrize("spread", [0.005, 0.014])
def test_five_per_cent_are_found_and_nothing_is_not(spread: float) -> None:
    """Noise of 0.7 % and 2 % between two launches side by side."""
    assert sum(rule(0.05, spread, seed) for seed in range(40)) >= 38
    assert sum(rule(0.0, spread, seed) for seed in range(80)) <= 3
