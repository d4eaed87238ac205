"""Round float32 arrays to the nearest float16, in place, several times faster than numpy's own conversion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["FLOAT16_MAX", "round_half"]

Floats = npt.NDArray[np.float32]

FLOAT16_MAX = 65504.0
_SMALLEST_NORMAL = np.float32(2.0**-14)
_BLOCK = 1 << 16  # elements; keeps the temporary arrays in the cache


def round_half(x: Floats) -> float:
    """Round ``x`` (float32, any shape) in place to float16 numbers, ties to even, overflow to infinity.

    Returns the largest magnitude of the result: infinity after an overflow, NaN when there is a NaN. Equal to
    ``x.astype(numpy.float16).astype(numpy.float32)`` for every float32.
    """
    if x.ndim == 0:
        return _round(x.reshape(1))  # a view; of a scalar numpy would make copies
    if x.size > _BLOCK and x.flags.c_contiguous:
        flat = x.reshape(-1)
        peaks = [_round(flat[begin : begin + _BLOCK]) for begin in range(0, flat.size, _BLOCK)]
        return float(np.max(peaks))
    return _round(x)


def _round(x: Floats) -> float:
    if x.size == 0:
        return 0.0
    magnitude = np.abs(x)
    peak = float(magnitude.max())  # NaN if there is one
    small = magnitude < _SMALLEST_NORMAL
    subnormal = None
    if small.any():
        # Adding 0.75 leaves a float32 with a last place of 2**-24, the distance of float16's subnormals.
        subnormal = x + np.float32(0.75)
        subnormal -= np.float32(0.75)
        np.copysign(subnormal, x, out=subnormal)
    bits = x.view(np.uint32)
    carry = bits >> np.uint32(13)
    carry &= np.uint32(1)
    carry += np.uint32(0xFFF)
    nan = np.isnan(x) if np.isnan(peak) else None
    bits += carry
    bits &= np.uint32(0xFFFFE000)
    if subnormal is not None:
        np.copyto(x, subnormal, where=small)
    if peak <= FLOAT16_MAX:
        return float(np.float16(peak))
    if nan is not None:
        x[nan] = np.nan  # the carry may have run through its payload
    with np.errstate(invalid="ignore"):
        np.copyto(x, np.copysign(np.float32(np.inf), x), where=np.abs(x) > FLOAT16_MAX)
    return float(np.abs(x).max())
