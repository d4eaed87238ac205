"""Reads the weights of a Core ML artifact back from its program, dequantised by :mod:`edgestill.grids`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..coreml_grids import Palette, dequantise_palette
from ..errors import BadInput, Unsupported
from ..grids import Affine, dequantise_affine
from .mil.program import Constant, Operation, Program, walk
from .milproto import load_program

__all__ = ["CoremlPayload", "grid_of", "histogram", "stored_bytes", "stored_weights", "weight_values"]

Floats = npt.NDArray[np.float32]
Stored = Constant | Operation

# Which argument holds the codes, and (for sparse ones) which the mask of where they belong.
_AFFINE = {
    "constexpr_affine_dequantize": ("quantized_data", None),
    "constexpr_blockwise_shift_scale": ("data", None),
    "constexpr_sparse_blockwise_shift_scale": ("nonzero_data", "data_mask"),
}
_PALETTES = {
    "constexpr_lut_to_dense": ("indices", None),
    "constexpr_lut_to_sparse": ("indices_nonzero_data", "indices_mask"),
}
_SPARSE = "constexpr_sparse_to_dense"


class CoremlPayload:
    """The weights of a Core ML artifact; what :func:`edgestill.runtimes.payload.open_payload` opens for the format."""

    def __init__(self, artifact: Artifact) -> None:
        self._name = artifact.manifest.entry
        self._program = load_program(artifact.entry)
        self._weights = dict(stored_weights(self._program))

    def stored(self, tensor: StoredTensor) -> Floats:
        """The values of a stored tensor, dequantised; :class:`BadInput` when the file holds another type than
        ``tensors.json`` claims."""
        found = self._weights.get(tensor.stored)
        actual = "no such tensor" if found is None else grid_of(found, self._program)
        if found is None or actual != tensor.grid:
            raise BadInput(
                f"{self._name}: {tensor.stored} should be {tensor.grid}, the file has {actual}", hint="export it again"
            )
        return weight_values(found, self._program)

    def histogram(self) -> Mapping[str, Histogram]:
        """What is stored in which type, counted in the program itself."""
        return histogram(self._program)


def stored_weights(program: Program) -> Iterator[tuple[str, Stored]]:
    """(name, constant or dequantising operation) of everything that operations compute with."""
    inside = {
        argument
        for operation in walk(program.operations)
        if operation.kind.startswith("constexpr_")
        for arguments in operation.inputs.values()
        for argument in arguments
        if isinstance(argument, str)
    }
    for name, constant in program.constants.items():
        if name not in inside:
            yield name, constant
    for operation in walk(program.operations):
        if operation.kind.startswith("constexpr_") and not inside & {name for name, _ in operation.outputs}:
            yield operation.outputs[0][0], operation


def _part(operation: Operation, parameter: str, program: Program) -> Constant | Operation | None:
    arguments = operation.inputs.get(parameter)
    if not arguments:
        return None
    found = arguments[0]
    if isinstance(found, Constant):
        return found
    if found in program.constants:
        return program.constants[found]
    return next((o for o in walk(program.operations) if found in {name for name, _ in o.outputs}), None)


def _required(operation: Operation, parameter: str, program: Program) -> Constant:
    found = _part(operation, parameter, program)
    if not isinstance(found, Constant):
        raise BadInput(f"{operation.kind} {operation.name} has no {parameter}", hint="export it again")
    return found


def grid_of(stored: Stored, program: Program) -> str:
    """Its grid: ``"float16"``; ``"int8-channel"`` (one scale a row), ``"int4-b32"`` (one for 32 weights of a row);
    ``"pal4"`` (one table), ``"pal4-g16"`` (one for 16 rows); ``"sparse50"`` (half of the weights are not stored),
    ``"sparse50-int8-channel"``, ``"sparse50-pal4"``."""
    if isinstance(stored, Constant):
        return stored.type.dtype
    shape = _shape(stored, program)
    if stored.kind == _SPARSE:
        mask = _mask(stored, program)
        head = f"sparse{round(100 * (1 - np.count_nonzero(mask) / max(1, mask.size)))}"
        inner = _part(stored, "nonzero_data", program)
        return f"{head}-{grid_of(inner, program)}" if isinstance(inner, Operation) else head
    if stored.kind in _PALETTES:
        table = _table(stored, program)
        bits, groups = int(math.log2(table.shape[1])), len(table)
        return f"pal{bits}" if groups == 1 else f"pal{bits}-g{shape[0] // groups}"
    if stored.kind not in _AFFINE:
        return stored.kind.removeprefix("constexpr_")
    codes = _required(stored, _AFFINE[stored.kind][0], program)
    block = _block(stored, program)
    return f"{codes.type.dtype}-channel" if block == math.prod(shape[1:]) else f"{codes.type.dtype}-b{block}"


def _shape(operation: Operation, program: Program) -> tuple[int, ...]:
    """The shape of the weight that an operation, or the operation on sparse codes below it, stands for."""
    _, mask = (_AFFINE | _PALETTES).get(operation.kind, ("", None))
    if mask is not None:
        return tuple(_required(operation, mask, program).value.shape)
    return tuple(int(size or 0) for size in operation.outputs[0][1].shape)


def _mask(operation: Operation, program: Program) -> npt.NDArray[np.bool_]:
    """Where a sparse weight is stored, in the weight's shape."""
    found = _part(operation, "mask", program)
    if isinstance(found, Operation):
        kind = (_AFFINE | _PALETTES).get(found.kind)
        found = _part(found, kind[1], program) if kind and kind[1] else None
    if not isinstance(found, Constant):
        raise BadInput(f"{operation.kind} {operation.name} has no mask", hint="export it again")
    shape = _shape(operation, program)
    if found.type.dtype == "uint8":  # iOS 16: packed
        bits = np.unpackbits(np.asarray(found.value), bitorder="little")[: math.prod(shape)]
        return bits.reshape(shape).astype(np.bool_)
    return np.asarray(found.value).reshape(shape) != 0


def _codes(operation: Operation, program: Program) -> npt.NDArray[Any]:
    """The codes in the weight's shape; 0 where a sparse weight is not stored."""
    parameter, mask = (_AFFINE | _PALETTES)[operation.kind]
    codes, shape = np.asarray(_required(operation, parameter, program).value), _shape(operation, program)
    if mask is not None:
        return _scattered(codes, np.asarray(_required(operation, mask, program).value) != 0, operation)
    if "shape" in operation.inputs:  # iOS 16: packed
        bits = int(math.log2(_table(operation, program).shape[1]))
        stream = np.unpackbits(codes, bitorder="little")[: math.prod(shape) * bits].reshape(-1, bits)
        codes = np.packbits(np.pad(stream, ((0, 0), (0, 8 - bits))), axis=1, bitorder="little")
    return codes.reshape(shape)


def _scattered(values: npt.NDArray[Any], mask: npt.NDArray[np.bool_], operation: Operation) -> npt.NDArray[Any]:
    if values.size != np.count_nonzero(mask):
        raise BadInput(
            f"{operation.name}: {values.size} values for {np.count_nonzero(mask)} places", hint="export it again"
        )
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask] = values
    return dense


def _table(operation: Operation, program: Program) -> npt.NDArray[Any]:
    """The tables ``[groups, 2**bits]``; :class:`Unsupported` for groups of columns and for vectors."""
    table = np.asarray(_required(operation, "lut", program).value)
    if table.ndim == 1:
        return table[None]
    rows = _shape(operation, program)[0]
    if table.shape[-1] != 1 or any(size != 1 for size in table.shape[1:-2]) or rows % len(table):
        raise Unsupported(f"{operation.name}: tables {list(table.shape)}", hint="one table for the tensor or for rows")
    return table.reshape(len(table), table.shape[-2])


def _block(operation: Operation, program: Program) -> int:
    """Weights of a row that share a scale; :class:`Unsupported` for scales along another axis than the rows."""
    shape = _shape(operation, program)
    scale = np.asarray(_required(operation, "scale", program).value)
    if operation.kind == "constexpr_affine_dequantize":
        axis = int(_required(operation, "axis", program).value)
        if scale.ndim == 0 or (axis == 0 and scale.shape == (shape[0],)):
            return int(np.prod(shape[1:]))
    elif scale.shape[0] in (1, shape[0]) and len(shape) == 2 and shape[1] % scale.shape[1] == 0:
        return int(shape[1] // scale.shape[1])
    raise Unsupported(
        f"{operation.name}: scales {list(scale.shape)} for weights {list(shape)}", hint="quantise per row or block"
    )


def weight_values(stored: Stored, program: Program) -> Floats:
    """The float32 weights of a constant or of a dequantising operation, on the grid that Core ML computes with: codes
    times scale or table entries, rounded to float16 where the program says that the result is float16."""
    if isinstance(stored, Constant):
        return np.asarray(stored.value, np.float32)
    if stored.kind == _SPARSE:
        kept = _part(stored, "nonzero_data", program)
        mask = _mask(stored, program)
        if isinstance(kept, Operation):
            return np.where(mask, weight_values(kept, program), np.float32(0))
        if kept is None:
            raise BadInput(f"{stored.name} has no nonzero_data", hint="export it again")
        return _scattered(np.asarray(kept.value, np.float32), mask, stored)
    half = stored.outputs[-1][1].dtype == "float16"  # of an operation on sparse codes the second result
    if stored.kind in _PALETTES:
        codes, table = _codes(stored, program), _table(stored, program)
        if codes.max(initial=0) >= table.shape[1]:
            raise BadInput(f"{stored.name}: code {codes.max()} of {table.shape[1]}", hint="export it again")
        flat = Palette(codes.reshape(len(codes), -1), table.astype(np.float16) if half else table)
        return dequantise_palette(flat).reshape(codes.shape)
    if stored.kind not in _AFFINE:
        known = ", ".join((*_AFFINE, *_PALETTES, _SPARSE))
        raise Unsupported(f"{stored.name}: no grid for {stored.kind}", hint=f"known: {known}")
    dtype = _required(stored, _AFFINE[stored.kind][0], program).type.dtype
    if dtype not in ("int8", "int4", "uint8", "uint4"):
        raise Unsupported(f"{stored.name}: codes of {dtype}", hint="known: int4, int8, uint4, uint8")
    values = _affine_values(_codes(stored, program), dtype, stored, program)
    return values.astype(np.float16).astype(np.float32) if half else values


def _affine_values(codes: npt.NDArray[Any], dtype: str, stored: Operation, program: Program) -> Floats:
    bits = int(dtype.lstrip("uint"))
    middle = 0 if dtype.startswith("u") else 1 << (bits - 1)
    block = _block(stored, program)
    rows = codes.reshape(codes.shape[0], -1)
    count = (len(rows), -(-rows.shape[1] // block))
    scale = np.asarray(_required(stored, "scale", program).value, np.float32)
    zero = _part(stored, "zero_point", program) or _part(stored, "offset", program)
    zeros = np.asarray(zero.value, np.int32) if isinstance(zero, Constant) else np.zeros((), np.int32)

    def spread(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.broadcast_to(array.reshape(-1, 1) if array.ndim == 1 else array, count)

    grid = Affine(
        (rows.astype(np.int16) + middle).astype(np.uint8),
        np.ascontiguousarray(spread(scale), np.float32),
        (spread(zeros) + middle).astype(np.uint8),
        bits,
        block,
    )
    return dequantise_affine(grid).reshape(codes.shape)


def histogram(program: Program) -> dict[str, Histogram]:
    """Float weights by grid: tensors, weights, bytes in the file (scales, tables and masks included). What is not in
    the weight file (shapes, small scalars) is not counted."""
    rows: dict[str, list[int]] = {}
    for _, stored in stored_weights(program):
        size = stored_bytes(stored, program)
        if size == 0 or (isinstance(stored, Constant) and not stored.type.dtype.startswith("float")):
            continue
        row = rows.setdefault(grid_of(stored, program), [0, 0, 0])
        row[0] += 1
        row[1] += np.asarray(stored.value).size if isinstance(stored, Constant) else math.prod(_shape(stored, program))
        row[2] += size
    return {grid: Histogram(*row) for grid, row in sorted(rows.items())}


def stored_bytes(stored: Stored, program: Program) -> int:
    """Bytes of a weight in the weight file: codes, scales, tables and masks together."""
    return sum(part.stored_bytes for part in _parts(stored, program))


def _parts(stored: Stored, program: Program) -> list[Constant]:
    """The constants that a weight is made of, those of sparse codes included."""
    if isinstance(stored, Constant):
        return [stored]
    found: dict[int, Constant] = {}
    for parameter in stored.inputs:
        part = _part(stored, parameter, program)
        for constant in [] if part is None else _parts(part, program):
            found[id(constant)] = constant
    return list(found.values())
