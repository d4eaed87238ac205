"""Reads a GGUF file's header with nothing but numpy, and believes none of its numbers before checking them.

llama.cpp aborts the process on some damaged files; what passes here is whole. Format: ``gguf.h`` of llama.cpp,
versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Histogram
from ..errors import BadInput
from ..grids import GGML_GRIDS, ggml_size

__all__ = ["GgufFile", "GgufTensor"]

_LENGTH = struct.Struct("<Q")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {grid.number: grid.name for grid in GGML_GRIDS.values()}
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` rows first (as in numpy), ``grid`` a name of ``grids.py`` (or ``type42``), and where its
    bytes lie in the file. ``size_bytes`` is 0 for a type that we don't know."""

    name: str
    shape: tuple[int, ...]
    grid: str
    offset: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class GgufFile:
    """A GGUF file opened for reading: ``metadata`` (arrays as lists or numpy arrays) and ``tensors`` by name.

    Raises :class:`BadInput`, naming the file, when it is truncated, damaged or not GGUF. The file stays mapped until
    :meth:`close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist", hint="check the path") from None
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} can't be read: {error}", hint="fetch or export it again") from None
        self._at = 0
        try:
            self._parse()
        except BadInput:
            self.close()
            raise
        except (struct.error, ValueError, OverflowError, MemoryError) as error:
            self.close()
            raise self._damaged(str(error)) from None

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. Arrays made by :meth:`raw` are copies and live on."""
        self._map.close()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BadInput(f"{self.path} has no tensor {name!r}", hint="the file is of another model; export it again")
        stored = self._map[tensor.offset : tensor.offset + tensor.size_bytes]
        return np.frombuffer(stored, np.uint8)

    def histogram(self) -> Mapping[str, Histogram]:
        """Tensors, values and bytes stored in each type, most bytes first."""
        found: dict[str, Counter[str]] = {}
        for tensor in self.tensors.values():
            found.setdefault(tensor.grid, Counter()).update(
                tensors=1, parameters=tensor.parameters, size_bytes=tensor.size_bytes
            )
        ordered = sorted(found.items(), key=lambda item: (-item[1]["size_bytes"], item[0]))
        return {name: Histogram(**row) for name, row in ordered}

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise BadInput(f"{self.path} is not a GGUF file", hint="pass a .gguf of llama.cpp")
        self._at = 4
        (self.version,) = self._take("I")
        if self.version not in (2, 3):
            raise self._damaged(f"version {self.version}")
        tensors, pairs = self._take("QQ")
        # The shortest pair takes 13 bytes, the shortest tensor 24: forged counts end here, not in a long loop.
        if pairs * 13 + tensors * 24 > len(self._map):
            raise self._damaged(f"{tensors} tensors and {pairs} keys don't fit into {len(self._map)} bytes")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"key {key!r} comes twice")
            self.metadata[key] = self._value(self._take("I")[0])
        self._parse_tensors(tensors)

    def _parse_tensors(self, count: int) -> None:
        rows = [self._tensor_row() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._damaged(f"alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in rows:
            grid = _NAMES.get(number, f"type{number}")
            size = ggml_size(grid, shape) if grid in GGML_GRIDS else 0
            if name in self.tensors or offset % alignment or start + offset + size > len(self._map):
                raise self._damaged(f"tensor {name!r} lies outside the file, or comes twice: it is truncated")
            self.tensors[name] = GgufTensor(name, shape, grid, start + offset, size)

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed(self._take("Q" * dimensions)))
        if math.prod(shape) > len(self._map) * 8:
            raise self._damaged(f"tensor {name!r} of shape {shape} is larger than the file")
        number, offset = self._take("IQ")
        return name, shape, number, offset

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._map, self._at)
        self._at += struct.calcsize("<" + form)
        return values

    def _bytes(self, count: int) -> bytes:
        if count > len(self._map) - self._at:
            raise self._damaged("it is truncated")
        self._at += count
        return self._map[self._at - count : self._at]

    def _string(self) -> str:
        # llama.cpp's own files hold tokens that are not UTF-8: they go through unchanged.
        return self._bytes(self._take("Q")[0]).decode("utf-8", "surrogateescape")

    def _strings(self, count: int) -> list[str]:
        """:meth:`_string`, ``count`` times: vocabularies have a hundred thousand."""
        at, stored, read, found = self._at, self._map, _LENGTH.unpack_from, []
        for _ in range(count):
            begin = at + 8
            at = begin + read(stored, at)[0]
            found.append(stored[begin:at].decode("utf-8", "surrogateescape"))
        if at > len(stored):  # a slice beyond the end was shorter than promised
            raise self._damaged("it is truncated")
        self._at = at
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._take("IQ")
            if item == _STRING:
                if count * 8 > len(self._map) - self._at:
                    raise self._damaged("it is truncated")
                return self._strings(count)
            if item not in _SCALARS:
                raise self._damaged(f"array of type {item}")
            form = np.dtype("<" + _SCALARS[item])
            return np.frombuffer(self._bytes(count * form.itemsize), form)
        if kind not in _SCALARS:
            raise self._damaged(f"value of type {kind}")
        return self._take(_SCALARS[kind])[0]

    def _damaged(self, why: str) -> BadInput:
        return BadInput(f"{self.path} is a damaged GGUF file: {why}", hint="fetch or export it again")
