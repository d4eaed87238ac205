"""Codes and scales of GGML blocks as bytes: the inverse of the decoders in :mod:`edgestill.ggml_grids`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Packable", "pack"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


_LOW, _FOUR = np.uint8(15), np.uint8(4)


class Packable(Protocol):
    """A block of all rows, see :class:`.compensate_ggml.GgmlBlock`."""

    codes: Bytes
    step: Floats
    offset: Floats
    scale: npt.NDArray[np.int16]
    minimum: npt.NDArray[np.int16]


def pack(grid: str, blocks: Sequence[Packable]) -> Bytes:
    """``[rows, bytes of a row]``: the blocks of a row one after the other."""
    return np.concatenate([np.concatenate(_PACKERS[grid](block), axis=1) for block in blocks], axis=1)


def _half(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: Bytes) -> Bytes:
    """``[…, 2 n]`` codes to ``[…, n]`` bytes: the first half low, the second high."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] & _LOW) | ((codes[..., half:] & _LOW) << _FOUR)


def _bits(codes: Bytes) -> Bytes:
    """The fifth bit of 32 codes as 4 bytes."""
    return np.packbits((codes >> _FOUR) & np.uint8(1), axis=1, bitorder="little")


def _crumbs(codes: Bytes) -> Bytes:
    """256 codes of two bits as 64 bytes: in each half, four runs of 32 share their bytes."""
    runs = (codes.reshape(-1, 2, 4, 32) & np.uint8(3)) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(-1, 64)


def _rows(block: Packable) -> Bytes:
    return np.ascontiguousarray(block.codes.T)


def _q4_0(block: Packable) -> list[Bytes]:
    return [_half(block.step), _nibbles(_rows(block))]


def _q4_1(block: Packable) -> list[Bytes]:
    return [_half(block.step), _half(-block.offset), _nibbles(_rows(block))]


def _q5_0(block: Packable) -> list[Bytes]:
    codes = _rows(block)
    return [_half(block.step), _bits(codes), _nibbles(codes)]


def _q5_1(block: Packable) -> list[Bytes]:
    codes = _rows(block)
    return [_half(block.step), _half(-block.offset), _bits(codes), _nibbles(codes)]


def _q8_0(block: Packable) -> list[Bytes]:
    return [_half(block.step), (_rows(block).astype(np.int16) - 127).astype(np.int8).view(np.uint8)]


def _iq4_xs(block: Packable) -> list[Bytes]:
    scales = (block.scale.T + 32).astype(np.uint16)  # [rows, 8], six bits each
    high = ((scales >> 4) << (2 * np.arange(8, dtype=np.uint16))).sum(axis=1).astype("<u2")
    low = (scales & 15).astype(np.uint8)
    return [_half(block.step), high.view(np.uint8).reshape(-1, 2), low[:, ::2] | low[:, 1::2] << 4,
            _nibbles(_rows(block).reshape(-1, 8, 32)).reshape(-1, 128)]  # fmt: skip


def _q2_k(block: Packable) -> list[Bytes]:
    packed = (block.scale | block.minimum << 4).T.astype(np.uint8)
    return [packed, _crumbs(_rows(block)), _half(block.step), _half(block.offset)]


def _q3_k(block: Packable) -> list[Bytes]:
    codes = _rows(block)
    kept = ((codes >> 2) & 1).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    scales = (block.scale.T + 32).astype(np.uint8)  # [rows, 16], six bits each
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    top = (scales >> 4).reshape(-1, 4, 4)
    high = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return [kept.sum(axis=1).astype(np.uint8), _crumbs(codes), low, high, _half(block.step)]


def _twelve(block: Packable) -> Bytes:
    """Eight 6-bit scales and minima in 12 bytes, as Q4_K and Q5_K share them."""
    scales, minima = block.scale.T.astype(np.uint8), block.minimum.T.astype(np.uint8)
    first = (scales[:, :4] & 63) | (scales[:, 4:] >> 4) << 6
    second = (minima[:, :4] & 63) | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _pairs(codes: Bytes) -> Bytes:
    """256 codes as 128 bytes: runs of 32 in pairs, the first low."""
    runs = codes.reshape(-1, 4, 2, 32) & _LOW
    return (runs[:, :, 0] | runs[:, :, 1] << _FOUR).reshape(-1, 128)


def _q4_k(block: Packable) -> list[Bytes]:
    return [_half(block.step), _half(block.offset), _twelve(block), _pairs(_rows(block))]


def _q5_k(block: Packable) -> list[Bytes]:
    codes = _rows(block)
    high = ((codes >> 4) & 1).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    return [_half(block.step), _half(block.offset), _twelve(block), high.sum(axis=1).astype(np.uint8), _pairs(codes)]


def _q6_k(block: Packable) -> list[Bytes]:
    codes = _rows(block).reshape(-1, 2, 4, 32)
    low = codes & 15
    first = low[:, :, 0] | low[:, :, 2] << 4
    second = low[:, :, 1] | low[:, :, 3] << 4
    halves = np.stack([first, second], axis=2).reshape(-1, 128)
    return [halves, _crumbs((codes >> _FOUR).reshape(-1, 256)), block.scale.T.astype(np.int8).view(np.uint8),
            _half(block.step)]  # fmt: skip


_PACKERS: dict[str, Callable[[Packable], list[Bytes]]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "iq4_nl": _q4_0, "iq4_xs": _iq4_xs,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
}  # fmt: skip
