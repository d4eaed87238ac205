"""Matrix products, accumulated in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from .ops_reductions import softmax_of
from .program import ValueType
from .registry import Arguments, operation

__all__: list[str] = []


@operation("linear")
def linear(a: Arguments, _: ValueType) -> Any:
    """x [..., in] @ weight [out, in].T + bias [out]."""
    x, weight = a["x"], a["weight"]
    rows = x.reshape(-1, x.shape[-1])
    # One row (decoding): a matrix-vector product reads the weights once, as they lie.
    result = (weight @ rows[0])[None] if len(rows) == 1 else rows @ weight.T
    if "bias" in a:
        result += a["bias"]
    return result.reshape(*x.shape[:-1], weight.shape[0])


@operation("matmul")
def matmul(a: Arguments, _: ValueType) -> Any:
    """x @ y over the last two axes, each transposed on request, the others broadcast."""
    x, y = a["x"], a["y"]
    if a.get("transpose_x", False):
        x = np.swapaxes(x, -1, -2)
    if a.get("transpose_y", False):
        y = np.swapaxes(y, -1, -2)
    return np.asarray(x @ y)


@operation("scaled_dot_product_attention")
def attention(a: Arguments, _: ValueType) -> Any:
    """softmax(query @ key.T / sqrt(E) + mask) @ value; a boolean mask keeps where it is true (iOS 18)."""
    query, key, value = a["query"], a["key"], a["value"]
    scores = query @ np.swapaxes(key, -1, -2)
    scores /= np.float32(np.sqrt(query.shape[-1]))
    mask = a.get("attn_mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return softmax_of(scores) @ value


@operation("einsum")
def einsum(a: Arguments, _: ValueType) -> Any:
    """Sum of products by ``equation``."""
    return np.einsum(a["equation"], *a["values"], optimize=True).astype(np.float32)
