"""Writes a GGUF file tensor by tensor, through the ``gguf`` package, so that memory follows the largest one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingDependency
from ..files import disk_errors
from .gguf_metadata import Metadata

__all__ = ["TensorSlot", "write_gguf"]

TensorSlot = tuple[str, tuple[int, ...], Any]
"""Name, shape (rows first) and numpy dtype (float32 or float16) of a tensor to come."""


def write_gguf(
    path: Path, metadata: Metadata, tensors: Sequence[TensorSlot], read: Callable[[str], npt.NDArray[Any] | None]
) -> None:
    """Write ``metadata`` and then each of ``tensors``, asking ``read(name)`` for its values when its turn comes.

    Keys and tensors keep their order; the same input gives the same bytes.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingDependency.package("gguf", "export") from None
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    types = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer's own first key
        kind, item = _value_type(types, value)
        writer.add_key_value(key, value, kind, item)
    for name, shape, dtype in tensors:
        dtype = np.dtype(dtype)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    with disk_errors(path):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, _, dtype in tensors:
                writer.write_tensor_data(np.ascontiguousarray(read(name), dtype))
        finally:
            writer.close()


def _value_type(types: Any, value: Any) -> tuple[Any, Any]:
    """GGUF type of a value, and of its items; whole numbers are uint32 alone and int32 in lists, as llama.cpp reads."""
    if isinstance(value, bytes):
        return types.ARRAY, types.UINT8
    if isinstance(value, list):
        items = {str: types.STRING, float: types.FLOAT32, int: types.INT32}
        return types.ARRAY, items[type(value[0])]
    return {str: types.STRING, bool: types.BOOL, float: types.FLOAT32, int: types.UINT32}[type(value)], None
