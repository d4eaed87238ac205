"""The grids of GGML, as GGUF files store them: blocks of packed codes with scales, decoded to float32 in numpy.

Names are llama.cpp's in lower case (``"q4_k"``). Every decoder does the arithmetic of ``ggml-quants.c`` in its order,
in float32, so that the values are bit-equal to what llama.cpp computes with. Block layouts: ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from .errors import BadInput, Unsupported

__all__ = ["GGML_GRIDS", "IQ4_VALUES", "GgmlGrid", "dequantise", "ggml_grid", "ggml_size", "quantise"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Decoder = Callable[[Bytes], Floats]

# Elements decoded at a time: keeps the temporaries in the cache and memory at that of the result.
_CHUNK_ELEMENTS = 1 << 18

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # the 16 levels of IQ4_NL and IQ4_XS, ggml-common.h


@dataclass(frozen=True)
class GgmlGrid:
    """One GGML type: its name, its number in GGUF files, elements and bytes of a block, decoder of ``[blocks, bytes]``
    to ``[blocks, elements]``."""

    name: str
    number: int
    elements: int
    size_bytes: int
    decode: Decoder


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, as ``[blocks, 1]`` float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """``[…, n]`` bytes to ``[…, 2 n]``: all low halves, then all high ones."""
    return np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)


def _bits(packed: Bytes) -> Bytes:
    """The 32 bits of 4 little-endian bytes as ``[blocks, 32]`` of 0 or 1."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _crumbs(packed: Bytes) -> Bytes:
    """``[blocks, n, 32]`` bytes to ``[blocks, n, 4, 32]`` values of two bits, the lowest first."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed[:, :, None, :] >> shifts) & np.uint8(3)


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return (codes.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return codes.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _iq4_nl(blocks: Bytes) -> Floats:
    return IQ4_VALUES[_nibbles(blocks[:, 2:])] * _half(blocks, 0)


def _iq4_xs(blocks: Bytes) -> Floats:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    low = blocks[:, 4:8]
    scales = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8)
    scales = scales | (((high >> (2 * np.arange(8, dtype=np.uint16))) & 3) << 4).astype(np.uint8)
    step = _half(blocks, 0) * (scales.astype(np.float32) - 32)
    return _flat(step[:, :, None] * IQ4_VALUES[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))])


def _q2_k(blocks: Bytes) -> Floats:
    packed = blocks[:, :16]
    steps = _half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    codes = _crumbs(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16).astype(np.float32)
    return _flat(steps[:, :, None] * codes - minima[:, :, None])


def _q3_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    steps = _half(blocks, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    kept = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit j of byte l: value 32 j + l
    codes = _crumbs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 16, 16).astype(np.float32)
    codes = codes - np.where(kept.reshape(-1, 16, 16) == 1, np.float32(0), np.float32(4))
    return _flat(steps[:, :, None] * codes)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q45_k(blocks: Bytes, codes: Bytes) -> Floats:
    """Q4_K and Q5_K once their ``codes [blocks, 8, 32]`` are unpacked."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    steps, offsets = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    values = codes.astype(np.float32)
    values *= steps[:, :, None]
    values -= offsets[:, :, None]
    return _flat(values)


def _q4_k(blocks: Bytes) -> Floats:
    return _q45_k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _q45_k(blocks, low | (high << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    codes = low | (_crumbs(blocks[:, 128:192].reshape(-1, 2, 32)) << 4)
    steps = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _flat(steps[:, :, None] * (codes.reshape(-1, 16, 16).astype(np.float32) - 32))


def _flat(values: Floats) -> Floats:
    return values.reshape(values.shape[0], -1)


GGML_GRIDS = {
    grid.name: grid
    for grid in (
        GgmlGrid("f32", 0, 1, 4, _f32),
        GgmlGrid("f16", 1, 1, 2, _f16),
        GgmlGrid("bf16", 30, 1, 2, _bf16),
        GgmlGrid("q4_0", 2, 32, 18, _q4_0),
        GgmlGrid("q4_1", 3, 32, 20, _q4_1),
        GgmlGrid("q5_0", 6, 32, 22, _q5_0),
        GgmlGrid("q5_1", 7, 32, 24, _q5_1),
        GgmlGrid("q8_0", 8, 32, 34, _q8_0),
        GgmlGrid("q2_k", 10, 256, 84, _q2_k),
        GgmlGrid("q3_k", 11, 256, 110, _q3_k),
        GgmlGrid("q4_k", 12, 256, 144, _q4_k),
        GgmlGrid("q5_k", 13, 256, 176, _q5_k),
        GgmlGrid("q6_k", 14, 256, 210, _q6_k),
        GgmlGrid("iq4_nl", 20, 32, 18, _iq4_nl),
        GgmlGrid("iq4_xs", 23, 256, 136, _iq4_xs),
    )
}
"""Every type that :func:`dequantise` knows, by name."""


def ggml_grid(grid: str) -> GgmlGrid:
    """The type called ``grid``, or :class:`Unsupported` naming the known ones."""
    try:
        return GGML_GRIDS[grid]
    except KeyError:
        raise Unsupported(f"no GGML grid {grid!r}", hint="known: " + ", ".join(GGML_GRIDS)) from None


def ggml_size(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ``shape`` (rows first); :class:`BadInput` when its rows aren't whole blocks."""
    kind = ggml_grid(grid)
    columns = shape[-1] if shape else 1
    if columns % kind.elements:
        raise BadInput(
            f"rows of {columns} values are not whole {grid} blocks", hint="the file is damaged; fetch it again"
        )
    return prod(shape) // kind.elements * kind.size_bytes


def dequantise(grid: str, raw: bytes | Bytes, shape: tuple[int, ...]) -> Floats:
    """Float32 values of ``shape`` (rows first, as in numpy) that the bytes ``raw`` of GGML type ``grid`` stand for.

    Raises :class:`BadInput` when ``raw`` is not as long as ``shape`` needs, :class:`Unsupported` for another type.
    """
    kind = ggml_grid(grid)
    stored = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else raw.reshape(-1).view(np.uint8)
    need = ggml_size(grid, shape)
    if stored.size != need:
        raise BadInput(
            f"{stored.size} bytes where {shape} in {grid} needs {need}", hint="the file is damaged; fetch it again"
        )
    blocks = stored.reshape(-1, kind.size_bytes)
    out = np.empty((len(blocks), kind.elements), np.float32)
    step = max(1, _CHUNK_ELEMENTS // kind.elements)
    with np.errstate(all="ignore"):  # a damaged file may hold infinite scales
        for begin in range(0, len(blocks), step):
            out[begin : begin + step] = kind.decode(blocks[begin : begin + step])
    return out.reshape(shape)


def quantise(grid: str, weight: Floats) -> Bytes:
    """``weight [..., columns]`` in GGML type ``grid`` (``f32 f16 q8_0 q4_0``), as llama.cpp rounds: the inverse of
    :func:`dequantise`, bytes ``[rows, bytes of a row]``. The other types search for their scales: llama.cpp does it."""
    kind = ggml_grid(grid)
    columns = weight.shape[-1] if weight.ndim else 1
    ggml_size(grid, weight.shape)
    rows = np.ascontiguousarray(weight, np.float32).reshape(-1, columns)
    if grid in ("f32", "f16"):
        plain: Bytes = rows.astype("<f4" if grid == "f32" else "<f2").view(np.uint8)
        return plain
    tiles = rows.reshape(-1, kind.elements)
    encoders = {"q8_0": _encode_q8_0, "q4_0": _encode_q4_0}
    if grid not in encoders:
        raise Unsupported(f"no quantiser for {grid!r} in numpy", hint="known: f32, f16, q8_0, q4_0")
    scale, codes = encoders[grid](tiles)
    blocks: Bytes = np.concatenate([scale.astype("<f2").view(np.uint8), codes], axis=1)
    return blocks.reshape(len(rows), -1)


def _reciprocal(scale: Floats) -> Floats:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _encode_q8_0(tiles: Floats) -> tuple[Floats, Bytes]:
    scale = np.abs(tiles).max(axis=1, keepdims=True) / np.float32(127)
    values = tiles * _reciprocal(scale)
    rounded = np.trunc(values)
    rounded += np.where(np.abs(values - rounded) >= 0.5, np.sign(values), 0).astype(np.float32)  # C's roundf
    return scale, rounded.astype(np.int8).view(np.uint8)


def _encode_q4_0(tiles: Floats) -> tuple[Floats, Bytes]:
    extreme = np.take_along_axis(tiles, np.abs(tiles).argmax(axis=1)[:, None], axis=1)
    scale = extreme / np.float32(-8)
    codes = np.minimum(np.trunc(tiles * _reciprocal(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return scale, codes[:, :16] | (codes[:, 16:] << 4)
