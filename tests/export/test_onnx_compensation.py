"""Searched and compensated codes, against a plain double loop and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.export.compensate import output_error
from edgestill.export.onnx_compensation import compensate, damp, fit, search
from edgestill.export.onnx_schemes import Kind
from edgestill.grids import Affine, dequantise_affine, quantise_affine


def _case(rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of inputs that go together (as those of a network do)."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) * rng.lognormal(0, 1, columns)
    inputs = rng.standard_normal((400, columns)) @ mixing
    return rng.standard_normal((rows, columns)).astype(np.float32) * 0.05, inputs.T @ inputs / 400


def _plain(weight: np.ndarray, moment: np.ndarray, grid: Affine) -> np.ndarray:
    """GPTQ's own words, in float64 and one number at a time: quantise a column, spread its error over the columns that
    are left by the inverse of what is left of H (Frantar et al., equations 2 and 3)."""
    order = np.argsort(-np.diag(damp(moment)), kind="stable")
    codes = np.zeros(weight.shape, np.int64)
    for row in range(len(weight)):
        rest = weight[row].astype(np.float64)
        left = [int(k) for k in order]
        while left:
            inverse = np.linalg.inv(damp(moment)[np.ix_(left, left)])
            k = left[0]
            scale, zero = float(grid.scales[row, k // grid.block]), int(grid.zero_points[row, k // grid.block])
            codes[row, k] = min(max(round(rest[k] / scale) + zero, 0), (1 << grid.bits) - 1)
            wrong = (rest[k] - (codes[row, k] - zero) * scale) / inverse[0, 0]
            for index, other in enumerate(left):
                rest[other] -= wrong * inverse[0, index]
            left = left[1:]
    return codes


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
def test_compensation_against_a_double_loop(bits: int, symmetric: bool) -> None:
    weight, moment = _case()
    start = search(weight, bits=bits, block=32, symmetric=symmetric)
    got = compensate(weight, moment, start, sweeps=0)
    want = _plain(weight, moment, start)
    kept = (got.codes == start.codes).all(axis=1)  # rows in which the start was no worse
    same = (got.codes == want)[~kept]
    assert len(same) >= 10
    assert same.mean() > 0.995  # a code on the edge may fall to the other side in float32


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_row_is_worse_than_rounded_to_nearest(bits: int, symmetric: bool) -> None:
    weight, moment = _case(rows=40, columns=96, seed=1)
    start = search(weight, bits=bits, block=16, symmetric=symmetric, importance=np.diag(moment).astype(np.float32))
    damped = damp(moment)
    before = output_error(weight - dequantise_affine(start), damped)
    codes = compensate(weight, moment, start, sweeps=0)
    after = output_error(weight - dequantise_affine(codes), damped)
    better = output_error(weight - dequantise_affine(compensate(weight, moment, start)), damped)
    assert (after <= before).all()
    assert (better <= before).all()
    assert after.sum() < 0.5 * before.sum()
    assert better.sum() < after.sum()  # the sweeps find more
    np.testing.assert_array_equal(codes.scales, start.scales)


def test_inputs_that_do_not_go_together_leave_nothing_to_make_up_for() -> None:
    weight, _ = _case()
    start = search(weight, bits=4, block=32, symmetric=False)
    found = compensate(weight, np.diag(np.linspace(1, 2, 64)), start)
    np.testing.assert_array_equal(found.codes, start.codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_never_worse_than_the_whole_range(symmetric: bool) -> None:
    weight, _ = _case(rows=50)
    importance = np.linspace(0.1, 3, 64).astype(np.float32)
    found = search(weight, bits=4, block=32, symmetric=symmetric, importance=importance, half=False)
    whole = quantise_affine(weight, bits=4, block=32, symmetric=symmetric)

    def loss(grid: Affine) -> np.ndarray:
        wrong = (dequantise_affine(grid) - weight).reshape(50, 2, 32)
        return np.einsum("nbk,nbk,bk->nb", wrong, wrong, importance.reshape(2, 32))

    assert (loss(found) <= loss(whole) * 1.0001).all()
    assert loss(found).sum() < 0.97 * loss(whole).sum()


def test_scales_are_numbers_of_half_precision_where_that_costs_nothing() -> None:
    weight, _ = _case()
    kind = Kind("blocks", 8, half_scales=True)
    scales = fit(weight, kind, 32, None).scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    tiny = fit(weight * np.float32(1e-5), kind, 32, None)
    assert np.abs(tiny.scales / fit(weight, kind, 32, None).scales / 1e-5 - 1).max() < 1e-3
    assert (tiny.scales != tiny.scales.astype(np.float16)).any()


def test_zeros_stay_zeros_and_padding_is_no_input() -> None:
    weight, moment = _case(columns=48)
    padded = np.pad(weight, ((0, 0), (0, 16)))
    padded[3] = 0
    kind = Kind("blocks", 4, symmetric=False, fit="gptq", half_scales=True)
    decoded = dequantise_affine(fit(padded, kind, 32, moment.astype(np.float32)))
    assert (decoded[3] == 0).all()
    assert np.abs(decoded[:, :48] - padded[:, :48]).max() < 0.1


def test_the_same_twice() -> None:
    weight, moment = _case(rows=30)
    kind = Kind("blocks", 4, symmetric=False, fit="gptq", half_scales=True)
    first, second = (fit(weight, kind, 32, moment.astype(np.float32)) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
