"""A function in the middle of coremltools' conversion as the plain program that our interpreter executes.

The one file that reads coremltools' own objects (``Function``, ``Operation``, ``Var``): what an ``op_selector`` of
``coremltools.transform.FP16ComputePrecision`` is shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..runtimes.mil.program import Constant, Operation, Program, ValueType

__all__ = ["function_of", "program_of"]

_DTYPES = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "str": "string"}


def function_of(operation: Any) -> Any:
    """The function that an operation stands in, however deep."""
    block = operation.enclosing_block
    while block.outer_op is not None:
        block = block.outer_op.enclosing_block
    return block


def program_of(function: Any) -> Program:
    """The program of one function; constants are not copied.

    Raises :class:`Unsupported` for control flow, which a traced model has not.
    """
    from coremltools.converters.mil.mil import types

    inputs: dict[str, ValueType] = {}
    states: dict[str, ValueType] = {}
    for name, value in function.inputs.items():
        (states if types.is_state(value.sym_type) else inputs)[name] = _type(value)
    constants: dict[str, Constant] = {}
    operations: list[Operation] = []
    for operation in function.operations:
        if operation.blocks:
            raise Unsupported(f"operation {operation.op_type} has a nested block", hint="export to ONNX or GGUF")
        if operation.op_type == "const":
            constants[operation.outputs[0].name] = _constant(operation.outputs[0])
            continue
        arguments: dict[str, tuple[str | Constant, ...]] = {}
        for parameter, given in operation.inputs.items():
            group = given if isinstance(given, (list, tuple)) else (given,)
            if any(value is None for value in group):
                continue
            arguments[parameter] = tuple(value.name for value in group)
        results = tuple((value.name, _type(value)) for value in operation.outputs)
        operations.append(Operation(operation.op_type, operation.name, arguments, results))
    return Program(inputs, states, constants, tuple(operations), tuple(value.name for value in function.outputs))


def _type(value: Any) -> ValueType:
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    kind = value.sym_type.wrapped_type() if types.is_state(value.sym_type) else value.sym_type
    element = kind.get_primitive() if types.is_tensor(kind) else kind
    shape = kind.get_shape() if types.is_tensor(kind) else ()
    name = types.builtin_to_string(element)
    return ValueType(_DTYPES.get(name, name), tuple(None if is_symbolic(size) else int(size) for size in shape))


def _constant(value: Any) -> Constant:
    found = value.val
    return Constant(_type(value), found if isinstance(found, str) else np.asarray(found))
