"""The weights that an ONNX graph of any tool computes with: initialisers, and what it makes of them before any input.

Tools store quantised weights in several ways (codes that a ``Cast`` and a ``Mul`` scale, ``DequantizeLinear``, codes
that ``MatMulInteger`` reads). What a graph derives from initialisers alone is evaluated here, operation by operation,
after ONNX's operator documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from .onnx_reader import OnnxFile

__all__ = ["OnnxConstants"]

Array = npt.NDArray[Any]
_FOLDED = ("Cast", "Mul", "Sub", "Transpose", "Identity", "DequantizeLinear")
_DEEPEST = 8


class OnnxConstants:
    """Constant values of a graph by name, evaluated when they are asked for."""

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self._made = {name: node for node in file.graph.node for name in node.output if name}

    def weights(self) -> Iterator[tuple[str, str, str | None, str | None]]:
        """(name, grid, name of the scales, of the zero points where they are apart) of every float value that is
        constant and read by something that is not.

        Grids: ``float32``, ``float16``, ``folded8-channel`` (codes with a scale a row or column), ``folded8-tensor``
        (one scale), ``dynamic8-…`` (the codes that a MatMulInteger reads), ``int4-b32`` (those of a MatMulNBits).
        """
        seen = set()
        for node in self._file.graph.node:
            if node.op_type == "MatMulNBits" and node.input[1] in self._file.tensors and node.input[1] not in seen:
                fields = {attribute.name: attribute.i for attribute in node.attribute}
                seen.add(node.input[1])
                zeros = node.input[3] if len(node.input) > 3 and node.input[3] else None
                yield node.input[1], f"int{fields.get('bits', 4)}-b{fields['block_size']}", node.input[2], zeros
                continue
            if node.op_type == "MatMulInteger" and node.input[1] in self._file.tensors:
                scale = self._file.tensors.get(_scale_name(node.input[1]))
                if scale is not None and node.input[1] not in seen:
                    seen.add(node.input[1])
                    grid = "dynamic8-tensor" if _size(scale.shape) == 1 else "dynamic8-channel"
                    yield node.input[1], grid, None, None
            if all(self.is_constant(name) for name in node.input if name):
                continue
            for name in node.input:
                if name and name not in seen and self.is_constant(name) and (kind := self._grid(name)):
                    seen.add(name)
                    yield name, kind, None, None

    def is_constant(self, name: str, depth: int = 0) -> bool:
        """Whether it comes from initialisers alone, by operations that are known here."""
        if name in self._file.tensors:
            return True
        node = self._made.get(name)
        if node is None or node.op_type not in _FOLDED or depth > _DEEPEST:
            return False
        return all(self.is_constant(part, depth + 1) for part in node.input if part)

    def value(self, name: str) -> Array:
        """The constant ``name``; of a MatMulInteger's codes the weights that they stand for, float32."""
        scale = _scale_name(name)
        if name in self._file.tensors and self._file.tensors[name].dtype.kind in "iu" and scale in self._file.tensors:
            zero = scale.removesuffix("_scale") + "_zero_point"
            offset = self._file.array(zero).astype(np.int32) if zero in self._file.tensors else np.int32(0)
            codes = self._file.array(name).astype(np.int32) - offset
            return np.asarray(codes * self._file.array(scale), np.float32)
        return self._evaluate(name, 0)

    def _evaluate(self, name: str, depth: int) -> Array:
        if name in self._file.tensors:
            return self._file.array(name)
        node = self._made.get(name)
        if node is None or depth > _DEEPEST:
            raise BadInput(f"{self._file.path}: {name!r} is no constant", hint="is it another file's weight map?")
        parts = [self._evaluate(part, depth + 1) for part in node.input if part]
        fields = {attribute.name: attribute for attribute in node.attribute}
        match node.op_type:
            case "Cast":
                return np.asarray(parts[0], np.float16 if fields["to"].i == 10 else np.float32)
            case "Mul":
                return np.asarray(parts[0] * parts[1])
            case "Sub":
                return np.asarray(parts[0] - parts[1])
            case "Transpose":
                return np.transpose(parts[0], list(fields["perm"].ints) if "perm" in fields else None)
            case "Identity":
                return parts[0]
            case "DequantizeLinear":
                axis = fields["axis"].i if "axis" in fields else 1
                shape = [1] * parts[0].ndim
                if parts[1].size > 1:
                    shape[axis] = parts[1].size
                zero = parts[2].astype(np.int32).reshape(shape) if len(parts) > 2 else np.int32(0)
                return np.asarray((parts[0].astype(np.int32) - zero) * parts[1].reshape(shape), np.float32)
            case other:
                raise BadInput(f"{self._file.path}: {other} on constants", hint="not one of " + ", ".join(_FOLDED))

    def _grid(self, name: str) -> str | None:
        """The grid of a float constant, ``None`` for integers and for what has no codes in it."""
        if name in self._file.tensors:
            kind = self._file.tensors[name].dtype
            return kind.name if kind.kind == "f" else None
        codes, scales = [], [1]
        for leaf in self._leaves(name, 0):
            tensor = self._file.tensors[leaf]
            if tensor.dtype.kind in "iu":
                codes.append(_size(tensor.shape))
            elif tensor.dtype.kind == "f":
                scales.append(_size(tensor.shape))
        if not codes:
            return "float32" if len(scales) > 1 else None
        return "folded8-tensor" if max(scales) == 1 else "folded8-channel"

    def _leaves(self, name: str, depth: int) -> Iterator[str]:
        if name in self._file.tensors or depth > _DEEPEST:
            yield name
            return
        for part in self._made[name].input:
            if part:
                yield from self._leaves(part, depth + 1)


def _scale_name(codes: str) -> str:
    """Where ONNX Runtime's quantiser puts the scale of ``X_quantized``."""
    return codes.removesuffix("_quantized") + "_scale"


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=object))
