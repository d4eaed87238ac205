"""Operations that pick, place and make elements by index."""

from __future__ import annotations

from typing import Any

import numpy as np

from .program import ValueType
from .registry import Arguments, operation

__all__ = ["slices"]


@operation("gather", exact=True)
def gather(a: Arguments, _: ValueType) -> Any:
    """Slices of x at ``indices`` along an axis, the first ``batch_dims`` axes in step."""
    x, indices = a["x"], a["indices"].astype(np.int64)
    axis, batch = int(a.get("axis", 0)), int(a.get("batch_dims", 0))
    if batch == 0:
        return np.asarray(np.take(x, indices, axis=axis))
    lead = x.shape[:batch]
    rows = [
        np.take(part, index, axis=axis % x.ndim - batch)
        for part, index in zip(
            x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:]), strict=True
        )
    ]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


@operation("gather_along_axis", exact=True)
def gather_along_axis(a: Arguments, _: ValueType) -> Any:
    """x at ``indices`` along an axis, elementwise in the others."""
    return np.take_along_axis(a["x"], a["indices"].astype(np.int64), int(a.get("axis", 0)))


@operation("gather_nd", exact=True)
def gather_nd(a: Arguments, _: ValueType) -> Any:
    """x at tuples of indices, which stand in the last axis of ``indices``."""
    if int(a.get("batch_dims", 0)):
        raise NotImplementedError("gather_nd with batch_dims")
    return np.asarray(a["x"][tuple(np.moveaxis(a["indices"].astype(np.int64), -1, 0))])


def slices(a: Arguments) -> tuple[slice | int, ...]:
    """The numpy index that begin, end, stride and the masks of a slice operation mean."""
    begin, end = a["begin"].tolist(), a["end"].tolist()
    count = len(begin)
    stride = a["stride"].tolist() if "stride" in a else [1] * count
    masks = {
        name: a[name].tolist() if name in a else [False] * count for name in ("begin_mask", "end_mask", "squeeze_mask")
    }
    return tuple(
        begin[i]
        if masks["squeeze_mask"][i]
        else slice(
            None if masks["begin_mask"][i] else begin[i], None if masks["end_mask"][i] else end[i], stride[i]
        )
        for i in range(count)
    )  # fmt: skip


@operation("slice_by_index", exact=True)
def slice_by_index(a: Arguments, _: ValueType) -> Any:
    """x[begin:end:stride] along each axis."""
    return np.asarray(a["x"][slices(a)])


@operation("slice_by_size", exact=True)
def slice_by_size(a: Arguments, _: ValueType) -> Any:
    """``size`` elements from ``begin`` along each axis; -1 is up to the end."""
    pairs = zip(a["begin"].tolist(), a["size"].tolist(), strict=True)
    return a["x"][tuple(slice(begin, None if size == -1 else begin + size) for begin, size in pairs)]


@operation("slice_update", exact=True)
def slice_update(a: Arguments, _: ValueType) -> Any:
    """A copy of x in which x[begin:end:stride] is ``update``."""
    result = a["x"].copy()
    result[slices(a)] = a["update"]
    return result


@operation("range_1d")
def range_1d(a: Arguments, _: ValueType) -> Any:
    """start, start + step, … below end."""
    start, end, step = a["start"], a["end"], a["step"]
    count = max(0, int(np.ceil((float(end) - float(start)) / float(step))))
    return start + step * np.arange(count).astype(start.dtype)


@operation("fill", exact=True)
def fill(a: Arguments, _: ValueType) -> Any:
    """An array of ``shape`` that holds one value."""
    value = a.get("value", np.float32(0))
    return np.full(tuple(int(size) for size in a["shape"]), value, np.asarray(value).dtype)


@operation("fill_like", exact=True)
def fill_like(a: Arguments, _: ValueType) -> Any:
    """An array like ``ref_tensor`` that holds one value."""
    value = a.get("value", np.float32(0))
    return np.full(a["ref_tensor"].shape, value, np.asarray(value).dtype)


@operation("one_hot", exact=True)
def one_hot(a: Arguments, _: ValueType) -> Any:
    """``on_value`` at each index of a new axis, ``off_value`` elsewhere."""
    size, axis = int(a["one_hot_vector_size"]), int(a.get("axis", -1))
    indices = a["indices"]
    hot = np.arange(size) == indices[..., None]
    on, off = np.asarray(a.get("on_value", 1)), np.asarray(a.get("off_value", 0))
    return np.moveaxis(np.where(hot, on, off).astype(on.dtype), -1, axis)
