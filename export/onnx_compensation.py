"""Codes that lose less than rounding to nearest does: each block's scale searched, each code's error made up for.

Both minimise the error that a matrix makes in its outputs, ``tr((W - V) H (W - V)^T)``, where ``H [K, K]`` is the
second moment of the inputs, ``mean(x x^T)`` over calibration text. :func:`search` looks at the diagonal of ``H`` only;
:func:`compensate` is GPTQ (Frantar et al. 2023, arXiv:2210.17323) with fixed blocks and the columns of largest input
first, followed by sweeps of coordinate descent on the codes (as QuantEase does: Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..grids import Affine, dequantise_affine
from .compensate import DAMPING, feed_back, output_error
from .onnx_schemes import Kind

__all__ = ["compensate", "damp", "fit", "in_half", "search"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Shares of a block's range that are tried: clipping its extremes pays where codes are few.
_SHRINKS = np.linspace(1.0, 0.6, 13)
_WHOLE = np.ones(1)  # with 256 codes it does not: 0.01 % of the squared error
_CHUNK = 1 << 16  # weights
_PANEL = 128  # columns whose updates are kept back and then applied at once: a matrix product instead of many


def fit(weight: Floats, kind: Kind, block: int, moment: Floats | None, *, most: float | None = None) -> Affine:
    """Codes for ``weight [N, K]``, ``K`` a multiple of ``block``, as ``kind.fit`` says; without a ``moment [k, k]``
    (``k <= K``, the rest is padding) the search alone. ``most`` is the largest magnitude of the tensor, where
    ``weight`` is some rows of it: without a moment, the codes of its parts are those of the whole."""
    wide = importance = None
    if moment is not None:
        wide = np.zeros((weight.shape[1],) * 2, np.float64)
        wide[: len(moment), : len(moment)] = moment
        importance = np.diag(wide).astype(np.float32)
    half = kind.half_scales and in_half(float(np.abs(weight).max(initial=0.0)) if most is None else most, kind)
    shrinks = _WHOLE if kind.bits == 8 or kind.fit == "nearest" else _SHRINKS
    found = search(
        weight, bits=kind.bits, block=block, symmetric=kind.symmetric, importance=importance, half=half, shrinks=shrinks
    )  # fmt: skip
    return found if wide is None else compensate(weight, wide, found)


def in_half(most: float, kind: Kind) -> bool:
    """Whether scales of a tensor with weights up to ``most`` are float16 numbers: where that moves no weight by more
    than half a step of the coarsest block."""
    return most / (1 << kind.bits) > 2**-18 and most < 60_000


def search(
    weight: Floats, *, bits: int, block: int, symmetric: bool, importance: Floats | None = None, half: bool = True,
    shrinks: npt.NDArray[np.floating] = _SHRINKS,
) -> Affine:  # fmt: skip
    """The best of several ranges a block: ``weight [N, K]`` (``K`` a multiple of ``block``) with the least squared
    error, each column weighted by ``importance [K]``. ``half``: scales are float16 numbers. ``shrinks`` are the shares
    of the whole range that are tried."""
    rows, columns = weight.shape
    weights = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    weights = np.maximum(weights / weights.mean(), 1e-6).reshape(columns // block, block)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // block), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    some = max(1, _CHUNK // columns)
    for first in range(0, rows, some):  # what is looked at over and over stays in the processor's cache
        at = slice(first, first + some)
        tiles = np.ascontiguousarray(weight[at], np.float32).reshape(-1, columns // block, block)
        codes[at], scales[at], zeros[at] = _search(tiles, weights, bits, symmetric, half, shrinks)
    return Affine(codes, scales, zeros, bits, block)


def _search(
    tiles: Floats, weights: Floats, bits: int, symmetric: bool, half: bool, shrinks: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.uint8], Floats, npt.NDArray[np.uint8]]:
    top, middle = (1 << bits) - 1, 1 << bits - 1
    low, high = np.minimum(tiles.min(axis=2), 0), np.maximum(tiles.max(axis=2), 0)
    extreme = np.where(-low >= high, low, high)
    best = np.full(low.shape, np.inf, np.float32)
    scales, zeros = np.zeros_like(low), np.full(low.shape, middle, np.float32)
    for shrink in shrinks:
        if symmetric:
            step, zero = extreme * np.float32(shrink / -middle), np.full_like(zeros, middle)
        else:
            step = (high - low) * np.float32(shrink / top)
            zero = np.clip(np.rint(-low * np.float32(shrink) * _inverse(step)), 0, top)
        step = _rounded(step, half)
        wrong = _codes(tiles, step, zero, top)
        wrong -= zero[..., None]
        wrong *= step[..., None]
        wrong -= tiles
        error = np.einsum("nbk,nbk,bk->nb", wrong, wrong, weights)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], step[better], zero[better]
    codes = _codes(tiles, scales, zeros, top).reshape(len(tiles), -1).astype(np.uint8)
    return codes, scales, zeros.astype(np.uint8)


def _codes(tiles: Floats, step: Floats, zero: Floats, top: int) -> Floats:
    codes = tiles * _inverse(step)[..., None]
    np.rint(codes, out=codes)
    codes += zero[..., None]
    return np.clip(codes, 0, top, out=codes)


def compensate(weight: Floats, moment: Doubles, start: Affine, *, sweeps: int = 3) -> Affine:
    """Other codes on the grid ``start`` of ``weight [N, K]``, so that errors cancel in the outputs.

    ``moment [K, K]`` is the second moment of the inputs. No row is ever worse than in ``start``, by
    :func:`.compensate.output_error` with the damped moment (1 % of the mean diagonal is added, so that directions
    that the text never shows are not free).
    """
    damped = damp(moment)
    order = np.argsort(-np.diag(damped), kind="stable")
    inverse = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T.astype(np.float32)
    scales = np.repeat(start.scales, start.block, axis=1)[:, order]
    zeros = np.repeat(start.zero_points.astype(np.float32), start.block, axis=1)[:, order]
    top = (1 << start.bits) - 1
    steps = _inverse(scales)
    left = np.ascontiguousarray(weight[:, order].T, np.float32)
    codes = np.empty_like(left).T

    def rounded(k: int) -> Floats:
        codes[:, k] = np.clip(np.rint(left[k] * steps[:, k]) + zeros[:, k], 0, top)
        decoded: Floats = (codes[:, k] - zeros[:, k]) * scales[:, k]
        return decoded

    feed_back(left, inverse, rounded, panel=_PANEL)
    moment32 = damped[np.ix_(order, order)].astype(np.float32)
    codes = _descend(weight[:, order].astype(np.float32), codes, scales, zeros, steps, moment32, top, sweeps)
    found = np.empty(codes.shape, np.uint8)
    found[:, order] = codes.astype(np.uint8)
    new = Affine(found, start.scales, start.zero_points, start.bits, start.block)
    before, after = (output_error(weight - dequantise_affine(grid), damped) for grid in (start, new))
    worse = after > before
    found[worse] = start.codes[worse]
    return new


def damp(moment: Doubles) -> Doubles:
    """``moment`` with 1 % of its mean diagonal added, symmetric and positive."""
    mean = float(np.diag(moment).mean()) or 1.0
    return np.asarray((moment + moment.T) / 2 + np.eye(len(moment)) * mean * DAMPING, np.float64)


def _descend(
    weight: Floats, codes: Floats, scales: Floats, zeros: Floats, steps: Floats, moment: Floats, top: int, sweeps: int
) -> Floats:
    """Each code in turn set to the best one while the others stay, ``sweeps`` times."""
    diagonal = np.diag(moment)
    columns = weight.shape[1]
    wrong = (codes - zeros) * scales - weight
    for _ in range(sweeps):
        for first in range(0, columns, _PANEL):
            last = min(first + _PANEL, columns)
            slopes = wrong @ moment[:, first:last]
            inner = moment[first:last, first:last]
            for k in range(first, last):
                target = weight[:, k] + wrong[:, k] - slopes[:, k - first] / diagonal[k]
                code = np.clip(np.rint(target * steps[:, k]) + zeros[:, k], 0, top)
                change = (code - codes[:, k]) * scales[:, k]
                codes[:, k] = code
                wrong[:, k] += change
                slopes[:, k - first :] += change[:, None] * inner[k - first, k - first :]
    return codes


def _inverse(steps: Floats) -> Floats:
    return np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)


def _rounded(scales: Floats, half: bool) -> Floats:
    return scales.astype(np.float16).astype(np.float32) if half else scales
