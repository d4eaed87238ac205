"""Reads the weights of a Core ML artifact back from its program, dequantised by :mod:`edgestill.grids`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..errors import BadInput, Unsupported
from ..grids import Affine, dequantise_affine
from .mil.program import Constant, Operation, Program
from .milproto import load_program

__all__ = ["CoremlPayload", "grid_of", "histogram", "stored_weights", "weight_values"]

Floats = npt.NDArray[np.float32]
Stored = Constant | Operation

_CODES = {"constexpr_affine_dequantize": "quantized_data", "constexpr_blockwise_shift_scale": "data"}


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
        for operation in program.operations
        if operation.kind.startswith("constexpr_")
        for arguments in operation.inputs.values()
        for argument in arguments
        if isinstance(argument, str)
    }
    for name, constant in program.constants.items():
        if name not in inside:
            yield name, constant
    for operation in program.operations:
        if operation.kind.startswith("constexpr_"):
            yield operation.outputs[0][0], operation


def _part(operation: Operation, parameter: str, program: Program) -> Constant | None:
    arguments = operation.inputs.get(parameter)
    if not arguments:
        return None
    return program.constants[arguments[0]] if isinstance(arguments[0], str) else arguments[0]


def _required(operation: Operation, parameter: str, program: Program) -> Constant:
    found = _part(operation, parameter, program)
    if found is None:
        raise BadInput(f"{operation.kind} {operation.name} has no {parameter}", hint="export it again")
    return found


def grid_of(stored: Stored, program: Program) -> str:
    """Its grid: ``"float16"``, ``"int8-channel"`` (one scale a row), ``"int4-b32"`` (one for 32 weights of a row)."""
    if isinstance(stored, Constant):
        return stored.type.dtype
    if stored.kind not in _CODES:
        return stored.kind.removeprefix("constexpr_")
    codes = _required(stored, _CODES[stored.kind], program)
    block = _block(stored, program)
    return f"{codes.type.dtype}-channel" if block == codes.value.shape[-1] else f"{codes.type.dtype}-b{block}"


def _block(operation: Operation, program: Program) -> int:
    """Weights of a row that share a scale; :class:`Unsupported` for scales along another axis than the rows."""
    shape = _required(operation, _CODES[operation.kind], program).value.shape
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
    times scale, rounded to float16 where the program says that the result is float16."""
    if isinstance(stored, Constant):
        return np.asarray(stored.value, np.float32)
    if stored.kind not in _CODES:
        raise Unsupported(f"{stored.name}: no grid for {stored.kind}", hint="known: " + ", ".join(_CODES))
    codes = _required(stored, _CODES[stored.kind], program)
    if codes.type.dtype not in ("int8", "int4", "uint8", "uint4"):
        raise Unsupported(f"{stored.name}: codes of {codes.type.dtype}", hint="known: int4, int8, uint4, uint8")
    bits = int(codes.type.dtype.lstrip("uint"))
    middle = 0 if codes.type.dtype.startswith("u") else 1 << (bits - 1)
    block = _block(stored, program)
    rows = codes.value.reshape(codes.value.shape[0], -1)
    count = (len(rows), -(-rows.shape[1] // block))
    scale = np.asarray(_required(stored, "scale", program).value, np.float32)
    zero = _part(stored, "zero_point", program) or _part(stored, "offset", program)
    zeros = np.zeros((), np.int32) if zero is None else np.asarray(zero.value, np.int32)

    def spread(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.broadcast_to(array.reshape(-1, 1) if array.ndim == 1 else array, count)

    grid = Affine(
        (rows.astype(np.int16) + middle).astype(np.uint8),
        np.ascontiguousarray(spread(scale), np.float32),
        (spread(zeros) + middle).astype(np.uint8),
        bits,
        block,
    )
    values = dequantise_affine(grid).reshape(codes.value.shape)
    half = stored.outputs[0][1].dtype == "float16"
    return values.astype(np.float16).astype(np.float32) if half else values


def histogram(program: Program) -> dict[str, Histogram]:
    """Float weights by grid: tensors, weights, bytes in the file (scales included). What is not in the weight file
    (shapes, small scalars) is not counted."""
    rows: dict[str, list[int]] = {}
    for _, stored in stored_weights(program):
        if isinstance(stored, Constant):
            parts = [stored]
        else:
            parts = [c for p in stored.inputs if (c := _part(stored, p, program)) is not None]
        size = sum(part.stored_bytes for part in parts)
        if size == 0:
            continue
        row = rows.setdefault(grid_of(stored, program), [0, 0, 0])
        row[0] += 1
        row[1] += max(np.asarray(part.value).size for part in parts)
        row[2] += size
    return {grid: Histogram(*row) for grid, row in sorted(rows.items())}
