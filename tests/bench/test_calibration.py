"""ECE and the reliability curve, against loops that one can read."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.bench.calibration import BINS, assign_bins, reliability


def sample(n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    confidence = rng.beta(4, 1.5, n)
    return confidence, rng.random(n) < confidence**2  # too sure of itself


def test_equal_width_equals_a_double_loop() -> None:
    confidence, right = sample()
    counts, means, hits, error = [], [], [], 0.0
    for b in range(BINS):
        inside = [i for i, c in enumerate(confidence) if b / BINS <= c < (b + 1) / BINS]
        if inside:
            mean = sum(confidence[i] for i in inside) / len(inside)
            hit = sum(bool(right[i]) for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(mean - hit)
            counts.append(len(inside))
            means.append(mean)
            hits.append(hit)
    curve = reliability(confidence, right)
    assert curve.counts == tuple(counts)
    assert curve.confidence == pytest.approx(means)
    assert curve.accuracy == pytest.approx(hits)
    assert curve.error == pytest.approx(error)
    assert error > 0.1


def test_equal_mass_equals_a_double_loop() -> None:
    confidence, right = sample(502)
    order = sorted(range(502), key=lambda i: confidence[i])
    groups: list[list[int]] = [[] for _ in range(BINS)]
    for rank, i in enumerate(order):
        groups[rank * BINS // 502].append(i)
    error = sum(
        len(group) / 502 * abs(np.mean([confidence[i] for i in group]) - np.mean([right[i] for i in group]))
        for group in groups
    )
    curve = reliability(confidence, right, scheme="equal_mass")
    assert curve.counts == tuple(len(group) for group in groups)
    assert max(curve.counts) - min(curve.counts) <= 1
    assert curve.error == pytest.approx(error)
    assert list(curve.confidence) == sorted(curve.confidence)


def test_the_order_of_examples_changes_nothing_even_with_ties() -> None:
    confidence, right = sample()
    confidence = np.round(confidence, 1)
    shuffled = np.random.default_rng(0).permutation(len(confidence))
    for scheme in ("equal_width", "equal_mass"):
        a = reliability(confidence, right, scheme=scheme)
        b = reliability(confidence[shuffled], right[shuffled], scheme=scheme)
        assert a.counts == b.counts
        assert a.error == pytest.approx(b.error)


def test_who_is_as_sure_as_he_is_right_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.75], 400)
    right = np.tile([1, 0, 0, 0], 100).tolist() + np.tile([1, 1, 1, 0], 100).tolist()
    for scheme in ("equal_width", "equal_mass"):
        assert reliability(confidence, np.array(right), scheme=scheme).error == pytest.approx(0)


def test_the_edges_are_inside() -> None:
    assert assign_bins(np.array([0.0, 1.0]), 10).tolist() == [0, 9]
    assert reliability(np.array([1.0]), np.array([True])).error == 0


@pytest.mark.parametrize(
    ("confidence", "right"), [([], []), ([0.5], [1, 0]), ([float("nan")], [1]), ([1.5], [1]), ([-0.1], [0])]
)
def test_nonsense_is_refused(confidence: list[float], right: list[int]) -> None:
    with pytest.raises(ValueError, match="confidence"):
        reliability(np.array(confidence), np.array(right))
