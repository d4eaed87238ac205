"""Reading an ONNX file without its weights in memory: the graph at once, tensors one by one where they lie on disk.

The mirror of ``export/onnx_file.py``. ``onnx.load`` holds a file twice while it parses; this walks over the fields of
``ModelProto.graph`` and notes where each initialiser's bytes are. Wire format: protobuf encoding documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import BadInput, MissingDependency
from ..files import safe_join

__all__ = ["OnnxFile", "TensorAt", "graph_path"]

_GRAPH, _INITIALIZER, _RAW = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorAt:
    """A tensor's type, shape and the place of its bytes; ``proto`` instead, where it is written in another way."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int
    proto: Any = None


def graph_path(artifact: Artifact) -> Path:
    """The ONNX file of an artifact: its entry, or what lies beside an entry in ONNX Runtime's own format."""
    return artifact.entry.with_suffix(".onnx") if artifact.entry.suffix == ".ort" else artifact.entry


class OnnxFile:
    """``graph`` is the ``GraphProto`` without initialisers, ``tensors`` says where those are.

    Raises :class:`BadInput` for a file that is no ONNX model, is truncated, or points outside its folder.
    """

    def __init__(self, path: Path) -> None:
        try:
            from google.protobuf.message import DecodeError
            from onnx import GraphProto
        except ImportError:
            raise MissingDependency.package("onnx", "runtimes") from None
        self.path = path
        self.graph: Any = GraphProto()
        self.tensors: dict[str, TensorAt] = {}
        try:
            with path.open("rb") as stream:
                self._model(stream, path.stat().st_size)
        except (DecodeError, OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is not a whole ONNX file: {error}", hint="export it again") from None
        if not self.graph.node:
            raise BadInput(f"{path} is not a whole ONNX file: it holds no graph", hint="export it again")

    def array(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor."""
        at = self.tensors.get(name)
        if at is None:
            raise BadInput(f"{self.path}: no tensor {name!r}", hint="export it again")
        if at.proto is not None:
            from onnx import numpy_helper

            return np.asarray(numpy_helper.to_array(at.proto))
        try:
            with at.path.open("rb") as stream:
                stream.seek(at.offset)
                flat = np.frombuffer(stream.read(at.size_bytes), at.dtype)
            return flat.reshape(at.shape)
        except (OSError, ValueError) as error:
            raise BadInput(f"{at.path}: tensor {name!r} can't be read: {error}", hint="export it again") from None

    def _model(self, stream: IO[bytes], end: int) -> None:
        for number, length in _fields(stream, end):
            if number == _GRAPH:
                self._graph(stream, stream.tell() + length)
            else:
                stream.seek(length, 1)

    def _graph(self, stream: IO[bytes], end: int) -> None:
        rest = bytearray()
        start = stream.tell()
        for number, length in _fields(stream, end):
            stop = stream.tell() + length
            if number == _INITIALIZER:
                self._tensor(stream, stop)
            else:
                stream.seek(start)
                rest += stream.read(stop - start)
            stream.seek(stop)
            start = stop
        self.graph.MergeFromString(bytes(rest))

    def _tensor(self, stream: IO[bytes], end: int) -> None:
        from onnx import TensorProto, helper

        head, data = bytearray(), (0, -1)
        start = stream.tell()
        for number, length in _fields(stream, end):
            stop = stream.tell() + length
            if number == _RAW:
                data = (stream.tell(), length)
            elif length > _SMALL_BYTES:
                raise ValueError("a large tensor is not stored as raw data")
            else:
                stream.seek(start)
                head += stream.read(stop - start)
            stream.seek(stop)
            start = stop
        proto = TensorProto.FromString(bytes(head))
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
        path, offset, size = self.path, *data
        if proto.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in proto.external_data}
            path, offset = safe_join(self.path.parent, place["location"]), int(place.get("offset", 0))
            size = int(place["length"])
            if offset < 0 or size < 0 or offset + size > path.stat().st_size:
                raise ValueError(f"tensor {proto.name!r} lies beyond the end of {path.name}")
        shape = tuple(proto.dims)
        if size < 0:
            self.tensors[proto.name] = TensorAt(proto.name, dtype, shape, path, 0, proto.ByteSize(), proto)
        elif size != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(f"tensor {proto.name!r} has {size} bytes, which is not its shape")
        else:
            self.tensors[proto.name] = TensorAt(proto.name, dtype, shape, path, offset, size)


def _fields(stream: IO[bytes], end: int) -> Iterator[tuple[int, int]]:
    """(field number, length of the payload that follows) of a message that ends at ``end``; the caller reads or skips
    the payload. For a varint, the length is that of the number, which has not been read yet."""
    while stream.tell() < end:
        key = _varint(stream)
        match key & 7:
            case 0:
                here = stream.tell()
                _varint(stream)
                length = stream.tell() - here
                stream.seek(here)
            case 1:
                length = 8
            case 2:
                length = _varint(stream)
            case 5:
                length = 4
            case other:
                raise ValueError(f"wire type {other}")
        if stream.tell() + length > end:
            raise ValueError("it ends too early")
        yield key >> 3, length


def _varint(stream: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends too early")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number has more than ten bytes")
