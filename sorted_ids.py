"""Sets of numbers in nearly as few bits as they can be told in: what the ids of a big vocabulary take on disk.

A row of k different numbers below ``universe``, ascending, is split (Elias 1974, Fano 1971): the low ``width`` bits of
each stand side by side, and of the rest of each number h the bit h + place is set. That is at most 2 bits a number more
than the width, and every row of one k and universe has the same size, so that a row can be found without an index.
64 numbers below 151,665 take 106 bytes; as 32-bit numbers they take 256.

Bits are counted from the lowest one of the first byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["coded_bytes", "decode_sets", "encode_sets"]

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_MOST_BITS = 24  # of the low part: what a load of four bytes holds wherever it begins


def coded_bytes(count: int, universe: int) -> int:
    """Bytes of a row of ``count`` different numbers below ``universe``.

    >>> coded_bytes(64, 151_665), coded_bytes(64, 262_144), coded_bytes(1, 70_000)
    (106, 112, 3)
    """
    return sum(_parts(count, universe)[1:])


def encode_sets(numbers: npt.NDArray[Any], universe: int) -> Bytes:
    """Rows ``[n, coded_bytes]`` of ``numbers`` [n, k], strictly ascending in each row; :class:`ValueError` if not."""
    wide = np.asarray(numbers, dtype=np.int64)
    count = wide.shape[1]
    if wide.size and (wide.min() < 0 or wide.max() >= universe or (np.diff(wide, axis=1) <= 0).any()):
        raise ValueError(f"not {count} ascending numbers below {universe}")
    width, low_bytes, high_bytes = _parts(count, universe)
    low = ((wide[:, :, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(len(wide), -1)
    high = np.zeros((len(wide), 8 * high_bytes), dtype=np.uint8)
    np.put_along_axis(high, (wide >> width) + np.arange(count), 1, axis=1)
    parts = [np.packbits(bits, axis=1, bitorder="little") for bits in (low, high)]
    assert parts[0].shape[1] == low_bytes
    return np.concatenate(parts, axis=1)


def decode_sets(rows: Bytes, count: int, universe: int) -> Ints:
    """The numbers ``[n, count]`` of ``rows`` from :func:`encode_sets`; :class:`ValueError` for what is none."""
    width, low_bytes, high_bytes = _parts(count, universe)
    if rows.shape[1] != low_bytes + high_bytes:
        raise ValueError(f"rows of {rows.shape[1]} bytes, {low_bytes + high_bytes} were expected")
    # Each number's low bits from four bytes: what a load takes too much is shifted or masked away.
    first = width * np.arange(count)
    places = np.minimum(first[:, None] // 8 + np.arange(4), rows.shape[1] - 1)
    loads = np.ascontiguousarray(rows[:, places]).view("<u4")[:, :, 0]
    low = (loads >> (first % 8).astype(np.uint32)) & np.uint32((1 << width) - 1)
    set_bits = np.nonzero(np.unpackbits(rows[:, low_bytes:], axis=1, bitorder="little"))[1]
    if len(set_bits) != len(rows) * count:
        raise ValueError("rows that are not coded sets")
    high = set_bits.reshape(len(rows), count) - np.arange(count)
    found: Ints = (high << width) + low.astype(np.int64)
    return found


def _parts(count: int, universe: int) -> tuple[int, int, int]:
    """Bits of a low part, bytes of all of them, bytes of the high bits: the width that takes the fewest."""
    if not 1 <= count <= universe:
        raise ValueError(f"{count} different numbers below {universe}")

    def sizes(width: int) -> tuple[int, int, int]:
        return width, -(-count * width // 8), -(-(count + ((universe - 1) >> width)) // 8)

    return min((sizes(width) for width in range(_MOST_BITS + 1)), key=lambda part: (part[1] + part[2], part[0]))
