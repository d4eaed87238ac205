"""Writing an ONNX file tensor by tensor, so that memory follows the largest tensor and not the model.

A ``ModelProto`` wants the length of its graph before the graph's bytes, but protobuf lets the fields of a message come
in any order. So the weights are spooled to disk as they are made; then the file is put together from the graph without
weights (small) and one ``TensorProto`` after the other, copied from the spool. Wire format: protobuf encoding
documentation; field numbers: onnx.proto.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = ["EXTERNAL_BYTES", "Ledger", "Spool", "varint"]

EXTERNAL_BYTES = 1_500_000_000
"""From here on weights stand in a file of their own: protobuf reads no message over 2 GB."""

_ALIGN = 64
_DATA_FILE = "model.onnx.data"
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}  # TensorProto.DataType
_GRAPH, _INITIALIZER = 7, 5  # ModelProto.graph, GraphProto.initializer
_DIMS, _DATA_TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14  # of TensorProto


def varint(value: int) -> bytes:
    """Protobuf's variable-length integer: 7 bits a byte, low ones first.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def leaves(self, external: bool) -> bool:
        """Small tensors stay in the graph: ONNX Runtime reads shapes and axes from there only."""
        return external and self.size_bytes >= 1024

    def head(self) -> bytes:
        """The TensorProto without its data."""
        dims = b"".join(varint(_DIMS << 3) + varint(dim) for dim in self.shape)
        return dims + varint(_DATA_TYPE << 3) + varint(_TYPES[self.dtype]) + _field(_NAME, self.name.encode())


class Spool:
    """Collects initialisers on disk; :meth:`write` makes the ONNX file of them and a graph.

    Equal constants that nobody named are kept once.
    """

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        self._constants: dict[str, str] = {}
        self._end = 0
        self._kept = False
        self._path = folder / _DATA_FILE
        self._stream: IO[bytes] = self._open()

    def _open(self) -> IO[bytes]:
        return self._path.open("w+b")

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors so far."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, array: npt.NDArray[Any]) -> str:
        """Append a tensor (little-endian, C order) and return its name; a name is used once."""
        return self.stream(name, array.dtype, array.shape, [array])

    def stream(
        self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], pieces: Iterable[npt.NDArray[Any]]
    ) -> str:
        """Append a tensor that comes in ``pieces`` of its values in C order: memory follows the largest piece."""
        if name in self._entries:
            raise ValueError(f"tensor {name!r} is stored twice")
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        start = self._end + -self._end % _ALIGN
        self._keep(np.zeros(start - self._end, np.uint8), np.dtype(np.uint8))
        came = 0
        for piece in pieces:
            came += piece.size * kind.itemsize
            self._keep(piece, kind.newbyteorder("<"))
        if came != size:
            raise ValueError(f"tensor {name!r} came as {came} bytes, {size} are {shape}")
        self._end = start + size
        self._entries[name] = _Entry(name, kind.name, tuple(shape), start, size)
        return name

    def _keep(self, piece: npt.NDArray[Any], kind: np.dtype[Any]) -> None:
        ready = np.asarray(piece, kind, order="C")
        self._stream.write(ready.data if ready.size else b"")

    def dtype(self, name: str) -> str:
        """The type that a tensor was added with."""
        return self._entries[name].dtype

    def constant(self, array: npt.NDArray[Any]) -> str:
        """A small tensor without a name of its own."""
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if key not in self._constants:
            self._constants[key] = self.add(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def file_bytes(self, model: Any, *, external_bytes: int = EXTERNAL_BYTES) -> int:
        """Bytes that :meth:`write` would make of ``model``, those of the external data included."""
        external = self.size_bytes > external_bytes
        shell, _, length = self._parts(model, external)
        return len(shell) + len(varint(_GRAPH << 3 | 2) + varint(length)) + length + (self._end if external else 0)

    def _parts(self, model: Any, external: bool) -> tuple[bytes, bytes, int]:
        """The model without its graph, the graph, and the length of the graph with all tensors."""
        graph = model.graph.SerializeToString(deterministic=True)
        shell = type(model)()
        shell.CopyFrom(model)
        shell.ClearField("graph")
        length = len(graph) + sum(self._record_bytes(entry, external) for entry in self._entries.values())
        return shell.SerializeToString(deterministic=True), graph, length

    def write(self, model: Any, target: Path, *, external_bytes: int = EXTERNAL_BYTES) -> None:
        """Write ``target``: ``model`` (a ``ModelProto`` whose graph has no initialisers) with the spooled tensors.

        Above ``external_bytes`` the spool stays, as ``model.onnx.data``, and is referred to; else it is removed.
        """
        self._stream.flush()
        external = self.size_bytes > external_bytes
        shell, graph, length = self._parts(model, external)
        with target.open("wb") as out:
            out.write(shell + varint(_GRAPH << 3 | 2) + varint(length) + graph)
            for entry in self._entries.values():
                self._write_record(out, entry, external)
        self._stream.close()
        if external:
            self._kept = True
        else:
            self.close()

    def close(self) -> None:
        """Remove the spool, unless a file refers to it."""
        self._stream.close()
        if not self._kept:
            self._path.unlink(missing_ok=True)

    def _write_record(self, out: IO[bytes], entry: _Entry, external: bool) -> None:
        out.write(varint(_INITIALIZER << 3 | 2) + varint(self._message_bytes(entry, external)) + entry.head())
        if entry.leaves(external):
            out.write(_external(entry))
            return
        out.write(varint(_RAW << 3 | 2) + varint(entry.size_bytes))
        self._stream.seek(entry.offset)
        left = entry.size_bytes
        while left:
            chunk = self._stream.read(min(left, 1 << 22))
            out.write(chunk)
            left -= len(chunk)

    def _message_bytes(self, entry: _Entry, external: bool) -> int:
        if entry.leaves(external):
            return len(entry.head()) + len(_external(entry))
        return len(entry.head()) + 1 + len(varint(entry.size_bytes)) + entry.size_bytes

    def _record_bytes(self, entry: _Entry, external: bool) -> int:
        message = self._message_bytes(entry, external)
        return 1 + len(varint(message)) + message


class Ledger(Spool):
    """A :class:`Spool` that counts what it is given and keeps nothing: :meth:`file_bytes` without a file."""

    def __init__(self) -> None:
        super().__init__(Path())

    def _open(self) -> IO[bytes]:
        return io.BytesIO()

    def _keep(self, piece: npt.NDArray[Any], kind: np.dtype[Any]) -> None:
        pass

    def close(self) -> None:
        """There is no file."""


def _external(entry: _Entry) -> bytes:
    """``external_data`` and ``data_location = EXTERNAL`` of one tensor; the location is a bare file name."""
    pairs = {"location": _DATA_FILE, "offset": str(entry.offset), "length": str(entry.size_bytes)}
    rows: Iterable[bytes] = (_field(1, k.encode()) + _field(2, v.encode()) for k, v in pairs.items())
    return b"".join(_field(_EXTERNAL, row) for row in rows) + varint(_LOCATION << 3) + varint(1)
