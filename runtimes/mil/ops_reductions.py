"""Operations over axes: sums, extremes, norms, softmax, sorting. Sums are taken in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .program import ValueType
from .registry import Arguments, operation

__all__ = ["softmax_of"]


def _axes(a: Arguments) -> tuple[int, ...] | None:
    axes = a.get("axes")
    return None if axes is None else tuple(int(axis) for axis in np.atleast_1d(axes))


def _reduction(kind: str, function: Callable[..., Any]) -> None:
    def handler(a: Arguments, _: ValueType) -> Any:
        keep = bool(a.get("keep_dims", False))
        return np.asarray(function(a["x"], axis=_axes(a), keepdims=keep))

    operation(kind)(handler)


def _mean(x: Any, *, axis: Any, keepdims: bool) -> Any:
    return np.mean(x, axis=axis, keepdims=keepdims, dtype=x.dtype)


def _log_sum_exp(x: Any, *, axis: Any, keepdims: bool) -> Any:
    top = np.max(x, axis=axis, keepdims=True)
    total = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return total if keepdims else np.squeeze(total, axis=axis)


def _sum_square(x: Any, *, axis: Any, keepdims: bool) -> Any:
    return np.sum(np.square(x), axis=axis, keepdims=keepdims)


_reduction("reduce_sum", lambda x, axis, keepdims: np.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype))
_reduction("reduce_mean", _mean)
_reduction("reduce_max", np.max)
_reduction("reduce_min", np.min)
_reduction("reduce_prod", lambda x, axis, keepdims: np.prod(x, axis=axis, keepdims=keepdims, dtype=x.dtype))
_reduction("reduce_sum_square", _sum_square)
_reduction("reduce_l1_norm", lambda x, axis, keepdims: np.sum(np.abs(x), axis=axis, keepdims=keepdims))
_reduction("reduce_l2_norm", lambda x, axis, keepdims: np.sqrt(_sum_square(x, axis=axis, keepdims=keepdims)))
_reduction("reduce_log_sum", lambda x, axis, keepdims: np.log(np.sum(x, axis=axis, keepdims=keepdims)))
_reduction("reduce_log_sum_exp", _log_sum_exp)


def _arg(kind: str, function: Callable[..., Any]) -> None:
    def handler(a: Arguments, _: ValueType) -> Any:
        axis, keep = int(a.get("axis", -1)), bool(a.get("keep_dims", False))
        return np.asarray(function(a["x"], axis=axis, keepdims=keep)).astype(np.int32)

    operation(kind)(handler)


_arg("reduce_argmax", np.argmax)
_arg("reduce_argmin", np.argmin)


def softmax_of(x: Any, axis: int = -1) -> Any:
    """e^x / sum(e^x) along ``axis``, with the largest value taken off first."""
    result = x - x.max(axis=axis, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=axis, keepdims=True)
    return result


@operation("softmax")
def softmax(a: Arguments, _: ValueType) -> Any:
    """Softmax along one axis."""
    return softmax_of(a["x"], int(a.get("axis", -1)))


@operation("layer_norm")
def layer_norm(a: Arguments, _: ValueType) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over ``axes``."""
    x = a["x"]
    axes = _axes(a) or tuple(range(x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    centred *= 1 / np.sqrt(variance + a.get("epsilon", np.float32(1e-5)))
    if "gamma" in a:
        centred *= a["gamma"]
    if "beta" in a:
        centred += a["beta"]
    return centred


@operation("cumsum")
def cumsum(a: Arguments, _: ValueType) -> Any:
    """Running sum along an axis, ``reverse`` from the end, ``exclusive`` without the element itself."""
    x, axis = a["x"], int(a.get("axis", 0))
    reverse, exclusive = bool(a.get("reverse", False)), bool(a.get("exclusive", False))
    source = np.flip(x, axis) if reverse else x
    total = np.cumsum(source, axis=axis, dtype=x.dtype)
    if exclusive:
        total = total - source
    return np.ascontiguousarray(np.flip(total, axis)) if reverse else total


@operation("topk", exact=True)
def topk(a: Arguments, _: ValueType) -> Any:
    """The ``k`` largest (``ascending``: smallest) values along an axis and their places; ties: the first one."""
    x, axis, count = a["x"], int(a.get("axis", -1)), int(a.get("k", 1))
    order = np.argsort(x if bool(a.get("ascending", False)) else -x, axis=axis, kind="stable")
    places = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(x, places, axis), places.astype(np.int32)
