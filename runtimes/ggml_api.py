"""The one file that calls GGML's quantisers, through the library that comes with llama-cpp-python.

Their numbers of types and block sizes are compared with :mod:`edgestill.grids` before the first call.
"""

from __future__ import annotations

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt

from ..errors import EdgestillError, MissingDependency
from ..grids import GGML_GRIDS
from .llamacpp_api import engine

__all__ = ["ggml", "quantise_rows", "requires_importance"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def ggml() -> ctypes.CDLL:
    """The library, with ``ggml_quantize_chunk`` and ``ggml_get_type_traits`` declared.

    Raises :class:`MissingDependency` when it isn't installed, or numbers its types otherwise than we do.
    """
    engine()
    from llama_cpp import _ggml

    library: ctypes.CDLL = _ggml.libggml
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    for grid in GGML_GRIDS.values():
        traits = library.ggml_get_type_traits(grid.number).contents
        found = (traits.type_name.decode().lower(), traits.blck_size, traits.type_size)
        if found != (grid.name, grid.elements, grid.size_bytes):
            raise MissingDependency(
                f"llama-cpp-python's type {grid.number} is {found}, expected {grid.name}",
                hint="pip install 'llama-cpp-python>=0.3.36,<0.4'",
            )
    return library


def requires_importance(grid: str) -> bool:
    """Whether GGML's quantiser for ``grid`` would abort the process without an importance matrix."""
    return bool(ggml().ggml_quantize_requires_imatrix(GGML_GRIDS[grid].number))


def quantise_rows(grid: str, rows: Floats, importance: Floats | None = None, threads: int = 1) -> Bytes:
    """``rows [n, columns]`` (finite) in GGML type ``grid`` as llama.cpp makes it: bytes ``[n, bytes of a row]``.

    ``importance [columns]`` weighs the squared errors of each column; the types that llama.cpp can't make without one
    raise :class:`EdgestillError`. The bytes don't depend on ``threads``.
    """
    library, kind = ggml(), GGML_GRIDS[grid]
    count, columns = rows.shape
    if importance is None and requires_importance(grid):
        raise EdgestillError(f"{grid} needs an importance matrix", hint="give calibration texts")
    rows = np.ascontiguousarray(rows, np.float32)
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.empty((count, columns // kind.elements * kind.size_bytes), np.uint8)

    def part(begin: int, end: int) -> None:
        library.ggml_quantize_chunk(
            kind.number, rows[begin:end].ctypes.data, out[begin:end].ctypes.data, 0, end - begin, columns,
            None if weight is None else weight.ctypes.data,
        )  # fmt: skip

    edges = [count * index // threads for index in range(threads + 1)]
    parts = [(begin, end) for begin, end in itertools.pairwise(edges) if end > begin]
    if len(parts) < 2:
        part(0, count)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            for done in [pool.submit(part, *edge) for edge in parts]:
                done.result()
    return out
