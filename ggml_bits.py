"""Taking packed blocks of GGML apart: the fields that several families of grids share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "Floats", "bits", "crumbs", "flat", "half", "nibbles", "sign_bits"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, as ``[blocks, 1]`` float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(codes: Bytes) -> Bytes:
    """``[…, n]`` bytes to ``[…, 2 n]``: all low halves, then all high ones."""
    return np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)


def bits(packed: Bytes) -> Bytes:
    """The bits of ``packed [blocks, n]`` as ``[blocks, 8 n]`` of 0 or 1, the lowest of a byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def crumbs(packed: Bytes) -> Bytes:
    """``[blocks, n, 32]`` bytes to ``[blocks, n, 4, 32]`` values of two bits, the lowest first."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed[:, :, None, :] >> shifts) & np.uint8(3)


def sign_bits(packed: Bytes) -> Floats:
    """A bit a value, set for minus: ``[blocks, n]`` bytes to ``[blocks, 8 n]`` of 1 or -1."""
    return np.float32(1) - np.float32(2) * bits(packed).astype(np.float32)


def flat(values: Floats) -> Floats:
    """``[blocks, …]`` to ``[blocks, elements]``."""
    return values.reshape(values.shape[0], -1)
