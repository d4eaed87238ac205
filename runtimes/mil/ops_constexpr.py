"""Compressed weights: operations on constants that Core ML runs when it loads a model, and so do we."""

from __future__ import annotations

from typing import Any

import numpy as np

from .program import ValueType
from .registry import Arguments, operation

__all__: list[str] = []


def _along(vector: Any, axis: int, rank: int) -> Any:
    """A scalar as it is, a vector along ``axis`` of an array of ``rank`` axes."""
    return vector if vector.ndim == 0 else vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _expand(blocks: Any, shape: tuple[int, ...]) -> Any:
    """Repeat the entries of each block, so that there is one for every weight."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):
            blocks = np.repeat(blocks, size // blocks.shape[axis], axis=axis)
    return blocks


@operation("constexpr_affine_dequantize")
def affine(a: Arguments, _: ValueType) -> Any:
    """(codes - zero_point) * scale, per tensor or along ``axis`` (iOS 16)."""
    codes, axis = a["quantized_data"], int(a["axis"])
    scale = _along(a["scale"], axis, codes.ndim)
    zero = _along(a["zero_point"].astype(np.float32), axis, codes.ndim)
    return (codes.astype(np.float32) - zero) * scale


@operation("constexpr_blockwise_shift_scale")
def blockwise(a: Arguments, _: ValueType) -> Any:
    """(data - offset) * scale, block by block (iOS 18)."""
    data = a["data"].astype(np.float32)
    if "offset" in a:
        data -= _expand(a["offset"].astype(np.float32), data.shape)
    data *= _expand(a["scale"], data.shape)
    return data


@operation("constexpr_lut_to_dense")
def lookup(a: Arguments, result: ValueType) -> Any:
    """Codes looked up in a table of values (palettised weights)."""
    if "shape" in a:  # iOS 16: one table, codes packed little end first
        shape = tuple(int(size) for size in a["shape"])
        bits = int(np.log2(a["lut"].size))
        stream = np.unpackbits(a["indices"], bitorder="little")[: int(np.prod(shape)) * bits].reshape(-1, bits)
        codes = np.packbits(np.pad(stream, ((0, 0), (0, 8 - bits))), axis=1, bitorder="little")[:, 0]
        return a["lut"][codes.astype(np.int64)].reshape(shape).astype(np.float32)
    codes, table = a["indices"].astype(np.int64), a["lut"]
    if table.shape[-1] != 1:
        raise NotImplementedError("vector palettes")
    blocks = table.shape[:-2]
    grid = np.ix_(*[np.arange(size) * count // size for size, count in zip(codes.shape, blocks, strict=True)])
    return table[(*grid, codes, 0)].astype(np.float32)


@operation("constexpr_cast")
def cast(a: Arguments, _: ValueType) -> Any:
    """A float16 constant used as float32."""
    return a["source_val"].astype(np.float32)
