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
    """Codes looked up in a table of values, or of vectors that fill ``vector_axis`` (palettised weights)."""
    if "shape" in a:  # iOS 16: one table, codes packed little end first
        shape = tuple(int(size) for size in a["shape"])
        codes = _unpack(a["indices"], int(np.log2(a["lut"].size)), int(np.prod(shape)))
        return a["lut"][codes.astype(np.intp)].reshape(shape).astype(np.float32)
    codes, table = a["indices"].astype(np.intp), a["lut"]
    blocks, vector = table.shape[:-2], table.shape[-1]
    grid = np.ix_(*[np.arange(size) * count // size for size, count in zip(codes.shape, blocks, strict=True)])
    found = table[(*grid, codes)].astype(np.float32)  # [..., vector]
    if vector == 1:
        return found[..., 0]
    axis = int(a["vector_axis"]) % codes.ndim
    sizes = [size * vector if index == axis else size for index, size in enumerate(codes.shape)]
    return np.moveaxis(found, -1, axis + 1).reshape(sizes)


def _unpack(packed: Any, bits: int, count: int) -> Any:
    """``count`` codes of ``bits`` bits out of bytes."""
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(np.pad(stream, ((0, 0), (0, 8 - bits))), axis=1, bitorder="little")[:, 0]


@operation("constexpr_sparse_to_dense")
def sparse(a: Arguments, _: ValueType) -> Any:
    """``nonzero_data`` where ``mask`` is 1, in order, and 0 elsewhere."""
    mask = a["mask"]
    if "shape" in a:  # iOS 16: the mask is packed
        shape = tuple(int(size) for size in a["shape"])
        mask = _unpack(mask, 1, int(np.prod(shape))).reshape(shape)
    values = np.zeros(mask.shape, a["nonzero_data"].dtype)
    values[mask != 0] = a["nonzero_data"]
    return values


@operation("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise(a: Arguments, _: ValueType) -> Any:
    """The mask as it is, and (nonzero_data - offset) * scale, the scale of the place that the mask gives (iOS 18)."""
    mask = a["data_mask"]
    dense = {**a, "data": sparse({"mask": mask, "nonzero_data": a["nonzero_data"]}, _)}
    return mask, blockwise(dense, _)[mask != 0]


@operation("constexpr_lut_to_sparse")
def sparse_lookup(a: Arguments, _: ValueType) -> Any:
    """The mask (wider by the vectors of the table), and the codes that it keeps, looked up (iOS 18)."""
    mask = a["indices_mask"]
    dense = {**a, "indices": sparse({"mask": mask, "nonzero_data": a["indices_nonzero_data"]}, _)}
    values = lookup(dense, _)
    vector = a["lut"].shape[-1]
    if vector > 1:
        mask = np.repeat(mask, vector, axis=int(a["vector_axis"]))
    return mask, values[mask != 0]


@operation("constexpr_cast")
def cast(a: Arguments, _: ValueType) -> Any:
    """A float16 constant used as float32."""
    return a["source_val"].astype(np.float32)
