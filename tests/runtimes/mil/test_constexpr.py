"""Compressed weights: what coremltools writes, against what it says they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.mil.program import Constant, Operation, Program, ValueType
from edgestill.runtimes.payload_coreml import grid_of, stored_weights, weight_values

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("bits", "block", "grid"),
    [(8, 64, "int8-channel"), (8, 32, "int8-b32"), (4, 32, "int4-b32"), (4, 64, "int4-channel")],
)
def test_blockwise(interpret: Any, bits: int, block: int, grid: str) -> None:
    """iOS 18's operation; the reader of weights and the interpreter must agree with the formula."""
    top = 1 << (bits - 1)
    codes = RNG.integers(-top, top, (8, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (8, 64 // block)).astype(np.float16)

    def body(mb: Any, x: Any) -> Any:
        from coremltools.converters.mil.mil import types

        data = codes.astype(types.np_int4_dtype) if bits == 4 else codes
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
        return mb.linear(x=x, weight=weight, name="out")

    interpreter = interpret(body, ((64, 64), "float16"))
    want = (codes * np.repeat(scale.astype(np.float32), block, 1)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(interpreter.run({"input0": np.eye(64)})["out"], want.T)
    program = interpreter.program
    (stored,) = [item for _, item in stored_weights(program) if isinstance(item, Operation)]
    assert grid_of(stored, program) == grid
    np.testing.assert_array_equal(weight_values(stored, program), want)


def _affine(zero: Any, dtype: str) -> Program:
    codes = RNG.integers(0 if dtype == "uint8" else -128, 128, (6, 10)).astype(dtype)
    half = ValueType("float16", (6, 10))
    arguments: dict[str, tuple[str | Constant, ...]] = {
        "quantized_data": (Constant(ValueType(dtype, (6, 10)), codes, 60),),
        "zero_point": (Constant(ValueType(dtype, np.shape(zero)), np.asarray(zero, dtype)),),
        "scale": (Constant(ValueType("float16", (6,)), np.linspace(0.01, 0.06, 6).astype(np.float16)),),
        "axis": (Constant(ValueType("int32"), np.asarray(0)),),
    }
    return Program({}, {}, {}, (Operation("constexpr_affine_dequantize", "w", arguments, (("w", half),)),), ("w",))


@pytest.mark.parametrize(("zero", "dtype"), [(0, "int8"), (list(range(6)), "int8"), (list(range(120, 126)), "uint8")])
def test_affine(zero: Any, dtype: str) -> None:
    """iOS 16's operation, by its definition: (codes - zero_point) * scale."""
    program = _affine(zero, dtype)
    arguments = program.operations[0].inputs
    codes, scale = (arguments[key][0].value.astype(np.float32) for key in ("quantized_data", "scale"))  # type: ignore[union-attr]
    want = ((codes - np.broadcast_to(zero, 6)[:, None]) * scale[:, None]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(Interpreter(program).run({})["w"], want)
    np.testing.assert_array_equal(weight_values(program.operations[0], program), want)
    assert grid_of(program.operations[0], program) == f"{dtype}-channel"


def test_palette(interpret: Any) -> None:
    codes = RNG.integers(0, 16, (8, 64)).astype(np.uint8)
    table = RNG.normal(size=(2, 1, 16, 1)).astype(np.float16)  # one table for each four rows

    def body(mb: Any, x: Any) -> Any:
        from coremltools.converters.mil.mil import types

        weight = mb.constexpr_lut_to_dense(indices=codes.astype(types.np_uint4_dtype), lut=table)
        return mb.linear(x=x, weight=weight, name="out")

    got = interpret(body, ((64, 64), "float16")).run({"input0": np.eye(64)})["out"]
    want = np.stack([table[row // 4, 0, codes[row], 0] for row in range(8)])
    np.testing.assert_array_equal(got, want.T.astype(np.float32))
