"""What a compressed weight of Core ML means, in numpy: affine codes, palettes, sparse.

The definitions are those of MIL's ``constexpr_*`` operations (``blockwise_shift_scale``, ``lut_to_dense``,
``sparse_to_dense`` in apple/coremltools, ``converters/mil/mil/ops/defs/iOS18/compression.py``). A weight is computed
and rounded to float16 once, where the program says that it is float16. Which codes stand for a float weight is ours:
round to nearest on the scale that is stored, the best of several scales in 4 bits, and k-means in one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Blocks",
    "Mask",
    "Palette",
    "cluster",
    "dequantise_blocks",
    "dequantise_palette",
    "holds_blocks",
    "largest_weights",
    "quantise_blocks",
    "quantise_palette",
]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
Wide = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_HALF_NORMAL = 2.0**-14
_ITERATIONS = 300
_ROUNDS = 40


@dataclass(frozen=True)
class Blocks:
    """Signed codes with a float16 scale for each block of a row: ``weight = code * scale``.

    ``codes [rows, columns]``; ``scales [rows, blocks]``, each for ``columns / blocks`` neighbours.
    """

    codes: Codes
    scales: npt.NDArray[np.float16]


@dataclass(frozen=True)
class Palette:
    """Codes that are places in a table: ``weight = table[code]``.

    ``codes [rows, columns]``; ``tables [groups, 2**bits]``, each for ``rows / groups`` neighbouring rows.
    """

    codes: npt.NDArray[np.uint8]
    tables: npt.NDArray[np.float16]


def quantise_blocks(weight: Floats, *, bits: int, block: int = 0, mask: Mask | None = None) -> Blocks | None:
    """Round-to-nearest codes for ``weight [rows, columns]`` with a scale for ``block`` columns (0: a row).

    Eight bits: ``scale = max|w| / 127``, or the float16 below it where that gives every weight exactly. Fewer: of the
    scales that spend the extreme value on the lowest code or stay symmetric, as they are or a little smaller, that with
    the least squared error. Where ``mask`` is false nothing is stored, and the codes are 0. ``None`` when a block's
    scale would be too small for float16 to hold precisely.
    ``block`` must divide ``columns``.
    """
    rows, columns = weight.shape
    width = block or columns
    tiles = weight.reshape(rows, columns // width, width)
    if mask is not None:
        tiles = np.where(mask.reshape(tiles.shape), tiles, np.float32(0))
    top = (1 << (bits - 1)) - 1
    peak = np.abs(tiles).max(axis=2)
    if _too_small(peak, top):
        return None
    scales = _half_up(peak / top)
    scales = _exact_scales(tiles, scales, top) if bits == 8 else _best_scales(tiles, peak, top, scales)
    return Blocks(_round(tiles, scales, top).reshape(rows, columns), scales)


def holds_blocks(weight: Floats, *, bits: int, block: int = 0) -> bool:
    """Whether :func:`quantise_blocks` can store ``weight``, without doing so."""
    rows, columns = weight.shape
    width = block or columns
    peak = np.abs(weight).reshape(rows, columns // width, width).max(axis=2)
    return not _too_small(peak, (1 << (bits - 1)) - 1)


def _too_small(peak: Floats, top: int) -> bool:
    return bool(((peak > 0) & (peak / top < _HALF_NORMAL)).any())


def _half_up(scale: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """The float16 at or above ``scale``, so that the extreme value is not clipped."""
    half = scale.astype(np.float16)
    return np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)


def _round(tiles: Floats, scales: npt.NDArray[np.float16], top: int) -> Codes:
    wide = scales.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    codes = tiles * inverse[..., None]
    np.clip(np.rint(codes, out=codes), -top - 1, top, out=codes)
    return np.asarray(codes, np.int8)


def _exact_scales(tiles: Floats, scales: npt.NDArray[np.float16], top: int) -> npt.NDArray[np.float16]:
    """The scale below where it gives the block exactly. Weights that are on such a grid already, rounded to float16 as
    Core ML computes with them, are found again by that: half of the largest ones were rounded up."""
    below = np.nextafter(scales, np.float16(0))
    again = (_round(tiles, below, top) * below.astype(np.float32)[..., None]).astype(np.float16)
    exact = (again.astype(np.float32) == tiles).all(axis=2)
    return np.where(exact, below, scales)


def _best_scales(tiles: Floats, peak: Floats, top: int, scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Of some scales for each block that with the least squared error; none may move a weight by more than one step of
    the symmetric grid, which is what verification allows."""
    extreme = np.take_along_axis(tiles, np.abs(tiles).argmax(axis=2)[..., None], axis=2)[..., 0]
    best = scales
    least = np.full(peak.shape, np.inf, np.float32)
    for divisor in (float(top), -(top + 1.0)):
        for shrink in (1.0, 0.96, 0.92, 0.88):
            tried = (
                _half_up(peak / top) if divisor > 0 and shrink == 1
                else np.asarray(extreme / divisor * np.float32(shrink), np.float32).astype(np.float16)
            )  # fmt: skip
            error = _round(tiles, tried, top) * tried.astype(np.float32)[..., None]
            error -= tiles
            np.square(error, out=error)
            total = error.sum(axis=2)
            total[error.max(axis=2) > np.square(peak / top)] = np.inf
            better = total < least
            best, least = np.where(better, tried, best), np.where(better, total, least)
    return best


def dequantise_blocks(grid: Blocks) -> Floats:
    """``[rows, columns]`` float32 products, not rounded to float16 yet."""
    rows, columns = grid.codes.shape
    blocks = grid.scales.shape[1]
    tiles = grid.codes.reshape(rows, blocks, columns // blocks).astype(np.float32)
    return (tiles * grid.scales.astype(np.float32)[..., None]).reshape(rows, columns)


def quantise_palette(weight: Floats, *, bits: int, group: int = 0, mask: Mask | None = None) -> Palette:
    """Tables of ``2**bits`` values for ``weight [rows, columns]`` by :func:`cluster`, one for ``group`` rows (0: one
    for all), and the place of each weight's nearest value. ``group`` must divide ``rows``. Where ``mask`` is false
    nothing is stored, and the codes are 0."""
    rows, columns = weight.shape
    tall = group or rows
    tables = np.empty((rows // tall, 1 << bits), np.float16)
    codes = np.zeros((rows // tall, tall * columns), np.uint8)
    parts = weight.astype(np.float16).reshape(rows // tall, tall * columns)
    kept = None if mask is None else mask.reshape(parts.shape)
    for index, part in enumerate(parts):
        values, counts = _counted(part if kept is None else part[kept[index]])
        tables[index] = cluster(values, counts, 1 << bits).astype(np.float16)
        near = _nearest(part, tables[index])
        codes[index] = near if kept is None else np.where(kept[index], near, 0)
    return Palette(codes.reshape(rows, columns), tables)


def _counted(values: npt.NDArray[np.float16]) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Different float16 numbers in rising order and how often each occurs: there are 65,536 at most."""
    counts = np.bincount(np.ascontiguousarray(values).view(np.uint16).reshape(-1), minlength=1 << 16)
    bits = np.flatnonzero(counts).astype(np.uint16)
    numbers = bits.view(np.float16).astype(np.float32)
    order = np.argsort(numbers, kind="stable")
    return numbers[order], counts[bits][order].astype(np.float64)


def cluster(values: Floats, counts: npt.NDArray[np.float64], size: int) -> Floats:
    """``size`` centres of one-dimensional k-means over ``values`` (rising, different) that occur ``counts`` times.

    Lloyd's iteration on running sums, begun where equal shares of the cube root of the density lie, which is where
    centres lie for fine tables (Panter & Dite, 1951); then clusters are merged in one place and halved in another as
    long as that helps. No chance is involved: the same weights give the same table. Fewer values than ``size`` are all
    kept, the last one repeated.
    """
    if len(values) == 0:
        return np.zeros(size, np.float32)
    if len(values) <= size:
        return np.concatenate([values, np.repeat(values[-1:], size - len(values))])
    sums = _Sums(values.astype(np.float64), counts)
    bounds = sums.settle(_begin(sums.values, counts, size))
    count = max(1, size // 8)
    for _ in range(_ROUNDS):
        moved = sums.swap(bounds, count)
        if moved is not None and sums.total(moved) < sums.total(bounds):
            bounds = moved
        elif count == 1:
            break
        else:
            count //= 2
    return sums.means(bounds).astype(np.float32)


class _Sums:
    """Running sums of rising ``values``, from which the cost of any run of them follows at once. ``bounds`` [size + 1]
    cut them into clusters, none of them empty."""

    def __init__(self, values: Wide, counts: Wide) -> None:
        self.values = values
        self._mass, self._moment, self._square = (
            np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts * values, counts * values * values)
        )

    def means(self, bounds: Places) -> Wide:
        """The mean of each cluster."""
        return np.asarray(np.diff(self._moment[bounds]) / np.diff(self._mass[bounds]))

    def cost(self, begin: Places, end: Places) -> Wide:
        """The squared error of each run around its mean."""
        mass, moment, square = (part[end] - part[begin] for part in (self._mass, self._moment, self._square))
        return np.asarray(square - moment * moment / mass)

    def total(self, bounds: Places) -> float:
        """The squared error of all clusters."""
        return float(self.cost(bounds[:-1], bounds[1:]).sum())

    def settle(self, centres: Wide) -> Places:
        """Lloyd's iteration from ``centres``, until nothing moves."""
        bounds = self._cut(centres)
        for _ in range(_ITERATIONS):
            again = self._cut(self.means(bounds))
            if np.array_equal(again, bounds):
                break
            bounds = again
        return bounds

    def swap(self, bounds: Places, count: int) -> Places | None:
        """``count`` pairs of neighbours are merged where that costs least, as many clusters are halved where that gains
        most; then the iteration settles. ``None`` where too few can be halved."""
        cost = self.cost(bounds[:-1], bounds[1:])
        merged = self.cost(bounds[:-2], bounds[2:]) - cost[1:] - cost[:-1]
        middle = np.searchsorted(self.values, self.means(bounds), side="right")
        can = np.flatnonzero((middle > bounds[:-1]) & (middle < bounds[1:]))
        if len(can) < count:
            return None
        gains = cost[can] - self.cost(bounds[can], middle[can]) - self.cost(middle[can], bounds[can + 1])
        split = middle[can[np.argsort(-gains, kind="stable")[:count]]]
        joined = bounds[1 + np.argsort(merged, kind="stable")[:count]]
        places = np.unique(np.concatenate([np.setdiff1d(bounds, joined), split]))
        return self.settle(self.means(places)) if len(places) == len(bounds) else None

    def _cut(self, centres: Wide) -> Places:
        """Bounds halfway between ``centres``; a cluster that would be empty takes one value of its neighbour."""
        size, total = len(centres), len(self.values)
        inner = np.searchsorted(self.values, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], inner, [total]])
        steps = np.arange(size + 1)
        bounds = np.maximum.accumulate(bounds - steps) + steps
        return np.asarray(np.minimum(bounds, total - size + steps))


def _begin(values: Wide, counts: Wide, size: int) -> Wide:
    """Where :func:`cluster` begins. Between two neighbours the density is their count over their distance; the integral
    of its cube root is shared out equally."""
    gaps = np.diff(values)
    between = (counts[1:] + counts[:-1]) / 2
    share = np.concatenate([[0.0], np.cumsum(between ** (1 / 3) * gaps ** (2 / 3))])
    return np.asarray(np.interp((np.arange(size) + 0.5) / size * share[-1], share, values))


def _nearest(values: npt.NDArray[np.float16], table: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """The place in ``table`` (rising) of the nearest entry, the lower one of two."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    wide = table.astype(np.float32)
    places = np.searchsorted((wide[1:] + wide[:-1]) / 2, every).astype(np.uint8)
    return places[values.view(np.uint16)]


def dequantise_palette(grid: Palette) -> Floats:
    """``[rows, columns]`` float32 values of the tables."""
    rows, columns = grid.codes.shape
    groups = len(grid.tables)
    wide = grid.tables.astype(np.float32)
    codes = grid.codes.reshape(groups, rows // groups * columns)
    return np.take_along_axis(wide, codes.astype(np.intp), axis=1).reshape(rows, columns)


def largest_weights(weight: Floats, percent: int) -> Mask:
    """Which weights stay when ``percent`` of them are dropped, the smallest magnitudes first; of equal ones the later.

    Magnitudes are compared as float16 numbers, which is how they are stored.
    """
    magnitude = np.ascontiguousarray(np.abs(weight).astype(np.float16)).view(np.uint16).reshape(-1)
    drop = weight.size * percent // 100
    below = np.cumsum(np.bincount(magnitude, minlength=1 << 16))
    edge = int(np.searchsorted(below, drop, side="left")) if drop else -1
    keep: Any = magnitude > edge
    if drop:
        ties = np.flatnonzero(magnitude == edge)
        keep[ties[drop - (int(below[edge - 1]) if edge else 0) :]] = True
    return np.asarray(keep).reshape(weight.shape)
