"""Compensated rounding: legal blocks, the documented error, and less of it than llama.cpp's own rounding leaves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgestill.errors import Unsupported
from edgestill.export.compensate import compensate, feed_back, output_error, spread
from edgestill.export.compensate_ggml import ENCODABLE, encode_ggml, layout_of
from edgestill.export.compensate_ggml_pack import pack
from edgestill.export.compensate_scales import fit_affine, fit_symmetric
from edgestill.grids import dequantise, ggml_grid, quantise

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def problem() -> tuple[Floats, npt.NDArray[np.float64]]:
    """A weight, and the moments of inputs that go together, as those of a model do."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((48, 512)) * 0.1 + 0.01).astype(np.float32)
    inputs = rng.standard_normal((2000, 100)) @ rng.standard_normal((100, 512)) + 0.3 * rng.standard_normal((2000, 512))
    inputs *= np.exp(rng.standard_normal(512) / 2)
    return weight, inputs.T @ inputs / len(inputs)


def _loss(weight: Floats, stored: Floats, hessian: npt.NDArray[np.float64]) -> float:
    return float(output_error(stored - weight, hessian).sum() / output_error(weight, hessian).sum())


@pytest.mark.parametrize("grid", ENCODABLE)
def test_bytes_decode_to_what_was_rounded(grid: str, problem: tuple[Floats, npt.NDArray[np.float64]]) -> None:
    """The independent reading is the decoder, which is bit-equal to llama.cpp's."""
    weight, hessian = problem
    done = compensate(weight, hessian, layout_of(grid))
    stored = pack(grid, done.blocks)
    assert stored.shape == (48, 512 // ggml_grid(grid).elements * ggml_grid(grid).size_bytes)
    np.testing.assert_array_equal(dequantise(grid, stored, weight.shape), done.decoded)


@pytest.mark.parametrize("grid", ENCODABLE)
def test_outputs_change_less_than_by_weighted_rounding(
    grid: str, problem: tuple[Floats, npt.NDArray[np.float64]]
) -> None:
    weight, hessian = problem
    with_it = dequantise(grid, encode_ggml(grid, weight, hessian), weight.shape)
    without = dequantise(grid, encode_ggml(grid, weight, np.diag(np.diag(hessian))), weight.shape)
    assert _loss(weight, with_it, hessian) < 0.5 * _loss(weight, without, hessian)


@pytest.mark.parametrize("grid", ENCODABLE)
def test_outputs_change_less_than_by_llama_cpps_quantiser(
    grid: str, problem: tuple[Floats, npt.NDArray[np.float64]]
) -> None:
    ggml_api = pytest.importorskip("edgestill.runtimes.ggml_api")
    weight, hessian = problem
    theirs = ggml_api.quantise_rows(grid, weight, np.diag(hessian).astype(np.float32))
    ours = dequantise(grid, encode_ggml(grid, weight, hessian), weight.shape)
    assert _loss(weight, ours, hessian) < 0.6 * _loss(weight, dequantise(grid, theirs, weight.shape), hessian)


def test_what_lies_on_the_grid_already_is_kept() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    on_grid = dequantise("q8_0", quantise("q8_0", weight), weight.shape)
    moment = np.eye(64) + 0.5
    np.testing.assert_allclose(
        dequantise("q8_0", encode_ggml("q8_0", on_grid, moment), weight.shape), on_grid, rtol=1e-3
    )


def test_errors_are_spread_as_least_squares_says() -> None:
    """Two columns, one of them free: the best second weight, once the first is rounded, is a closed form."""
    hessian = np.array([[2.0, 0.8], [0.8, 1.0]])
    upper = spread(hessian, damping=0.0)
    error = 0.3  # of the first column
    best = error * hessian[0, 1] / hessian[1, 1]  # minimises (e, d) H (e, d)^T over d = -best
    # compensate() takes error / upper[0, 0] * upper[0, 1] off the second column
    assert -upper[0, 1] / upper[0, 0] * error == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("panel", [1, 5, 16])
def test_feeding_back_in_panels_is_what_a_double_loop_does(panel: int) -> None:
    """In float64: each column's error, over the diagonal, times the rest of its row of the factor."""
    chooser = np.random.default_rng(3)
    inputs = chooser.normal(size=(64, 16)) @ chooser.normal(size=(16, 16))
    upper, weight = spread(inputs.T @ inputs / 64), chooser.normal(size=(16, 7)).astype(np.float32)
    left, got = weight.copy(), np.empty_like(weight)

    def rounded(column: int) -> Floats:
        got[column] = np.rint(left[column] * 4) / 4
        return got[column]

    feed_back(left, upper, rounded, panel=panel)
    rest, want = weight.astype(np.float64), np.empty((16, 7))
    for column in range(16):
        want[column] = np.rint(rest[column] * 4) / 4
        for other in range(column + 1, 16):
            rest[other] -= float(upper[column, other]) * (rest[column] - want[column]) / float(upper[column, column])
    np.testing.assert_array_equal(got, want)


def test_nothing_and_dead_columns_are_no_trouble() -> None:
    weight = np.zeros((3, 256), np.float32)
    moment = np.zeros((256, 256))
    for grid in ENCODABLE:
        assert not dequantise(grid, encode_ggml(grid, weight, moment), weight.shape).any()
    weight[1, 5] = 1e-30
    weight[2] = 3e5  # beyond float16
    for grid in ENCODABLE:
        assert np.isfinite(dequantise(grid, encode_ggml(grid, weight, moment), weight.shape)).all(), grid


def test_scales_are_near_the_best_of_a_fine_search() -> None:
    rng = np.random.default_rng(2)
    tile = rng.standard_normal((32, 6)).astype(np.float32)
    weight = rng.uniform(0.1, 3, 32).astype(np.float32)
    levels = np.arange(-8, 8, dtype=np.float32)

    def error(step: Floats, offset: Floats | float, low: int, high: int) -> Floats:
        codes = np.clip(np.rint((tile + offset) / step), low, high)
        return np.asarray((weight[:, None] * (step * codes - offset - tile) ** 2).sum(axis=0))

    fine = np.min([error(np.full(6, s, np.float32), 0.0, -8, 7) for s in np.linspace(-0.6, 0.6, 4001) if s], axis=0)
    assert (error(fit_symmetric(tile, weight, levels), 0.0, -8, 7) <= 1.10 * fine).all()
    step, offset = fit_affine(tile, weight, 15)
    assert (error(step, offset, 0, 15) <= error((tile.max(0) - tile.min(0)) / 15, -tile.min(0), 0, 15)).all()
    _, offset = fit_affine(tile + 9, weight, 15, lowest=0.0)
    assert (offset >= 0).all()


def test_other_types_are_refused() -> None:
    with pytest.raises(Unsupported, match="no compensating quantiser for 'f16'"):
        encode_ggml("f16", np.zeros((1, 32), np.float32), np.eye(32))
