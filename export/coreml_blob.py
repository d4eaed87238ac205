"""The weight file of a Core ML package: arrays one after the other, each behind 64 bytes that describe it.

The layout is that of ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp`` in apple/coremltools, version 2;
:mod:`edgestill.runtimes.milproto` reads it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["BlobCounter", "BlobWriter", "pack_bits"]

_ALIGNMENT = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2
# BlobDataType of StorageFormat.hpp, and the bits of an element.
_DTYPES = {
    "float16": (1, 16), "float32": (2, 32), "uint8": (3, 8), "int8": (4, 8), "int16": (6, 16), "uint16": (7, 16),
    "int4": (8, 4), "uint1": (9, 1), "uint2": (10, 2), "uint4": (11, 4), "uint3": (12, 3), "uint6": (13, 6),
    "int32": (14, 32), "uint32": (15, 32),
}  # fmt: skip


class BlobWriter:
    """Writes a weight file array by array; only one of them is in memory at a time."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._count = 0
        self._file.write(bytes(_ALIGNMENT))

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._file.write(struct.pack("<II", self._count, _VERSION))
        self._file.close()

    def write(self, array: npt.NDArray[Any], dtype: str) -> int:
        """Append ``array`` (codes under a byte: one a byte, two's complement) and return the offset that a program
        names it by."""
        code, bits = _DTYPES[dtype]
        data = pack_bits(array, bits) if bits < 8 else np.ascontiguousarray(array).tobytes()
        offset = self._file.tell()
        padding = 8 * len(data) - array.size * bits
        self._file.write(
            struct.pack("<IIQQQ", _SENTINEL, code, len(data), offset + _ALIGNMENT, padding).ljust(64, b"\0")
        )
        self._file.write(data)
        self._file.write(bytes(-len(data) % _ALIGNMENT))
        self._count += 1
        return offset


class BlobCounter:
    """A :class:`BlobWriter` that counts the bytes of its file, ``size_bytes``, and writes none."""

    def __init__(self) -> None:
        self.size_bytes = _ALIGNMENT

    def write(self, array: npt.NDArray[Any], dtype: str) -> int:
        """The offset that ``array`` would get."""
        data = -(-array.size * _DTYPES[dtype][1] // 8)
        offset = self.size_bytes
        self.size_bytes += _ALIGNMENT + data + -data % _ALIGNMENT
        return offset


def pack_bits(codes: npt.NDArray[Any], bits: int) -> bytes:
    """Codes of ``bits`` bits in a row, the lowest bit first, across the borders of bytes.

    >>> pack_bits(np.array([1, 2, 3, -1], np.int8), 4).hex()
    '21f3'
    """
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if bits == 4 and flat.size % 2 == 0:
        return ((flat[::2] & 15) | (flat[1::2] << 4)).tobytes()
    parts = []
    for begin in range(0, flat.size, 1 << 20):  # a multiple of 8, so that each part ends with a whole byte
        stream = np.unpackbits(flat[begin : begin + (1 << 20), None], axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(stream.reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)
