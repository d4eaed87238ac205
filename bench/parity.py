"""The same inputs on several machines: how far their outputs are apart, and whether that is too far. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FLOAT_LIMIT", "INTEGER_LIMIT", "Difference", "default_limit", "difference"]

Floats = npt.NDArray[np.float32]

FLOAT_LIMIT = 1e-4
"""Float kernels sum in different orders: 1e-6 was measured, and a hundred times that is no rounding."""
INTEGER_LIMIT = 0.05
"""Where activations are quantised as they come, rounding in the last bit of a float moves some by a whole level of 127:
0.5 % was measured for a transformer with exact sums everywhere, up to 4 % for a decoder 64 wide; 14 to 30 % where int8
sums are cut."""


@dataclass(frozen=True)
class Difference:
    """Of two outputs: ``rms`` of the difference over that of the reference, the ``largest`` absolute difference over
    the reference's rms, how many ``argmax_changes`` there are among ``positions`` (``None`` for embeddings, which have
    no first choice), and whether they are ``equal`` bit for bit."""

    rms: float
    largest: float
    argmax_changes: int | None
    positions: int
    equal: bool


def default_limit(quantisation: str) -> float:
    """How much two machines may differ (rms, relative) by the artifact's quantisation.

    >>> default_limit("fp32"), default_limit("int8-dynamic")
    (0.0001, 0.05)
    """
    return FLOAT_LIMIT if quantisation.startswith(("fp32", "fp16", "f32", "f16")) else INTEGER_LIMIT


def difference(output: Floats, reference: Floats, mask: npt.NDArray[np.int64], task: str) -> Difference:
    """Compare outputs ``[B, T, V]`` (with ``mask [B, T]``: padding does not count), ``[B, C]`` or ``[B, D]``.

    Raises :class:`ValueError` when the shapes differ. NaN on one side only is an infinite difference.
    """
    if output.shape != reference.shape:
        raise ValueError(f"outputs of shapes {list(output.shape)} and {list(reference.shape)}")
    a, b = (rows[mask.astype(bool)] if rows.ndim == 3 else rows for rows in (output, reference))
    left, right = a.astype(np.float64), b.astype(np.float64)
    apart = np.where(np.isnan(left) & np.isnan(right), 0.0, left - right)
    size = float(np.sqrt(np.mean(np.square(np.nan_to_num(right)))))
    with np.errstate(invalid="ignore"):
        rms, largest = float(np.sqrt(np.mean(np.square(apart)))), float(np.abs(apart).max(initial=0.0))
    scale = size or 1.0
    changes = None if task == "feature-extraction" else int((a.argmax(-1) != b.argmax(-1)).sum())
    if np.isnan(rms):
        rms = largest = float("inf")
    return Difference(rms / scale, largest / scale, changes, len(a), bool(np.array_equal(a, b, equal_nan=True)))
