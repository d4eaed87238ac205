"""What a quantised weight of each format means, in numpy: quantise, pack, unpack, dequantise.

Everything that needs to know stands on this one file: exporters write with it, verification reads with it,
quantisation-aware distillation trains through it, the Core ML interpreter executes with it. The grids of llama.cpp
stand in :mod:`edgestill.ggml_grids` and are re-exported here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .ggml_grids import GGML_GRIDS, GgmlGrid, dequantise, ggml_grid, ggml_size, quantise

__all__ = [
    "GGML_GRIDS",
    "Affine",
    "GgmlGrid",
    "InputGrid",
    "dequantise",
    "dequantise_affine",
    "ggml_grid",
    "ggml_size",
    "input_grid",
    "quantise",
    "quantise_affine",
]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Affine:
    """Integer codes with a scale and a zero point for each block of a row: ``weight = (code - zero_point) * scale``.

    ``codes [rows, columns]`` are unsigned, ``0 … 2**bits - 1``; ``scales`` and ``zero_points`` ``[rows, blocks]``, with
    ``blocks = ceil(columns / block)``. A symmetric grid has all zero points at ``2**(bits - 1)``.
    """

    codes: npt.NDArray[np.uint8]
    scales: Floats
    zero_points: npt.NDArray[np.uint8]
    bits: int
    block: int


def quantise_affine(weight: Floats, *, bits: int, block: int | None = None, symmetric: bool = True) -> Affine:
    """Round-to-nearest quantisation of ``weight [rows, columns]`` in blocks along the columns.

    ``block=None`` is one block a row ("per channel"). The symmetric grid spends the value of largest magnitude on the
    code of largest magnitude (``scale = extreme / -2**(bits-1)``, as llama.cpp's Q4_0 and ONNX Runtime's
    MatMulNBits do), so that all ``2**bits`` codes are used.
    """
    rows, columns = weight.shape
    width = block or columns
    blocks = -(-columns // width)
    padded = np.zeros((rows, blocks * width), np.float32)
    padded[:, :columns] = weight
    tiles = padded.reshape(rows, blocks, width)
    top = (1 << bits) - 1
    if symmetric:
        extreme = np.take_along_axis(tiles, np.abs(tiles).argmax(axis=2)[..., None], axis=2)[..., 0]
        scales = extreme / -(1 << (bits - 1))
        zeros = np.full((rows, blocks), 1 << (bits - 1), np.float32)
    else:
        low = np.minimum(tiles.min(axis=2), 0)
        high = np.maximum(tiles.max(axis=2), 0)
        scales = (high - low) / top
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        zeros = np.clip(np.rint(-low * inverse), 0, top)
    stored: Floats = np.asarray(scales, np.float32)
    inverse = np.divide(1, stored, out=np.zeros_like(stored), where=stored != 0)
    codes = np.clip(np.rint(tiles * inverse[..., None]) + zeros[..., None], 0, top)
    codes = codes.reshape(rows, blocks * width)[:, :columns].astype(np.uint8)
    return Affine(codes, stored, zeros.astype(np.uint8), bits, width)


def dequantise_affine(grid: Affine) -> Floats:
    """``[rows, columns]`` float32 weights that :class:`Affine` stands for."""
    columns = grid.codes.shape[1]
    scales = np.repeat(grid.scales, grid.block, axis=1)[:, :columns]
    zeros = np.repeat(grid.zero_points.astype(np.float32), grid.block, axis=1)[:, :columns]
    return (grid.codes.astype(np.float32) - zeros) * scales


@dataclass(frozen=True)
class InputGrid:
    """A fixed grid for what goes into a matrix product: ``value = (level - zero_point) * scale``, levels 0 to 255.

    What lies outside is cut to its ends (ONNX QuantizeLinear to uint8, DequantizeLinear). 0 is a level of its own.
    """

    scale: np.float32
    zero_point: int

    def levels(self, x: Floats) -> npt.NDArray[np.uint8]:
        """Of float32 values: the nearest level, halves to the even one before the zero point is added."""
        shifted = np.rint(x / self.scale) + np.float32(self.zero_point)
        return np.asarray(np.clip(shifted, 0, 255), np.uint8)

    def rounded(self, x: Floats) -> Floats:
        """``x`` as the product sees it."""
        return (self.levels(x).astype(np.float32) - np.float32(self.zero_point)) * self.scale


def input_grid(low: float, high: float) -> InputGrid:
    """The grid that reaches from ``low`` to ``high`` (and over 0)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return InputGrid(scale, int(np.clip(np.rint(-low / float(scale)), 0, 255)))
