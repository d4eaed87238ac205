"""GGML's IQ grids, whose values come out of code books, and its ternary ones: blocks of 256.

The arithmetic is that of ``ggml-quants.c`` in its order, in float32. Each takes ``blocks [n, bytes]`` and gives
``[n, 256]``. A group is 32 values: four vectors of eight, or eight of four.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .ggml_bits import Bytes, Floats, crumbs, flat, half, nibbles, sign_bits
from .ggml_blocks import IQ4_VALUES
from .ggml_codebooks import codebook, even_signs

__all__ = ["DECODERS"]

_DELTA = np.float32(0.125)  # IQ1S_DELTA: how far IQ1 moves its three levels up or down


def _words(blocks: Bytes, form: str) -> npt.NDArray[np.uint32]:
    """Bytes as little-endian words, widened so that shifts have room."""
    return np.ascontiguousarray(blocks).view(form).astype(np.uint32)


def _even_signs(words: npt.NDArray[np.uint32]) -> Floats:
    """Four times seven bits of each word ``[n, groups]`` as signs ``[n, groups, 4, 8]``."""
    signs: Floats = even_signs()[(words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127]
    return signs


def _half_scales(blocks: Bytes, packed: Bytes) -> Floats:
    """IQ2_XS and IQ2_S: four bits for every 16 values, as steps ``[n, 16]``."""
    scales = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(blocks), -1).astype(np.float32)
    return half(blocks, 0) * (np.float32(0.5) + scales) * np.float32(0.25)


def _iq2_xxs(blocks: Bytes) -> Floats:
    """Two words a group: four indices of eight bits; four times seven sign bits and a scale of four."""
    pairs = _words(blocks[:, 2:], "<u4").reshape(-1, 8, 2)
    indices = np.ascontiguousarray(blocks[:, 2:].reshape(-1, 8, 8)[:, :, :4])
    steps = half(blocks, 0) * (np.float32(0.5) + (pairs[:, :, 1] >> 28).astype(np.float32)) * np.float32(0.25)
    return flat(steps[:, :, None, None] * codebook("iq2_xxs")[indices] * _even_signs(pairs[:, :, 1]))


def _iq2_xs(blocks: Bytes) -> Floats:
    """A word a vector: nine bits of index, seven of signs."""
    words = _words(blocks[:, 2:66], "<u2")
    values = codebook("iq2_xs")[words & 511] * even_signs()[words >> 9]
    return flat(_half_scales(blocks, blocks[:, 66:])[:, :, None] * values.reshape(-1, 16, 16))


def _iq2_s(blocks: Bytes) -> Floats:
    """Ten bits of index a vector, the upper two of a group in a byte; a sign bit a value."""
    high = (blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    indices = blocks[:, 2:34].astype(np.uint16) | (high.reshape(-1, 32).astype(np.uint16) << 8)
    values = codebook("iq2_s")[indices] * sign_bits(blocks[:, 34:66]).reshape(-1, 32, 8)
    return flat(_half_scales(blocks, blocks[:, 74:])[:, :, None] * values.reshape(-1, 16, 16))


def _iq3_xxs(blocks: Bytes) -> Floats:
    """Eight vectors of four a group, eight bits of index each; signs and scale in a word."""
    words = _words(blocks[:, 66:], "<u4")
    steps = half(blocks, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    values = codebook("iq3_xxs")[blocks[:, 2:66]].reshape(-1, 8, 4, 8)
    return flat(steps[:, :, None, None] * values * _even_signs(words))


def _iq3_s(blocks: Bytes) -> Floats:
    """Nine bits of index for every four values, the uppermost of a group in a byte; a sign bit a value."""
    high = (blocks[:, 66:74, None] >> np.arange(8, dtype=np.uint8)) & 1
    indices = blocks[:, 2:66].astype(np.uint16) | (high.reshape(-1, 64).astype(np.uint16) << 8)
    packed = blocks[:, 106:]
    scales = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8).astype(np.float32)
    steps = half(blocks, 0) * (1 + 2 * scales)
    values = codebook("iq3_s")[indices].reshape(-1, 8, 32) * sign_bits(blocks[:, 74:106]).reshape(-1, 8, 32)
    return flat(steps[:, :, None] * values)


def _iq1_s(blocks: Bytes) -> Floats:
    """Eleven bits of index a vector; a word a group has the upper three of each, a scale and the shift's sign."""
    high = _words(blocks[:, 34:], "<u2")
    upper = (high[:, :, None] >> np.array([0, 3, 6, 9], np.uint32)) & 7
    indices = blocks[:, 2:34].reshape(-1, 8, 4).astype(np.uint32) | (upper << 8)
    steps = half(blocks, 0) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    shifts = np.where(high & 0x8000, -_DELTA, _DELTA)
    return flat(steps[:, :, None, None] * (codebook("iq1")[indices] + shifts[:, :, None, None]))


def _iq1_m(blocks: Bytes) -> Floats:
    """As IQ1_S, with a scale for every 16 values and a shift for every 8; the block's scale lies in four nibbles."""
    packed = _words(blocks[:, 48:], "<u2")
    nibble = packed >> 12
    whole = nibble[:, 0] | (nibble[:, 1] << 4) | (nibble[:, 2] << 8) | (nibble[:, 3] << 12)
    scale = whole.astype("<u2").view(np.float16).astype(np.float32)
    parts = (packed[:, :, None] >> np.array([0, 3, 6, 9], np.uint32)) & 7
    steps = scale[:, None] * (2 * parts.reshape(-1, 16) + 1).astype(np.float32)
    high = np.stack([blocks[:, 32:48] & 15, blocks[:, 32:48] >> 4], axis=2).reshape(-1, 32)
    indices = blocks[:, :32].astype(np.uint16) | ((high & 7).astype(np.uint16) << 8)
    shifts = np.where(high & 8, -_DELTA, _DELTA)
    values = codebook("iq1")[indices] + shifts[:, :, None]
    return flat(steps[:, :, None] * values.reshape(-1, 16, 16))


def _iq4_xs(blocks: Bytes) -> Floats:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    low = blocks[:, 4:8]
    scales = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8)
    scales = scales | (((high >> (2 * np.arange(8, dtype=np.uint16))) & 3) << 4).astype(np.uint8)
    step = half(blocks, 0) * (scales.astype(np.float32) - 32)
    return flat(step[:, :, None] * IQ4_VALUES[nibbles(blocks[:, 8:].reshape(-1, 8, 16))])


def _trits(packed: Bytes, count: int) -> Floats:
    """``[n, m]`` bytes as ``[n, count, m]`` values of -1, 0, 1: the byte is a fraction of 256, read in base three."""
    powers = np.array([3**n for n in range(count)], np.uint8)
    shifted = packed[:, None, :] * powers[:, None]  # modulo 256: the digits before are gone
    return ((shifted.astype(np.uint16) * 3) >> 8).astype(np.float32) - 1


def _tq1_0(blocks: Bytes) -> Floats:
    """Five ternary values a byte, the last four bytes with four."""
    parts = [_trits(blocks[:, begin:end], count) for begin, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    return np.concatenate([flat(part) for part in parts], axis=1) * half(blocks, 52)


def _tq2_0(blocks: Bytes) -> Floats:
    """Two bits a ternary value."""
    return flat(crumbs(blocks[:, :64].reshape(-1, 2, 32)).astype(np.float32) - 1) * half(blocks, 64)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq4_xs": _iq4_xs,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
}
"""By name of the grid."""
