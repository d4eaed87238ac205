"""Walking over the header of a GGUF file before a reader trusts it. Standard library only.

``gguf.GGUFReader`` loops as often as a count in the file says, past the end of the file; here every count and length is
compared with the bytes that are left (GGUF specification, versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from .errors import BadInput

__all__ = ["check_gguf_header"]

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_LEAST_KEY_BYTES = 8 + 4 + 1  # length, type and the smallest value
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_DEEPEST_ARRAY = 4


class _Walk:
    """A position in the file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise ValueError(f"byte {self.position} promises {count} bytes, {len(self.data) - self.position} are left")
        self.position += count

    def number(self, form: str) -> int:
        start = self.position
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def count(self, smallest: int, form: str = "<Q") -> int:
        """A number of things of which each takes at least ``smallest`` bytes of what is left."""
        start, count = self.position, self.number(form)
        if count * smallest > len(self.data) - self.position:
            raise ValueError(f"byte {start} promises {count} entries, the file is too short for them")
        return count

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY and depth < _DEEPEST_ARRAY:
            item = self.number("<I")
            count = self.count(_SCALAR_BYTES.get(item, 8))
            if item in _SCALAR_BYTES:
                self.skip(count * _SCALAR_BYTES[item])
            else:
                for _ in range(count):
                    self.value(item, depth + 1)
        else:
            raise ValueError(f"byte {self.position} has the unknown value type {kind}")


def check_gguf_header(path: Path) -> None:
    """Raise :class:`BadInput` when the metadata or the tensor list of a GGUF file can't be what it says."""
    hint = "fetch the file again"
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data)
            if data[:4] != b"GGUF":
                raise ValueError("it does not start with GGUF")
            walk.skip(4)
            version = walk.number("<I")
            if version not in (2, 3):
                raise ValueError(f"version {version} (2 and 3 are known, little-endian)")
            tensors = walk.count(_LEAST_TENSOR_BYTES)
            for _ in range(walk.count(_LEAST_KEY_BYTES)):
                walk.skip(walk.number("<Q"))
                walk.value(walk.number("<I"))
            for _ in range(tensors):
                walk.skip(walk.number("<Q"))
                dimensions = walk.number("<I")
                if not 0 < dimensions <= _MOST_DIMENSIONS:
                    raise ValueError(f"a tensor of {dimensions} dimensions")
                walk.skip(8 * dimensions + 4 + 8)
    except (ValueError, struct.error) as error:  # an empty file can't be mapped: ValueError too
        raise BadInput(f"{path} is truncated or not a GGUF file: {error}", hint=hint) from None
