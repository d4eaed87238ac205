"""The scale of a few numbers that are to be rounded: searched, with a least-squares step, for the least weighted error.

All arrays have the numbers first and the rows last, ``[count, rows]``: each step is one pass over rows side by side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..ggml_grids import IQ4_VALUES

__all__ = ["fit_affine", "fit_symmetric", "nearest_code"]

Floats = npt.NDArray[np.float32]

# Scales that are tried, as a share of the one that just reaches the extreme: few levels gain by clipping it.
_FEW_LEVELS = np.array([0.78, 0.82, 0.86, 0.9, 0.93, 0.96, 0.98, 1.0, 1.03, 1.07], np.float32)
_MANY_LEVELS = np.array([0.92, 0.95, 0.98, 1.0, 1.02], np.float32)
_OTHER_END = np.linspace(0.9, 1.05, 3, dtype=np.float32)  # the extreme on the end of the levels where it rarely fits
# The same for two numbers: how much of the range is left out, and which share of that at the lower end.
_RANGES = [(0.0, 0.5), *((out, share) for out in (0.05, 0.1, 0.16, 0.24) for share in (0.0, 0.5, 1.0))]
_FEW_RANGES = [(0.0, 0.5), (0.03, 0.5), (0.06, 0.0), (0.06, 1.0), (0.1, 0.5)]


def _inverse(values: Floats) -> Floats:
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values != 0)


def _nearest(scaled: Floats, levels: Floats) -> Floats:
    """The level nearest to each value, in place; levels are whole numbers in a row, or any rising ones."""
    if levels[-1] - levels[0] == len(levels) - 1:
        np.rint(scaled, out=scaled)
        return np.clip(scaled, levels[0], levels[-1], out=scaled)
    return levels[nearest_code(scaled)]


_IQ4 = np.asarray(IQ4_VALUES, np.float32)
# The middles between its levels are multiples of one half, so the whole part of 2 x decides.
_IQ4_CODES = np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, np.arange(-256, 256) / 2 + 0.25).astype(np.uint8)


def nearest_code(scaled: Floats) -> npt.NDArray[np.uint8]:
    """The code of the nearest of the 16 levels of IQ4_NL and IQ4_XS; changes ``scaled``."""
    scaled *= 2
    np.floor(scaled, out=scaled)
    np.clip(scaled, -256, 255, out=scaled)
    return _IQ4_CODES[scaled.astype(np.int16) + np.int16(256)]


def fit_symmetric(tile: Floats, weight: Floats, levels: Floats) -> Floats:
    """``step [rows]`` (of either sign) for which ``step * nearest level`` is closest to ``tile [count, rows]``, squared
    errors weighted by ``weight [count]``."""
    place = np.abs(tile).argmax(axis=0)[None]
    extreme = np.take_along_axis(tile, place, axis=0)[0]
    few = len(levels) <= 16
    tries = [(levels[0], factor) for factor in (_FEW_LEVELS if few else _MANY_LEVELS)]
    tries += [(levels[-1], factor) for factor in _OTHER_END] if few else []
    weighted = weight[:, None] * tile
    most = np.full(extreme.shape, -np.inf, np.float32)
    found = np.zeros_like(extreme)
    for end, factor in tries:
        chosen = _nearest(tile * _inverse(extreme * (factor / end)), levels)
        product = np.einsum("cr,cr->r", weighted, chosen)
        square = weight @ (chosen * chosen)
        step = product * _inverse(square)
        explained = product * step  # the error is what the tile weighs, less this
        better = explained > most
        np.copyto(most, explained, where=better)
        np.copyto(found, step, where=better)
    return found


def fit_affine(tile: Floats, weight: Floats, top: int, lowest: float | None = None) -> tuple[Floats, Floats]:
    """``step`` and ``offset [rows]`` for which ``step * code - offset`` (code from 0 to ``top``) is closest to ``tile
    [count, rows]``. With ``lowest`` the offset is never below it (K-quants store it without a sign)."""
    low, high = tile.min(axis=0), tile.max(axis=0)
    if lowest is not None:
        low = np.minimum(low, -np.float32(lowest))
    total = weight.sum()
    mean = weight @ tile / total
    weighted = weight[:, None] * tile
    least = np.full(low.shape, np.inf, np.float32)
    steps, offsets = np.zeros_like(low), np.zeros_like(low)
    for out, share in _RANGES if top <= 15 else _FEW_RANGES:
        start = low + (high - low) * np.float32(out * share)
        codes = tile - start
        codes *= _inverse((high - low) * np.float32((1 - out) / top))
        np.rint(codes, out=codes)
        np.clip(codes, 0, top, out=codes)
        middle = weight @ codes / total
        product = np.einsum("cr,cr->r", weighted, codes)
        square = weight @ (codes * codes)
        step = (product - total * middle * mean) * _inverse(square - total * middle * middle)
        offset = step * middle - mean
        if lowest is not None:
            held = offset < lowest
            step = np.where(held, np.maximum((product + lowest * total * middle) * _inverse(square), 0), step)
            offset = np.where(held, np.float32(lowest), offset)
        error = step * step * square - 2 * step * (product + offset * total * middle)
        error += total * offset * (offset + 2 * mean)  # all but what the tile weighs itself
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(steps, step, where=better)
        np.copyto(offsets, offset, where=better)
    flat = high == low
    return np.where(flat, 0, steps).astype(np.float32), np.where(flat, -low, offsets).astype(np.float32)
