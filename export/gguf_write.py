"""Writes a GGUF file (version 3, little-endian) tensor by tensor, so that memory follows a piece of one.

Format: ``docs/gguf.md`` of ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import EdgestillError
from ..files import disk_errors
from ..grids import GGML_GRIDS, ggml_size
from .gguf_metadata import Metadata

__all__ = ["TensorSlot", "write_gguf"]

TensorSlot = tuple[str, tuple[int, ...], str]
"""Name, shape (rows first) and grid (``"q4_k"``) of a tensor to come."""

_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")
_UINT8, _INT32, _UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 5, 4, 6, 7, 8, 9


def write_gguf(
    path: Path, metadata: Metadata, tensors: Sequence[TensorSlot], read: Callable[[str], Iterable[Any]]
) -> None:
    """Write ``metadata`` and then each of ``tensors``, asking ``read(name)`` for the pieces of its stored bytes (in
    order, anything with the buffer protocol) when its turn comes.

    Keys and tensors keep their order; the same input gives the same bytes. Raises
    :class:`edgestill.errors.ResourceExhausted` when the disk is full.
    """
    with disk_errors(path), path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            stream.write(_string(key) + _value(value))
        offset = 0
        for name, shape, grid in tensors:
            stream.write(_string(name) + struct.pack("<I", len(shape)))
            stream.write(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), GGML_GRIDS[grid].number, offset))
            offset += _padded(ggml_size(grid, shape))
        _pad(stream)
        for name, shape, grid in tensors:
            written = sum(stream.write(memoryview(piece).cast("B")) for piece in read(name))
            if written != ggml_size(grid, shape):
                raise EdgestillError(
                    f"{name} came as {written} bytes, {ggml_size(grid, shape)} are {shape} in {grid}",
                    hint="this is a defect of edgestill: report it",
                )
            _pad(stream)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(stream: BinaryIO) -> None:
    at = stream.tell()
    stream.write(bytes(_padded(at) - at))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return _LENGTH.pack(len(data)) + data


def _value(value: Any) -> bytes:
    """Type and content; whole numbers are uint32 alone and int32 in lists, as llama.cpp reads them."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case np.signedinteger():
            return struct.pack("<Ii", _INT32, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case bytes():
            return struct.pack("<IIQ", _ARRAY, _UINT8, len(value)) + value
    head = {str: _STRING, float: _FLOAT32, int: _INT32, bool: _BOOL}[type(value[0])]
    if head == _STRING:
        texts = [item.encode("utf-8", "surrogateescape") for item in value]
        items = b"".join(chain.from_iterable(zip(map(_LENGTH.pack, map(len, texts)), texts, strict=True)))
    elif head == _BOOL:
        items = bytes(value)
    else:
        items = np.asarray(value, "<f4" if head == _FLOAT32 else "<i4").tobytes()
    return struct.pack("<IIQ", _ARRAY, head, len(value)) + items
