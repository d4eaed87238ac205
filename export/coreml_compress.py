"""Store the weights of a converted Core ML program as codes, palettes or sparse: one pass over its message and file.

Each constant that is to be compressed becomes a ``constexpr_*`` operation of the same name and type, so that nothing
that uses it changes. iOS 16 and 17 carry the arrays as attributes and know a scale a row, one palette a tensor and
plain sparse weights; iOS 18 carries them as arguments and knows blocks, tables for groups and sparse codes. Arrays are
read from one weight file and written to another, one at a time; the same program gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..coreml_grids import Blocks, Mask, Palette, largest_weights, quantise_blocks, quantise_palette
from ..quantisation_coreml import CoremlQuantisation
from ..runtimes.milproto import BlobFile, mil_messages
from .coreml_blob import BlobCounter, BlobWriter, pack_bits

__all__ = ["SMALLEST", "WEIGHT_FILE", "Coder", "Fallback", "compress", "compressed_bytes", "compressible", "fitting"]

WEIGHT_FILE = "@model_path/weights/weight.bin"
SMALLEST = 2048
"""Tensors of no more weights gain nothing."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
# Which argument of an operation is a weight that Core ML decompresses as it computes.
_WEIGHTS = {"linear": "weight", "gather": "x"}


@dataclass(frozen=True)
class Fallback:
    """A constant that could not be stored as asked: ``stored`` says how it is, ``reason`` why."""

    name: str
    stored: str
    reason: str


def compressible(spec: Any) -> set[str]:
    """Names of the constants of a program (a ``Model`` message) that :func:`compress` may change: matrices of more than
    :data:`SMALLEST` weights that linear layers multiply by and that embeddings look up."""
    block = _block(spec)
    used = {
        argument.name
        for operation in block.operations
        if operation.type in _WEIGHTS
        for argument in operation.inputs[_WEIGHTS[operation.type]].arguments
    }
    return {
        operation.outputs[0].name
        for operation in block.operations
        if operation.type == "const"
        and operation.outputs[0].name in used
        and len(shape := _shape(operation.outputs[0].type)) == 2
        and np.prod(shape) > SMALLEST
        and _dtype(operation.outputs[0].type).startswith("float")
    }


class Coder:
    """How codes are found for the weight of the constant ``name``: each value rounded to the nearest."""

    def blocks(self, name: str, weight: Floats, bits: int, block: int, mask: Mask | None) -> Blocks | None:
        """See :func:`edgestill.coreml_grids.quantise_blocks`."""
        return quantise_blocks(weight, bits=bits, block=block, mask=mask)

    def palette(self, name: str, weight: Floats, bits: int, group: int, mask: Mask | None) -> Palette:
        """See :func:`edgestill.coreml_grids.quantise_palette`."""
        return quantise_palette(weight, bits=bits, group=group, mask=mask)


class _Sketch(Coder):
    """Codes of the right shape, not searched."""

    def blocks(self, name: str, weight: Floats, bits: int, block: int, mask: Mask | None) -> Blocks | None:
        scales = np.broadcast_to(np.float16(0), (len(weight), weight.shape[1] // (block or weight.shape[1])))
        return Blocks(np.broadcast_to(np.int8(0), weight.shape), scales)

    def palette(self, name: str, weight: Floats, bits: int, group: int, mask: Mask | None) -> Palette:
        tables = np.broadcast_to(np.float16(0), (len(weight) // (group or len(weight)), 1 << bits))
        return Palette(np.broadcast_to(np.uint8(0), weight.shape), tables)


def compress(
    spec: Any, source: Path, target: Path, plan: Mapping[str, CoremlQuantisation], coder: Coder | None = None
) -> list[Fallback]:
    """Rewrite the ``Model`` message ``spec``, whose arrays lie in ``source``, so that they lie in ``target``, the
    constants that ``plan`` names as it says, codes found by ``coder``. Returns what had to be stored otherwise."""
    with BlobWriter(target) as writer:
        return _rewrite(spec, source, writer, plan, coder or Coder())


def compressed_bytes(spec: Any, source: Path, plan: Mapping[str, CoremlQuantisation]) -> int:
    """Bytes of the weight file that :func:`compress` would write, if no weight falls back; ``spec`` is rewritten as
    there. Nothing is rounded: it takes the time of reading."""
    counter = BlobCounter()
    _rewrite(spec, source, counter, plan, _Sketch())
    return counter.size_bytes


def _rewrite(
    spec: Any, source: Path, writer: BlobWriter | BlobCounter, plan: Mapping[str, CoremlQuantisation], coder: Coder
) -> list[Fallback]:
    blobs, fallbacks = BlobFile(source), []
    block = _block(spec)
    pen = _Pen(writer, new=_opset(spec) >= 8)
    done: list[Any] = []
    for operation in block.operations:
        name = operation.outputs[0].name if operation.outputs else ""
        if operation.type == "const" and name in plan:
            kind, shape = _dtype(operation.outputs[0].type), _shape(operation.outputs[0].type)
            array = blobs.array(operation.attributes["val"].blobFileValue.offset, kind, shape)
            weight = _Weight(
                pen, coder, name, operation.outputs[0].type, kind, np.asarray(array, np.float32), plan[name]
            )
            done += weight.operations() or [_moved(operation, blobs, pen)]
            if weight.fallback:
                fallbacks.append(weight.fallback)
        else:
            done.append(_moved(operation, blobs, pen))
    del block.operations[:]
    block.operations.extend(done)
    return fallbacks


class _Weight:
    """One weight and how it is to be stored."""

    def __init__(
        self, pen: _Pen, coder: Coder, name: str, kind: Any, dtype: str, weight: Floats, asked: CoremlQuantisation
    ) -> None:
        self._pen, self._coder, self._name, self._kind, self._dtype = pen, coder, name, kind, dtype
        self._weight, self._asked = weight, asked
        self._mask = largest_weights(weight, asked.sparsity) if asked.sparsity else None
        self.fallback: Fallback | None = None

    def operations(self) -> list[Any]:
        """The operations that take the constant's place; none when it has to stay."""
        if self._asked.palette:
            return self._palette()
        if self._asked.coded:
            return self._affine()
        return self._sparse()

    def _note(self, stored: str, reason: str) -> None:
        self.fallback = Fallback(self._name, stored, reason)

    def _affine(self) -> list[Any]:
        bits, columns = self._asked.bits, self._weight.shape[1]
        block = fitting(columns, self._asked.block)
        if block != self._asked.block:
            bits = bits if block else 8
            stored = f"int{bits}-b{block}" if block else "int8-channel"
            self._note(stored, f"blocks of {self._asked.block} do not divide rows of {columns}")
        grid = self._coder.blocks(self._name, self._weight, bits, block, self._mask)
        if grid is None:
            self._note("float16", "its scales would be too small for float16")
            return self._sparse() if self._mask is not None else []
        codes, scales, name = grid.codes, grid.scales.astype(self._dtype), f"int{bits}"
        pen = self._pen
        if self._mask is not None:
            inner = {
                "data_mask": pen.blob(self._mask, "uint1"),
                "nonzero_data": pen.blob(codes[self._mask], name),
                "scale": pen.blob(scales, self._dtype),
            }
            return self._sparse_codes("constexpr_sparse_blockwise_shift_scale", inner)
        if pen.new:
            parts = {"data": pen.blob(codes, name), "scale": pen.blob(scales, self._dtype)}
            return [pen.constexpr("constexpr_blockwise_shift_scale", self._name, self._kind, parts)]
        parts = {
            "quantized_data": pen.blob(codes, "int8"),
            "zero_point": pen.blob(np.zeros(len(codes), np.int8), "int8"),
            "scale": pen.blob(scales[:, 0], self._dtype),
            "axis": pen.number(0),
        }
        return [pen.constexpr("constexpr_affine_dequantize", self._name, self._kind, parts)]

    def _palette(self) -> list[Any]:
        bits, rows = self._asked.bits, self._weight.shape[0]
        group = fitting(rows, self._asked.group)
        if group != self._asked.group:
            stored = f"pal{bits}" + (f"-g{group}" if group else "")
            self._note(stored, f"groups of {self._asked.group} do not divide {rows} rows")
        grid = self._coder.palette(self._name, self._weight, bits, group, self._mask)
        tables, name, pen = grid.tables.astype(self._dtype), f"uint{bits}", self._pen
        wide = tables[:, None, :, None]  # [groups, 1, 2**bits, 1]: one for all columns, single values
        if self._mask is not None:
            inner = {
                "indices_mask": pen.blob(self._mask, "uint1"),
                "indices_nonzero_data": pen.blob(grid.codes[self._mask], name),
                "lut": pen.blob(wide, self._dtype),
            }
            return self._sparse_codes("constexpr_lut_to_sparse", inner)
        if pen.new:
            parts = {"indices": pen.blob(grid.codes, name), "lut": pen.blob(wide, self._dtype)}
            return [pen.constexpr("constexpr_lut_to_dense", self._name, self._kind, parts)]
        packed = np.frombuffer(pack_bits(grid.codes, bits), np.uint8)
        parts = {
            "indices": pen.blob(packed, "uint8"), "lut": pen.blob(tables[0], self._dtype),
            "shape": pen.sizes(self._weight.shape),
        }  # fmt: skip
        return [pen.constexpr("constexpr_lut_to_dense", self._name, self._kind, parts)]

    def _sparse(self) -> list[Any]:
        assert self._mask is not None
        pen = self._pen
        parts = {"nonzero_data": pen.blob(self._weight[self._mask].astype(self._dtype), self._dtype)}
        if pen.new:
            parts["mask"] = pen.blob(self._mask, "uint1")
        else:
            parts["mask"] = pen.blob(np.packbits(self._mask.reshape(-1), bitorder="little"), "uint8")
            parts["shape"] = pen.sizes(self._weight.shape)
        return [pen.constexpr("constexpr_sparse_to_dense", self._name, self._kind, parts)]

    def _sparse_codes(self, kind: str, parts: dict[str, Any]) -> list[Any]:
        assert self._mask is not None
        pen, shape, names = self._pen, self._weight.shape, (f"{self._name}_mask", f"{self._name}_kept")
        outputs = (
            (names[0], pen.type("uint1", shape)),
            (names[1], pen.type(self._dtype, (int(self._mask.sum()),))),
        )
        inner = pen.operation(kind, f"{self._name}_sparse", outputs, parts)
        parts = {"mask": names[0], "nonzero_data": names[1]}
        return [inner, pen.constexpr("constexpr_sparse_to_dense", self._name, self._kind, parts)]


def fitting(count: int, asked: int) -> int:
    """``asked`` where it divides ``count``; else the largest smaller divisor, but not under a quarter; else 0, the
    whole."""
    return next((size for size in range(asked, max(1, asked // 4) - 1, -1) if size > 1 and count % size == 0), 0)


class _Pen:
    """Writes messages: arrays go to the weight file. ``new``: in the manner of iOS 18."""

    def __init__(self, writer: BlobWriter | BlobCounter, *, new: bool) -> None:
        self._messages = mil_messages()
        self._writer = writer
        self.new = new

    def type(self, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = self._messages.ValueType()
        kind.tensorType.dataType = self._messages.DataType.Value(dtype.upper())
        kind.tensorType.rank = len(shape)
        for size in shape:
            kind.tensorType.dimensions.add().constant.size = size
        return kind

    def blob(self, array: Array, dtype: str) -> Any:
        value = self._messages.Value(type=self.type(dtype, array.shape))
        value.blobFileValue.fileName = WEIGHT_FILE
        value.blobFileValue.offset = self._writer.write(array, dtype)
        return value

    def number(self, number: int) -> Any:
        value = self._messages.Value(type=self.type("int32", ()))
        value.immediateValue.tensor.ints.values.append(number)
        return value

    def sizes(self, shape: tuple[int, ...]) -> Any:
        value = self._messages.Value(type=self.type("uint32", (len(shape),)))
        value.immediateValue.tensor.bytes.values = np.asarray(shape, "<u4").tobytes()
        return value

    def constexpr(self, kind: str, name: str, output: Any, parts: Mapping[str, Any]) -> Any:
        return self.operation(kind, name, ((name, output),), parts)

    def operation(self, kind: str, name: str, outputs: tuple[tuple[str, Any], ...], parts: Mapping[str, Any]) -> Any:
        operation = self._messages.Operation(type=kind)
        label = self._messages.Value(type=self.type("string", ()))
        label.immediateValue.tensor.strings.values.append(name)
        operation.attributes["name"].CopyFrom(label)
        for parameter, part in parts.items():
            if isinstance(part, str):
                operation.inputs[parameter].arguments.add().name = part
            elif self.new:
                operation.inputs[parameter].arguments.add().value.CopyFrom(part)
            else:
                operation.attributes[parameter].CopyFrom(part)
        for output, value_type in outputs:
            operation.outputs.add(name=output).type.CopyFrom(value_type)
        return operation


def _moved(operation: Any, blobs: BlobFile, pen: _Pen) -> Any:
    """The operation as it is, its arrays copied to the new weight file."""
    for value in _values(operation):
        if value.WhichOneof("value") == "blobFileValue":
            kind, shape = _dtype(value.type), _shape(value.type)
            value.CopyFrom(pen.blob(blobs.array(value.blobFileValue.offset, kind, shape), kind))
    return operation


def _values(operation: Any) -> Iterator[Any]:
    yield from operation.attributes.values()
    for group in operation.inputs.values():
        for argument in group.arguments:
            if argument.WhichOneof("binding") == "value":
                yield argument.value
    for block in operation.blocks:
        for inner in block.operations:
            yield from _values(inner)


def _block(spec: Any) -> Any:
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def _opset(spec: Any) -> int:
    return int(spec.mlProgram.functions["main"].opset.removeprefix("CoreML"))


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(int(dimension.constant.size) for dimension in kind.tensorType.dimensions)


def _dtype(kind: Any) -> str:
    return str(mil_messages().DataType.Name(kind.tensorType.dataType)).lower()
