"""The two-level model against least squares with a column a device, against closed forms, and on simulated devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import t

from edgestill.bench.points import DecodePoint, load_points
from edgestill.bench.predict_efficiency import PRIOR_DEVICES, fit_efficiency, leave_one_device_out, leave_one_out


def point(device: str, log_efficiency: float, bits: float = 8.0, kind: str = "cpu") -> DecodePoint:
    speed = math.exp(log_efficiency) * 100
    return DecodePoint(device, kind, device, "m", bits, 1e9, speed, 100e9, "s")


def dense(points: Sequence[DecodePoint]) -> tuple[float, float]:
    """Slope and residual variance by ordinary least squares with a dummy for each device."""
    names = sorted({p.device for p in points})
    x = np.zeros((len(points), len(names) + 1))
    for row, p in enumerate(points):
        x[row, names.index(p.device)] = 1
        x[row, -1] = math.log2(p.bits / 8)
    y = np.array([p.log_efficiency for p in points])
    beta, *_ = np.linalg.lstsq(x, y, rcond=None)
    return float(beta[-1]), float(((y - x @ beta) ** 2).sum() / (len(points) - len(names) - 1))


def test_slope_and_rest_equal_least_squares_with_a_column_for_each_device() -> None:
    model = fit_efficiency(load_points())
    slope, rest = dense(load_points())
    assert model.slope == pytest.approx(slope, rel=1e-9)
    assert model.rest_variance == pytest.approx(rest, rel=1e-9)


def test_an_unseen_device_gets_the_mean_of_its_kind_and_students_interval() -> None:
    """Balanced data without noise inside devices: everything has a closed form."""
    logs = [-0.9, -0.6, -0.3]
    points = [point(name, y) for name, y in zip("abc", logs, strict=True) for _ in range(2)]
    found = fit_efficiency(points).predict("z", "cpu", 8.0)
    assert found is not None
    variance = float(np.var(logs, ddof=1))  # the pooled one is the same: there is a single kind
    half = t.ppf(0.95, PRIOR_DEVICES + 2) * math.sqrt(variance * (1 + 1 / 3))
    assert found.value == pytest.approx(math.exp(np.mean(logs)))
    assert found.high == pytest.approx(math.exp(np.mean(logs) + half))
    assert found.low == pytest.approx(math.exp(np.mean(logs) - half))
    assert (found.fitted, found.points, found.devices) == (False, 6, 3)


def test_a_device_with_points_is_known_better_than_one_without() -> None:
    model = fit_efficiency(load_points())
    seen = model.predict("raspberry-pi-5-16gb", "cpu", 4.85)
    unseen = model.predict("never-measured", "cpu", 4.85)
    assert seen is not None
    assert unseen is not None
    assert seen.fitted
    assert not unseen.fitted
    assert seen.ends < unseen.ends / 1.3


def test_few_points_are_drawn_towards_the_kind() -> None:
    rng = np.random.default_rng(0)
    many = [point(name, y + e) for name, y in (("a", -0.8), ("b", -0.4)) for e in rng.normal(0, 0.1, 40)]
    model = fit_efficiency([*many, point("c", -2.0)])
    found = model.predict("c", "cpu", 8.0)
    assert found is not None
    assert -2.0 < math.log(found.value) < -1.3


def test_a_kind_of_one_device_borrows_the_spread_of_the_others() -> None:
    points = [point(name, y) for name, y in zip("abc", [-0.9, -0.6, -0.3], strict=True) for _ in range(2)]
    points += [point("n", -0.2, kind="npu"), point("n", -0.2, kind="npu")]
    model = fit_efficiency(points)
    assert model.predict("other", "npu", 8.0).ends > 1.5  # type: ignore[union-attr]
    assert model.predict("other", "gpu", 8.0) is None


def test_the_interval_of_an_unseen_device_covers_what_it_says() -> None:
    """300 worlds of 8 devices with known spread: the 90 % interval covers a ninth device's point in 86 to 95 %."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        devices = rng.normal(-0.6, 0.25, 9)
        points = [point(str(i), devices[i] + rng.normal(0, 0.08)) for i in range(8) for _ in range(3)]
        found = fit_efficiency(points).predict("new", "cpu", 8.0)
        assert found is not None
        covered += math.log(found.low) <= devices[8] + rng.normal(0, 0.08) <= math.log(found.high)
    assert 0.86 * 300 <= covered <= 0.95 * 300


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="two devices"):
        fit_efficiency([point("a", -1), point("a", -1)])
    with pytest.raises(ValueError, match="two devices"):
        fit_efficiency([point("a", -1), point("b", -1)])


def test_leaving_out_never_looks_at_what_is_left_out() -> None:
    """A point moved by a factor of ten changes the prediction of no fold that it is left out of."""
    points = list(load_points())
    model = fit_efficiency([p for p in points if p.soc != "bcm2712"])
    for found in leave_one_device_out(points):
        if found.point.device == "raspberry-pi-5-16gb":
            spread = model.predict(found.point.device, "cpu", found.point.bits)
            assert spread is not None
            assert found.error == pytest.approx(spread.value / math.exp(found.point.log_efficiency) - 1)
            assert found.covered == (spread.low <= math.exp(found.point.log_efficiency) <= spread.high)


def test_errors_are_what_the_documentation_says() -> None:
    points = load_points()
    given = [p for p in points if p.given]
    alone = leave_one_out(given)
    assert float(np.mean(np.abs(alone))) < 0.08
    assert len(alone) == 22
    unseen = leave_one_device_out(points)
    assert len(unseen) == len(points)
    assert np.mean([u.covered for u in unseen]) >= 0.85
    assert max(u.ends for u in unseen) <= 2.5
