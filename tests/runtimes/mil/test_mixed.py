"""Some operations of a float32 program in float16: each result as numpy's own float16 has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.mil.mixed import leaves_half, mixed, rounded_constant
from edgestill.runtimes.mil.program import Constant, Operation, Program, ValueType

FLOAT = ValueType("float32", (4,))


def _program() -> Program:
    third = Constant(ValueType("float32", ()), np.array(1 / 3, np.float32))
    steps = [("mul", "a", "x", "third"), ("add", "b", "a", "x"), ("sub", "c", "b", "a")]
    operations = tuple(Operation(kind, name, {"x": (x,), "y": (y,)}, ((name, FLOAT),)) for kind, name, x, y in steps)
    return Program({"x": FLOAT}, {}, {"third": third}, operations, ("a", "b", "c"))


def _half(x: Any) -> Any:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("half", [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("a", "b", "c")])
def test_rounds_what_is_named(half: tuple[str, ...]) -> None:
    x = np.array([1.1, 2003.3, 1e-6, 7e4], np.float32)
    got = Interpreter(mixed(_program(), half)).run({"x": x})
    rounds = {name: _half if name in half else np.asarray for name in "abc"}
    with np.errstate(over="ignore", invalid="ignore"):
        third = np.float32(1 / 3)
        a = rounds["a"](rounds["a"](x) * rounds["a"](third))
        b = rounds["b"](rounds["b"](a) + rounds["b"](x))
        c = rounds["c"](rounds["c"](b) - rounds["c"](a))
    for name, want in zip("abc", (a, b, c), strict=True):
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_constants() -> None:
    small = rounded_constant(np.array([1e-12, -1e-12, 0, 1e-3], np.float32))
    np.testing.assert_array_equal(small, [2.0**-24, -(2.0**-24), 0, np.float16(1e-3)])
    assert rounded_constant(np.float32(1e-12)).shape == ()  # type: ignore[arg-type]
    assert leaves_half(np.array([1.0, 7e4]))
    assert not leaves_half(np.array([1.0, -np.inf, 3e38]))
    assert not leaves_half(np.array([10**6]))
