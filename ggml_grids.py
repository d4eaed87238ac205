"""The grids of GGML, as GGUF files store them: blocks of packed codes with scales, decoded to float32 in numpy.

Names are llama.cpp's in lower case (``"q4_k"``). The decoders stand by family in ``ggml_blocks``, ``ggml_k`` and
``ggml_iq``. Every one does the arithmetic of ``ggml-quants.c`` in its order, in float32, so that the values are
bit-equal to what llama.cpp computes with. Block layouts: ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from . import ggml_blocks, ggml_iq, ggml_k
from .errors import BadInput, Unsupported
from .ggml_bits import Bytes, Floats
from .ggml_blocks import IQ4_VALUES

__all__ = ["GGML_GRIDS", "IQ4_VALUES", "GgmlGrid", "dequantise", "ggml_grid", "ggml_size", "quantise"]

Decoder = Callable[[Bytes], Floats]

# Elements decoded at a time: keeps the temporaries in the cache and memory at that of the result.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class GgmlGrid:
    """One GGML type: its name, its number in GGUF files, elements and bytes of a block, decoder of ``[blocks, bytes]``
    to ``[blocks, elements]``."""

    name: str
    number: int
    elements: int
    size_bytes: int
    decode: Decoder


_DECODERS = {**ggml_blocks.DECODERS, **ggml_k.DECODERS, **ggml_iq.DECODERS}
_TYPES = (
    ("f32", 0, 1, 4),
    ("f16", 1, 1, 2),
    ("bf16", 30, 1, 2),
    ("q4_0", 2, 32, 18),
    ("q4_1", 3, 32, 20),
    ("q5_0", 6, 32, 22),
    ("q5_1", 7, 32, 24),
    ("q8_0", 8, 32, 34),
    ("q2_k", 10, 256, 84),
    ("q3_k", 11, 256, 110),
    ("q4_k", 12, 256, 144),
    ("q5_k", 13, 256, 176),
    ("q6_k", 14, 256, 210),
    ("iq4_nl", 20, 32, 18),
    ("iq4_xs", 23, 256, 136),
    ("iq3_s", 21, 256, 110),
    ("iq3_xxs", 18, 256, 98),
    ("iq2_s", 22, 256, 82),
    ("iq2_xs", 17, 256, 74),
    ("iq2_xxs", 16, 256, 66),
    ("iq1_m", 29, 256, 56),
    ("iq1_s", 19, 256, 50),
    ("tq2_0", 35, 256, 66),
    ("tq1_0", 34, 256, 54),
    ("q2_0", 42, 64, 18),
    ("q1_0", 41, 128, 18),
)  # name, number, elements and bytes of a block

GGML_GRIDS = {name: GgmlGrid(name, number, elements, size, _DECODERS[name]) for name, number, elements, size in _TYPES}
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
