"""A float32 program with some of its operations in float16, as coremltools' cast pass would write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from .half import FLOAT16_MAX, round_half
from .program import Array, Constant, Operation, Program, ValueType

__all__ = ["LARGE_VALUES", "leaves_half", "mixed", "rounded_constant"]

LARGE_VALUES = 1 << 14
"""Constants of more values than this stay as they are: weights are stored in float16 whatever the operations are."""

_SMALLEST = np.float32(2.0**-24)


def leaves_half(value: Array) -> bool:
    """Does a constant hold a finite number that float16 does not? Infinities (1e38 and more) count as meant."""
    magnitude = np.abs(value[np.abs(value) < 1e38]) if value.dtype.kind == "f" else np.zeros(0)
    return bool(magnitude.max(initial=0) > FLOAT16_MAX)


def rounded_constant(value: Array) -> Array:
    """A float32 constant in float16. What would become 0 stays at float16's smallest number, as coremltools keeps it:
    the epsilon of a norm must not vanish."""
    rounded = np.array(value, np.float32)
    round_half(rounded)
    vanished = (rounded == 0) & (value != 0)
    return np.where(vanished, np.copysign(_SMALLEST, value), rounded).astype(np.float32)


def mixed(program: Program, half: Collection[str]) -> Program:
    """``program`` with the operations named in ``half`` in float16: what they take and what they give is rounded.

    Values of other operations that they take are cast once each. A float16 result that a float32 operation takes needs
    no cast here, since the interpreter holds float16 in float32.
    """
    types = {**program.inputs, **program.states, **{name: c.type for name, c in program.constants.items()}}
    constants = dict(program.constants)
    casts: dict[str, str] = {}
    operations: list[Operation] = []
    single = ValueType("string")

    def cast(argument: str | Constant) -> str | Constant:
        if not isinstance(argument, str) or types[argument].dtype != "float32":
            return argument
        constant = program.constants.get(argument)
        if constant is not None and np.size(constant.value) > LARGE_VALUES:
            return argument
        name = f"{argument}#half"
        if argument not in casts:
            casts[argument] = name
            kind = types[name] = ValueType("float16", types[argument].shape)
            if constant is not None:
                constants[name] = Constant(kind, rounded_constant(np.asarray(constant.value, np.float32)))
            else:
                inputs: dict[str, tuple[str | Constant, ...]] = {
                    "x": (argument,), "dtype": (Constant(single, "fp16"),),
                }  # fmt: skip
                operations.append(Operation("cast", name, inputs, ((name, kind),)))
        return name

    for operation in program.operations:
        changed = operation
        if operation.name in half:
            inputs = {parameter: tuple(cast(a) for a in group) for parameter, group in operation.inputs.items()}
            outputs = tuple(
                (name, ValueType("float16", kind.shape) if kind.dtype == "float32" else kind)
                for name, kind in operation.outputs
            )
            changed = dataclasses.replace(operation, inputs=inputs, outputs=outputs)
        operations.append(changed)
        types |= dict(changed.outputs)
    return dataclasses.replace(program, constants=constants, operations=tuple(operations))
