"""Core ML's grids against loops, the optimum of k-means, and their own promises."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.coreml_grids import (
    cluster,
    dequantise_blocks,
    dequantise_palette,
    largest_weights,
    quantise_blocks,
    quantise_palette,
)

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_t(4, size=(24, 96)).astype(np.float32) * 0.1


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (4, 32), (4, 16)])
def test_blocks_mean_code_times_scale(bits: int, block: int) -> None:
    grid = quantise_blocks(WEIGHT, bits=bits, block=block)
    assert grid is not None
    width, got = block or 96, dequantise_blocks(grid)
    for row in range(24):
        for column in range(96):
            scale = float(grid.scales[row, column // width])
            assert got[row, column] == np.float32(int(grid.codes[row, column]) * scale)
            peak = np.abs(WEIGHT[row, column // width * width :][:width]).max()
            assert abs(got[row, column] - WEIGHT[row, column]) <= 1.001 * peak / ((1 << (bits - 1)) - 1)
    assert grid.codes.min() >= -(1 << (bits - 1))
    assert grid.codes.max() < 1 << (bits - 1)


def test_eight_bits_round_to_nearest_and_clip_nothing() -> None:
    grid = quantise_blocks(WEIGHT, bits=8)
    assert grid is not None
    assert (np.abs(dequantise_blocks(grid) - WEIGHT) <= grid.scales.astype(np.float32) * 0.501).all()


def test_four_bits_beat_the_plain_scale() -> None:
    """The scale is searched for: the error is below that of max|w| / 7, rounded."""
    grid = quantise_blocks(WEIGHT, bits=4, block=32)
    assert grid is not None
    tiles = WEIGHT.reshape(24, 3, 32)
    step = np.abs(tiles).max(2, keepdims=True) / 7
    plain = np.square(np.rint(tiles / step) * step - tiles).sum()
    assert np.square(dequantise_blocks(grid) - WEIGHT).sum() < 0.95 * plain


def test_scales_that_float16_can_not_hold_are_refused() -> None:
    small = WEIGHT.copy()
    small[3] *= 1e-4 / np.abs(small[3]).max()
    assert quantise_blocks(small, bits=8) is None
    small[3] = 0
    grid = quantise_blocks(small, bits=8)
    assert grid is not None
    assert not dequantise_blocks(grid)[3].any()


@pytest.mark.parametrize(("bits", "limit"), [(2, 1.001), (3, 1.01), (4, 1.03), (6, 1.05)])
def test_clusters_are_nearly_the_best_there_are(bits: int, limit: float) -> None:
    """Against exact one-dimensional k-means (dynamic programming, in coremltools)."""
    from coremltools._deps import _kmeans1d

    values = np.unique(RNG.standard_t(4, size=2000).astype(np.float16)).astype(np.float32)
    centres = cluster(values, np.ones(len(values)), 1 << bits)
    assert (np.diff(centres) > 0).all()
    best = _kmeans1d.cluster(values.astype(np.float64), 1 << bits)
    least = np.square(np.asarray(best.centroids)[best.clusters] - values).sum()
    assert np.square(np.abs(values[:, None] - centres).min(1)).sum() <= limit * least


def test_counts_weigh_and_few_values_are_kept() -> None:
    few = np.array([-1.0, 0.5, 2.0], np.float32)
    np.testing.assert_array_equal(cluster(few, np.ones(3), 4), [-1, 0.5, 2, 2])
    np.testing.assert_allclose(cluster(few, np.array([1.0, 1.0, 100.0]), 2), [-0.25, 2])
    assert not cluster(few[:0], np.ones(0), 4).any()


@pytest.mark.parametrize(("bits", "group"), [(2, 0), (4, 8), (8, 0)])
def test_palette_gives_each_weight_its_nearest_value(bits: int, group: int) -> None:
    grid = quantise_palette(WEIGHT, bits=bits, group=group)
    tall, got = group or 24, dequantise_palette(grid)
    assert grid.tables.shape == (24 // tall, 1 << bits)
    for row in range(24):
        table = grid.tables[row // tall].astype(np.float32)
        np.testing.assert_array_equal(got[row], table[grid.codes[row]])
        half = WEIGHT[row].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(np.abs(got[row] - half), np.abs(table[:, None] - half).min(0))
    again = quantise_palette(WEIGHT.copy(), bits=bits, group=group)
    np.testing.assert_array_equal(grid.tables, again.tables)


@pytest.mark.parametrize("percent", [1, 37, 50, 99])
def test_the_smallest_weights_are_dropped(percent: int) -> None:
    mask = largest_weights(WEIGHT, percent)
    assert (~mask).sum() == WEIGHT.size * percent // 100
    half = np.abs(WEIGHT).astype(np.float16)
    assert half[mask].min() >= half[~mask].max()


def test_equal_weights_are_dropped_from_the_front() -> None:
    np.testing.assert_array_equal(largest_weights(np.ones((2, 4), np.float32), 50), [[0] * 4, [1] * 4])
    assert largest_weights(np.zeros((2, 4), np.float32), 25).sum() == 6


@pytest.mark.parametrize("palette", [True, False])
def test_masked_weights_do_not_count(palette: bool) -> None:
    mask = largest_weights(WEIGHT, 50)
    loud = np.where(mask, WEIGHT, np.float32(50))
    one = quantise_palette(loud, bits=4, mask=mask) if palette else quantise_blocks(loud, bits=8, mask=mask)
    assert one is not None
    assert not one.codes[~mask].any()
    got = dequantise_palette(one) if palette else dequantise_blocks(one)  # type: ignore[arg-type]
    assert np.abs(got[mask]).max() <= np.abs(WEIGHT).max() * 1.001
