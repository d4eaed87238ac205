"""Operations that change the shape of a value, or join and cut values, without computing."""

from __future__ import annotations

from typing import Any

import numpy as np

from .program import ValueType
from .registry import Arguments, operation

__all__: list[str] = []


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(int(item) for item in np.atleast_1d(value))


@operation("shape")
def shape(a: Arguments, _: ValueType) -> Any:
    """Sizes of x."""
    return np.array(a["x"].shape, np.int32)


@operation("reshape", exact=True)
def reshape(a: Arguments, _: ValueType) -> Any:
    """x with new sizes: -1 is what remains, 0 keeps the size of that axis."""
    x = a["x"]
    sizes = _numbers(a["shape"])
    return x.reshape([x.shape[axis] if size == 0 and x.size else size for axis, size in enumerate(sizes)])


@operation("transpose", exact=True)
def transpose(a: Arguments, _: ValueType) -> Any:
    """x with its axes in the order ``perm``."""
    return a["x"].transpose(_numbers(a["perm"]))


@operation("expand_dims", exact=True)
def expand_dims(a: Arguments, _: ValueType) -> Any:
    """x with axes of size 1 at ``axes`` of the result."""
    return np.expand_dims(a["x"], _numbers(a["axes"]))


@operation("squeeze", exact=True)
def squeeze(a: Arguments, _: ValueType) -> Any:
    """x without the axes ``axes`` of size 1 (all of them, if none is named)."""
    axes = a.get("axes")
    return np.squeeze(a["x"], None if axes is None else _numbers(axes))


@operation("concat", exact=True)
def concat(a: Arguments, _: ValueType) -> Any:
    """Values joined along an axis; ``interleave`` takes one slice of each in turn. Scalars count as [1]."""
    values = [np.atleast_1d(value) for value in a["values"]]
    axis = int(a["axis"])
    if bool(a.get("interleave", False)):
        stacked = np.stack(values, axis=axis % values[0].ndim + 1)
        sizes = list(values[0].shape)
        sizes[axis] *= len(values)
        return stacked.reshape(sizes)
    return np.concatenate(values, axis=axis)


@operation("stack", exact=True)
def stack(a: Arguments, _: ValueType) -> Any:
    """Values joined along a new axis."""
    return np.stack(a["values"], axis=int(a["axis"]))


@operation("split", exact=True)
def split(a: Arguments, _: ValueType) -> Any:
    """x cut along an axis, in equal parts or in parts of ``split_sizes``."""
    x, axis = a["x"], int(a["axis"])
    if "split_sizes" in a:
        places = np.cumsum(_numbers(a["split_sizes"]))[:-1]
        return tuple(np.split(x, places.tolist(), axis=axis))
    return tuple(np.split(x, int(a["num_splits"]), axis=axis))


@operation("tile", exact=True)
def tile(a: Arguments, _: ValueType) -> Any:
    """x repeated along each axis."""
    return np.tile(a["x"], _numbers(a["reps"]))


@operation("reverse", exact=True)
def reverse(a: Arguments, _: ValueType) -> Any:
    """x from back to front along ``axes`` (all, if none is named)."""
    axes = a.get("axes")
    return np.flip(a["x"], None if axes is None else _numbers(axes))


@operation("pad", exact=True)
def pad(a: Arguments, _: ValueType) -> Any:
    """x with ``pad`` (before and after each of the last axes) filled by a constant, its mirror or its edge."""
    x, widths = a["x"], np.asarray(a["pad"]).reshape(-1, 2)
    pairs = [(0, 0)] * (x.ndim - len(widths)) + [(int(before), int(after)) for before, after in widths]
    match a.get("mode", "constant"):
        case "constant":
            return np.pad(x, pairs, constant_values=a.get("constant_val", 0))
        case "reflect":
            return np.pad(x, pairs, mode="reflect")
        case _:
            return np.pad(x, pairs, mode="edge")


@operation("band_part", exact=True)
def band_part(a: Arguments, _: ValueType) -> Any:
    """The last two axes with zeros outside of ``lower`` diagonals below and ``upper`` above the main one (-1: all)."""
    x, lower, upper = a["x"], int(a.get("lower", -1)), int(a.get("upper", -1))
    distance = np.arange(x.shape[-1])[None, :] - np.arange(x.shape[-2])[:, None]
    keep = ((lower < 0) | (-distance <= lower)) & ((upper < 0) | (distance <= upper))
    return np.where(keep, x, x.dtype.type(0))
