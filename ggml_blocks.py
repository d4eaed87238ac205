"""GGML's plain grids: floats, and blocks of 32 to 128 codes with one scale (and a minimum) each.

The arithmetic is that of ``ggml-quants.c`` in its order, in float32. Each takes ``blocks [n, bytes]`` and gives
``[n, elements]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .ggml_bits import Bytes, Floats, bits, flat, half, nibbles, sign_bits

__all__ = ["DECODERS", "IQ4_VALUES"]

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # the 16 levels of IQ4_NL and IQ4_XS, ggml-common.h


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return (nibbles(blocks[:, 2:]).astype(np.float32) - 8) * half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return nibbles(blocks[:, 4:]).astype(np.float32) * half(blocks, 0) + half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 6:]) | (bits(blocks[:, 2:6]) << 4)
    return (codes.astype(np.float32) - 16) * half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 8:]) | (bits(blocks[:, 4:8]) << 4)
    return codes.astype(np.float32) * half(blocks, 0) + half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * half(blocks, 0)


def _iq4_nl(blocks: Bytes) -> Floats:
    return IQ4_VALUES[nibbles(blocks[:, 2:])] * half(blocks, 0)


def _q1_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * -sign_bits(blocks[:, 2:])


def _q2_0(blocks: Bytes) -> Floats:
    shifts = np.array([0, 2, 4, 6], np.uint8)
    codes = (blocks[:, 2:, None] >> shifts) & np.uint8(3)
    return flat(codes.astype(np.float32) - 1) * half(blocks, 0)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "q1_0": _q1_0,
    "q2_0": _q2_0,
}
"""By name of the grid."""
