"""GGML's K-quants: blocks of 256 codes whose scales (and minima) are quantised themselves.

The arithmetic is that of ``ggml-quants.c`` in its order, in float32. Each takes ``blocks [n, bytes]`` and gives
``[n, 256]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .ggml_bits import Bytes, Floats, crumbs, flat, half, nibbles

__all__ = ["DECODERS"]


def _q2_k(blocks: Bytes) -> Floats:
    packed = blocks[:, :16]
    steps = half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = half(blocks, 82) * (packed >> 4).astype(np.float32)
    codes = crumbs(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16).astype(np.float32)
    return flat(steps[:, :, None] * codes - minima[:, :, None])


def _q3_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    steps = half(blocks, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    kept = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit j of byte l: value 32 j + l
    codes = crumbs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 16, 16).astype(np.float32)
    codes = codes - np.where(kept.reshape(-1, 16, 16) == 1, np.float32(0), np.float32(4))
    return flat(steps[:, :, None] * codes)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q45_k(blocks: Bytes, codes: Bytes) -> Floats:
    """Q4_K and Q5_K once their ``codes [blocks, 8, 32]`` are unpacked."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    steps, offsets = half(blocks, 0) * scales, half(blocks, 2) * minima
    values = codes.astype(np.float32)
    values *= steps[:, :, None]
    values -= offsets[:, :, None]
    return flat(values)


def _q4_k(blocks: Bytes) -> Floats:
    return _q45_k(blocks, nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    low = nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _q45_k(blocks, low | (high << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    codes = low | (crumbs(blocks[:, 128:192].reshape(-1, 2, 32)) << 4)
    steps = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return flat(steps[:, :, None] * (codes.reshape(-1, 16, 16).astype(np.float32) - 32))


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
"""By name of the grid."""
