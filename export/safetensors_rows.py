"""Rows of a tensor in a safetensors file, read and not mapped: mapped pages would stay resident and count as memory.

Format: https://huggingface.co/docs/safetensors: eight bytes of header length, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, Unsupported

__all__ = ["RowReader"]

Floats = npt.NDArray[np.float32]

_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip


class RowReader:
    """A safetensors file that :mod:`safetensors` has opened before (so its header holds what it promises)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            self._header = json.loads(stream.read(length))
        self._start = 8 + length

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Floats:
        """Rows ``begin:end`` of a parameter as contiguous float32; a scalar counts as one row and keeps its shape."""
        entry = self._header[name]
        if entry["dtype"] not in _TYPES:
            raise Unsupported(f"{self.path}: {name} is stored as {entry['dtype']}", hint="convert it to bf16 or f32")
        form, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
        first, *rest = shape or (1,)
        stop = first if end is None else min(end, first)
        width = math.prod(rest)
        with self.path.open("rb") as stream:
            stream.seek(self._start + entry["data_offsets"][0] + begin * width * form.itemsize)
            raw = np.fromfile(stream, form, (stop - begin) * width)
        if raw.size != (stop - begin) * width:
            raise BadInput(f"{self.path} ends within {name}", hint="fetch it again")
        values: Floats
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.astype(np.float32, copy=False)
        return values.reshape((stop - begin, *rest) if shape else ())
