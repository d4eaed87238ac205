"""GGML's grids for :mod:`.compensate`: scales searched for the least weighted error, codes packed as llama.cpp reads.

A decoder of GGML takes any codes and scales, so the choice is free: scales come from a search with a least-squares step
(like ``make_qx_quants`` in ``ggml-quants.c``, with more candidates and weights from the inputs' second moments), the
codes from :func:`.compensate.compensate`. What the bytes mean: :mod:`edgestill.ggml_grids`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import Unsupported
from ..ggml_grids import IQ4_VALUES, ggml_grid
from .compensate import DAMPING, Prepared, compensate, prepare
from .compensate_ggml_pack import pack
from .compensate_scales import fit_affine, fit_symmetric, nearest_code

__all__ = ["ENCODABLE", "GgmlBlock", "GgmlLayout", "encode_ggml", "layout_of"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Rows that are rounded at a time: their panel stays in the cache.
_ROWS = 2048


class GgmlLayout:
    """A type's shape: ``width`` columns a block, ``part`` a scale, its levels, and how a part's scale is stored.

    ``levels [n]`` are what codes stand for before the scale. ``affine`` types have an offset too. ``scales`` are the
    lowest and highest whole number that a part's own scale takes where a block shares one float16 (``None``: a float16
    for each part), ``minima`` likewise for offsets.
    """

    def __init__(
        self, grid: str, part: int, levels: Floats, *, affine: bool = False, scales: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.grid = grid
        self.width = ggml_grid(grid).elements
        self.part = part
        self.levels = levels
        self.affine = affine
        self.scales = scales

    def begin(self, tile: Floats, weight: Floats) -> GgmlBlock:
        """See :class:`.compensate.Grid`."""
        return GgmlBlock(self, tile, weight)


class GgmlBlock:
    """One block of all rows: ``codes [width, rows]``; ``step`` and ``offset [rows]`` shared by the block (float16), and
    the whole numbers ``scale`` and ``minimum [parts, rows]`` of its parts (ones where a block is one part)."""

    def __init__(self, layout: GgmlLayout, tile: Floats, weight: Floats) -> None:
        self.layout = layout
        width, rows = tile.shape
        parts = width // layout.part
        self.codes = np.zeros((width, rows), np.uint8)
        self.scale = np.ones((parts, rows), np.int16)
        self.minimum = np.ones((parts, rows), np.int16)
        self.step = np.zeros(rows, np.float32)
        self.offset = np.zeros(rows, np.float32)
        if layout.scales is not None:
            self._share(tile, weight)

    def _share(self, tile: Floats, weight: Floats) -> None:
        """The block's own float16: the largest scale of its parts takes the largest whole number."""
        assert self.layout.scales is not None
        part, (low, high) = self.layout.part, self.layout.scales
        found = [
            self._fit(tile[at : at + part], weight[at : at + part]) for at in range(0, len(tile), part)
        ]  # fmt: skip
        steps = np.stack([step for step, _ in found])
        if low < 0:  # the extreme of either sign goes to the lowest number, which reaches one further
            extreme = np.take_along_axis(steps, np.abs(steps).argmax(axis=0)[None], axis=0)[0]
            self.step = _half(extreme / low)
        else:
            self.step = _half(steps.max(axis=0) / high)
        if self.layout.affine:
            self.offset = _half(np.stack([offset for _, offset in found]).max(axis=0) / high)

    def _fit(self, tile: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Step and offset (subtracted) of a part, as real numbers."""
        layout = self.layout
        if not layout.affine:
            return fit_symmetric(tile, weight, layout.levels), self.offset
        return fit_affine(tile, weight, len(layout.levels) - 1, lowest=None if layout.scales is None else 0.0)

    def begin_part(self, index: int, tile: Floats, weight: Floats) -> None:
        """See :class:`.compensate.Rounding`."""
        layout = self.layout
        step, offset = self._fit(tile, weight)
        if layout.scales is None:
            self.step = self._step = _half(step)
            self.offset = _half(offset) if layout.affine else self.offset
            self._offset = self.offset
        else:
            low, high = layout.scales
            self.scale[index] = np.clip(np.rint(step * _inverse(self.step)), low, high)
            self._step = self.step * self.scale[index]
            self._offset = self.offset
            if layout.affine:
                self.minimum[index] = np.clip(np.rint(offset * _inverse(self.offset)), 0, high)
                self._offset = self.offset * self.minimum[index]
        self._inverse = _inverse(self._step)

    def round(self, column: int, values: Floats) -> Floats:
        """See :class:`.compensate.Rounding`."""
        levels = self.layout.levels
        scaled = (values + self._offset if self.layout.affine else values) * self._inverse
        if self.layout.grid.startswith("iq4"):
            code = nearest_code(scaled)
            self.codes[column] = code
            level = levels[code]
        else:
            level = np.rint(scaled, out=scaled)
            np.clip(level, levels[0], levels[-1], out=level)
            self.codes[column] = level - levels[0]
        level *= self._step
        if self.layout.affine:
            level -= self._offset
        return level


def _half(values: Floats) -> Floats:
    """What float16 keeps of it; what it can't hold becomes its largest."""
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)


def _inverse(values: Floats) -> Floats:
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values != 0)


def _whole(low: int, high: int) -> Floats:
    return np.arange(low, high + 1, dtype=np.float32)


_IQ4 = np.asarray(IQ4_VALUES, np.float32)

_LAYOUTS = {
    layout.grid: layout
    for layout in (
        GgmlLayout("q4_0", 32, _whole(-8, 7)),
        GgmlLayout("q4_1", 32, _whole(0, 15), affine=True),
        GgmlLayout("q5_0", 32, _whole(-16, 15)),
        GgmlLayout("q5_1", 32, _whole(0, 31), affine=True),
        GgmlLayout("q8_0", 32, _whole(-127, 127)),
        GgmlLayout("iq4_nl", 32, _IQ4),
        GgmlLayout("iq4_xs", 32, _IQ4, scales=(-32, 31)),
        GgmlLayout("q2_k", 16, _whole(0, 3), affine=True, scales=(0, 15)),
        GgmlLayout("q3_k", 16, _whole(-4, 3), scales=(-32, 31)),
        GgmlLayout("q4_k", 32, _whole(0, 15), affine=True, scales=(0, 63)),
        GgmlLayout("q5_k", 32, _whole(0, 31), affine=True, scales=(0, 63)),
        GgmlLayout("q6_k", 16, _whole(-32, 31), scales=(-128, 127)),
    )
}
ENCODABLE = tuple(_LAYOUTS)
"""Types that :func:`encode_ggml` writes."""


def layout_of(grid: str) -> GgmlLayout:
    """The layout of a type; :class:`Unsupported` for one that is not in :data:`ENCODABLE`."""
    if grid not in _LAYOUTS:
        raise Unsupported(f"no compensating quantiser for {grid!r}", hint="known: " + ", ".join(ENCODABLE))
    return _LAYOUTS[grid]


def encode_ggml(
    grid: str, weight: Floats, hessian: npt.NDArray[np.floating] | Prepared, damping: float = DAMPING
) -> Bytes:
    """``weight [rows, columns]`` in GGML type ``grid``, bytes ``[rows, bytes of a row]``, with each error made good
    where the inputs' second moments ``hessian [columns, columns]`` say that it counts."""
    layout = layout_of(grid)
    ready = hessian if isinstance(hessian, Prepared) else prepare(hessian, layout.width, damping)
    parts: Sequence[Bytes] = [
        pack(grid, compensate(weight[at : at + _ROWS], ready, layout).blocks) for at in range(0, len(weight), _ROWS)
    ]
    return np.concatenate(parts)
