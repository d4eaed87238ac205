"""Elementwise operations: arithmetic, comparison, logic, activations, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .program import NUMPY_DTYPES, ValueType
from .registry import Arguments, operation

__all__ = ["erf", "sigmoid"]

# MIL names of types in `cast`.
_CAST = {
    "bool": "bool", "fp16": "float16", "fp32": "float32", "int8": "int8", "int16": "int16", "int32": "int32",
    "uint8": "uint8", "uint16": "uint16",
}  # fmt: skip


def _unary(kind: str, function: Callable[[Any], Any]) -> None:
    operation(kind)(lambda a, _: function(a["x"]))


def _binary(kind: str, function: Callable[[Any, Any], Any]) -> None:
    operation(kind)(lambda a, _: function(a["x"], a["y"]))


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x), without overflow warnings for large negative numbers."""
    result = np.negative(x)
    np.exp(np.minimum(result, 88.0, out=result), out=result)
    result += 1
    return np.reciprocal(result, out=result)


def erf(x: Any) -> Any:
    """The error function to 1.5e-7, by formula 7.1.26 of Abramowitz & Stegun (numpy has none)."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * magnitude)
    sum_ = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_ *= t
        sum_ += np.float32(coefficient)
    sum_ *= t
    sum_ *= np.exp(-np.square(magnitude))
    return np.copysign(1 - sum_, x)


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)
_binary("floor_div", np.floor_divide)
_binary("mod", np.mod)
_binary("equal", np.equal)
_binary("not_equal", np.not_equal)
_binary("less", np.less)
_binary("less_equal", np.less_equal)
_binary("greater", np.greater)
_binary("greater_equal", np.greater_equal)
_binary("logical_and", np.logical_and)
_binary("logical_or", np.logical_or)
_binary("logical_xor", np.logical_xor)
_binary("maximum", np.maximum)
_binary("minimum", np.minimum)

_unary("abs", np.abs)
_unary("ceil", np.ceil)
_unary("cos", np.cos)
_unary("erf", erf)
_unary("exp", np.exp)
_unary("exp2", np.exp2)
_unary("floor", np.floor)
_unary("logical_not", np.logical_not)
_unary("relu", lambda x: np.maximum(x, 0))
_unary("relu6", lambda x: np.clip(x, 0, 6))
_unary("round", np.rint)
_unary("sigmoid", sigmoid)
_unary("sign", np.sign)
_unary("silu", lambda x: x * sigmoid(x))
_unary("sin", np.sin)
_unary("softplus", lambda x: np.logaddexp(x, np.float32(0)))
_unary("softsign", lambda x: x / (1 + np.abs(x)))
_unary("sqrt", np.sqrt)
_unary("square", np.square)
_unary("tan", np.tan)
_unary("tanh", np.tanh)


@operation("real_div")
def real_div(a: Arguments, _: ValueType) -> Any:
    """x / y; whole numbers give a whole number, rounded towards zero."""
    quotient = np.true_divide(a["x"], a["y"])
    return np.trunc(quotient).astype(a["x"].dtype) if a["x"].dtype.kind in "iu" else quotient


@operation("pow")
def power(a: Arguments, _: ValueType) -> Any:
    """x ** y; squares (of RMS norms) without the general power."""
    exponent = a["y"]
    return np.square(a["x"]) if exponent.size == 1 and exponent.item() == 2 else np.power(a["x"], exponent)


@operation("rsqrt")
def rsqrt(a: Arguments, _: ValueType) -> Any:
    """1 / sqrt(x + epsilon)."""
    return 1 / np.sqrt(a["x"] + a.get("epsilon", np.float32(1e-12)))


@operation("inverse")
def inverse(a: Arguments, _: ValueType) -> Any:
    """1 / (x + epsilon)."""
    return 1 / (a["x"] + a.get("epsilon", np.float32(1e-4)))


@operation("log")
def log(a: Arguments, _: ValueType) -> Any:
    """ln(x + epsilon)."""
    return np.log(a["x"] + a.get("epsilon", np.float32(1e-45)))


@operation("clip")
def clip(a: Arguments, _: ValueType) -> Any:
    """x between alpha and beta."""
    return np.clip(a["x"], a["alpha"], a["beta"])


@operation("leaky_relu")
def leaky_relu(a: Arguments, _: ValueType) -> Any:
    """x, or alpha * x where x is negative."""
    return np.where(a["x"] < 0, a["x"] * a.get("alpha", np.float32(0.01)), a["x"])


@operation("linear_activation")
def linear_activation(a: Arguments, _: ValueType) -> Any:
    """alpha * x + beta."""
    return a["x"] * a["alpha"] + a.get("beta", np.float32(0))


@operation("gelu")
def gelu(a: Arguments, _: ValueType) -> Any:
    """x * P(X <= x), exact or by one of MIL's two approximations."""
    x = a["x"]
    match a.get("mode", "EXACT"):
        case "EXACT":
            gate = erf(x * np.float32(1 / np.sqrt(2)))
            gate += 1
            gate *= x
            gate *= np.float32(0.5)
            return gate
        case "TANH_APPROXIMATION":
            return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))
        case _:
            return x * sigmoid(np.float32(1.702) * x)


@operation("select", exact=True)
def select(a: Arguments, _: ValueType) -> Any:
    """a where cond, else b."""
    return np.where(a["cond"], a["a"], a["b"])


@operation("identity", exact=True)
def identity(a: Arguments, _: ValueType) -> Any:
    """x."""
    return a["x"]


@operation("cast")
def cast(a: Arguments, _: ValueType) -> Any:
    """x as another type; float to whole number drops the fraction. float16 is rounded by the interpreter."""
    dtype = _CAST[a["dtype"]]
    return a["x"].astype(np.float32 if dtype == "float16" else NUMPY_DTYPES[dtype])
