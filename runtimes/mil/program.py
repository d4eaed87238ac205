"""A Core ML program as plain values: what the interpreter executes and the payload reader looks through. Numpy only.

The names are those of Apple's ``MIL.proto``: a function is a list of operations in static single assignment form, each
with named arguments, and states are the mutable buffers that live between two calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NUMPY_DTYPES", "Block", "Constant", "Operation", "Program", "ValueType", "names_in", "walk"]

Array = npt.NDArray[Any]

# How stored values of each MIL type look in numpy; sub-byte integers are unpacked to one byte each.
NUMPY_DTYPES: dict[str, Any] = {
    "bool": np.bool_, "float16": np.float16, "float32": np.float32, "float64": np.float64,
    "int4": np.int8, "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint1": np.uint8, "uint2": np.uint8, "uint3": np.uint8, "uint4": np.uint8, "uint6": np.uint8,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValueType:
    """Element type (``"float16"``, ``"int32"``, ``"string"`` …) and shape; a free dimension is ``None``."""

    dtype: str
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is written in the program: as it is stored, so float16 stays float16 and int8 codes stay codes.

    ``value`` is a numpy array, a string or a boolean. ``stored_bytes`` counts what it takes in the weight file, 0 for a
    value inside the program text.
    """

    type: ValueType
    value: Any
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: ``inputs`` maps a parameter to its arguments, each the name of an earlier value or a constant.

    Control flow has ``blocks``: ``cond`` what is done when it is true and when it is false, ``while_loop`` its
    condition and its body.
    """

    kind: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, ValueType], ...]
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Operations inside another one. They see the values around them; names are unique in the whole function."""

    inputs: tuple[tuple[str, ValueType], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


def walk(operations: Iterable[Operation]) -> Iterator[Operation]:
    """All of them, with those in blocks after the operation that holds them."""
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from walk(block.operations)


def names_in(operation: Operation) -> list[str]:
    """The names that an operation uses, in its blocks too (where they may be those of the blocks themselves)."""
    found = [a for group in operation.inputs.values() for a in group if isinstance(a, str)]
    for block in operation.blocks:
        found += [name for inner in block.operations for name in names_in(inner)]
        found += block.outputs
    return found


@dataclass(frozen=True)
class Program:
    """The main function of a saved package.

    ``inputs`` and ``states`` by name; ``constants`` by the name that operations use; ``operations`` in order;
    ``outputs`` the names that are returned. ``opset`` (``"CoreML6"`` …) and ``specification_version`` say for which
    system it was written.
    """

    inputs: Mapping[str, ValueType]
    states: Mapping[str, ValueType]
    constants: Mapping[str, Constant]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    opset: str = ""
    specification_version: int = 0
    output_types: Mapping[str, ValueType] = field(default_factory=dict)
