"""Rounding to float16 against numpy's own conversion."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.runtimes.mil.half import round_half


def _numpy(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def test_every_float16_and_its_neighbours() -> None:
    exact = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = exact[np.isfinite(exact)]
    with np.errstate(over="ignore"):
        middle = np.sort(finite)
        halves = (middle[1:] + middle[:-1]) / 2
    for values in (finite, np.nextafter(finite, np.inf), np.nextafter(finite, -np.inf), halves,
                   np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf)):  # fmt: skip
        got = values.astype(np.float32).copy()
        round_half(got)
        want = _numpy(values.astype(np.float32))
        assert np.array_equal(got, want)
        assert np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-3, 1.0, 1e4, 1e6])
def test_random_bits(scale: float) -> None:
    x = (np.random.default_rng(1).normal(size=(300, 400)) * scale).astype(np.float32)
    want = _numpy(x)
    peak = round_half(x)
    assert np.array_equal(x, want)
    assert peak == np.abs(want).max()


def test_infinities_nan_overflow_and_views() -> None:
    x = np.array([np.inf, -np.inf, 65519.0, 65520.0, -1e30, 0.0, -0.0], np.float32)
    want = _numpy(x)
    assert round_half(x) == np.inf
    assert np.array_equal(x, want)
    nan = np.array([0x7FFFFFFF, 0xFF800001, 0x7F800001], np.uint32).view(np.float32).copy()
    assert np.isnan(round_half(nan))
    assert np.isnan(nan).all()
    grid = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
    view = grid.T[1:3]
    want = _numpy(view.copy())
    round_half(view)
    assert np.array_equal(grid.T[1:3], want)
    assert round_half(np.zeros(0, np.float32)) == 0
