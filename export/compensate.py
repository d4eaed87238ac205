"""Rounding a matrix so that its *outputs* stay: each column's rounding error is made good by the columns after it.

This is GPTQ (Frantar et al., *GPTQ: accurate post-training quantization*, 2022), which is OBQ with one order for all
rows. With ``H`` the second moments of a matrix's inputs, the error that counts is ``tr(D H Dᵀ)`` for a change ``D`` of
the weights, not ``|D|²``. Any codes are legal, so a decoder never knows: a file of the same size says more.

What a grid is stays outside. :func:`feed_back` is the method itself; :mod:`.onnx_compensation` gives it columns whose
scales are chosen before. :func:`compensate` asks a :class:`Grid` to choose the scales of a block when its turn comes;
GGML's grids stand in :mod:`.compensate_ggml`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Grid", "Prepared", "Rounding", "compensate", "feed_back", "output_error", "prepare", "spread"]

Floats = npt.NDArray[np.float32]

# Columns that are corrected one by one; what lies beyond gets their corrections in one product.
_PANEL = 32
DAMPING = 0.01
"""Share of the mean of ``diag(H)`` that is added to it: what calibration did not see may still come."""


class Rounding(Protocol):
    """One block of all rows while it is rounded. Arrays have the columns first: ``[columns, rows]``."""

    def begin_part(self, index: int, tile: Floats, weight: Floats) -> None:
        """Choose the scale of part ``index`` for the values ``tile [part, rows]`` as they stand now."""

    def round(self, column: int, values: Floats) -> Floats:
        """Keep the codes of ``values [rows]`` in this column, and return what they decode to."""


R_co = TypeVar("R_co", bound=Rounding, covariant=True)


class Grid(Protocol[R_co]):
    """A type with blocks of ``width`` columns, whose scales are chosen for ``part`` columns at a time."""

    @property
    def width(self) -> int:
        """Columns of a block."""

    @property
    def part(self) -> int:
        """Columns that share a scale; divides ``width``."""

    def begin(self, tile: Floats, weight: Floats) -> R_co:
        """A block of the values ``tile [width, rows]``, whose squared errors weigh ``weight [width]``."""


R = TypeVar("R", bound=Rounding)


@dataclass(frozen=True)
class Compensated(Generic[R]):
    """``decoded [rows, columns]`` is what was stored; ``blocks`` hold the codes, in the order of the columns."""

    decoded: Floats
    blocks: Sequence[R]


def spread(hessian: npt.NDArray[np.floating], damping: float = DAMPING) -> Floats:
    """The upper Cholesky factor of ``(H + damping · mean(diag H) · I)⁻¹`` ``[columns, columns]``: row ``j`` says how an
    error in column ``j`` is spread over the columns after it. Columns that never see input weigh as the others' mean.
    """
    matrix = np.array(hessian, np.float64)
    mean = float(np.mean(np.diag(matrix))) or 1.0
    dead = np.diag(matrix) <= 0
    matrix[dead, dead] = mean
    matrix[np.diag_indices_from(matrix)] += damping * mean
    inverse = np.linalg.inv(matrix)
    return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)


@dataclass(frozen=True)
class Prepared:
    """What :func:`compensate` makes of a Hessian first, for several calls: blocks in their ``order``, and ``upper``."""

    width: int
    order: npt.NDArray[np.int64]
    upper: Floats


def prepare(hessian: npt.NDArray[np.floating], width: int, damping: float = DAMPING) -> Prepared:
    """For grids with blocks of ``width``. They are taken in the order of falling importance, so that the errors of what
    matters can still be made good."""
    matrix = np.asarray(hessian)
    order = np.argsort(-np.diag(matrix).reshape(-1, width).mean(axis=1), kind="stable")
    places = (order[:, None] * width + np.arange(width)).reshape(-1)
    return Prepared(width, order, spread(matrix[np.ix_(places, places)], damping))


def feed_back(left: Floats, upper: Floats, rounded: Callable[[int], Floats], *, panel: int) -> None:
    """The whole idea: round ``left [columns, rows]`` from the first column to the last, and take each one's error out
    of those that are still to come, as ``upper`` (:func:`spread`) says. Changes ``left``.

    ``rounded(column)`` keeps the codes of ``left[column]`` as it stands then, and gives what they decode to. When the
    first column of a panel of ``panel`` comes, all columns are as the ones before have left them; within the panel,
    its own.
    """
    columns, rows = left.shape
    for first in range(0, columns, panel):
        end = min(first + panel, columns)
        errors = np.empty((end - first, rows), np.float32)
        for column in range(first, end):
            error = errors[column - first]
            np.subtract(left[column], rounded(column), out=error)
            error /= upper[column, column]
            if column + 1 < end:
                left[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        if end < columns:
            left[end:] -= upper[first:end, end:].T @ errors


def compensate(weight: Floats, hessian: npt.NDArray[np.floating] | Prepared, grid: Grid[R], *,
               damping: float = DAMPING) -> Compensated[R]:  # fmt: skip
    """Round ``weight [rows, columns]`` onto ``grid`` with the least change of its outputs.

    ``hessian [columns, columns]`` are the second moments of its inputs, ``E[x xᵀ]``; a diagonal one gives plain
    importance-weighted rounding. ``columns`` must be whole blocks. Each row is rounded by itself.
    """
    columns, width = weight.shape[1], grid.width
    ready = hessian if isinstance(hessian, Prepared) else prepare(hessian, width, damping)
    if ready.width != width:
        raise ValueError(f"prepared for blocks of {ready.width}, not {width}")
    order, upper = ready.order, ready.upper
    places = (order[:, None] * width + np.arange(width)).reshape(-1)
    left = np.ascontiguousarray(weight.T[places], np.float32)  # [columns, rows], as it still has to be rounded
    importance = (1 / np.diag(upper).astype(np.float64) ** 2).astype(np.float32)
    decoded = np.empty_like(left)
    blocks: dict[int, R] = {}

    def rounded(column: int) -> Floats:
        begun, inside = divmod(column, width)
        if inside == 0:
            whole = slice(column, column + width)
            blocks[int(order[begun])] = grid.begin(left[whole], importance[whole])
        block = blocks[int(order[begun])]
        if inside % grid.part == 0:
            part = slice(column, column + grid.part)
            block.begin_part(inside // grid.part, left[part], importance[part])
        decoded[column] = block.round(inside, left[column])
        return decoded[column]

    feed_back(left, upper, rounded, panel=min(_PANEL, width))
    back = np.empty_like(places)
    back[places] = np.arange(columns)
    return Compensated(np.ascontiguousarray(decoded[back].T), [blocks[at] for at in range(len(order))])


def output_error(change: Floats, hessian: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """``[rows]``: mean squared change of each output when the weights change by ``change [rows, columns]``."""
    return np.einsum("rc,rc->r", change @ np.asarray(hessian, np.float32), change, dtype=np.float64)
