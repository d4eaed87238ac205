"""Read a saved Core ML package (``.mlpackage``) into a :class:`~edgestill.runtimes.mil.program.Program`.

The one file that touches what is internal to coremltools: its generated protobuf classes (``coremltools.proto``), and
the layout of ``weight.bin``, which is read here directly (a memory map, so nothing is held twice) instead of through
coremltools' native reader. A canary test compares both with ``coremltools.converters.mil.frontend.milproto.load``.

The formats: ``mlmodel/format/MIL.proto`` and ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp`` in apple/coremltools.
"""

from __future__ import annotations

import logging
import math
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BadInput, MissingDependency, Unsupported
from ..files import read_json, safe_join
from .mil.program import NUMPY_DTYPES, Array, Block, Constant, Operation, Program, ValueType

__all__ = [
    "COREMLTOOLS_MAJOR",
    "BlobFile",
    "coremltools_version",
    "enumerated_lengths",
    "function_names",
    "import_coremltools",
    "load_program",
    "mil_messages",
    "model_file",
]

COREMLTOOLS_MAJOR = 9
_HINT = "export it again"
_SENTINEL = 0xDEADBEEF
_DEEPEST = 32  # blocks in blocks
_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
# BlobDataType of StorageFormat.hpp.
_BLOB_DTYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 5: "bfloat16", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


def coremltools_version() -> str:
    """Version of the installed coremltools, or :class:`MissingDependency`."""
    try:
        return metadata.version("coremltools")
    except metadata.PackageNotFoundError:
        raise MissingDependency.package("coremltools", "runtimes") from None


def import_coremltools() -> ModuleType:
    """Import coremltools after a check of its version, without the notes that it logs about this machine.

    It warns of every torch newer than the one it was released with and of the missing native runtime off macOS. Neither
    tells more than our own checks do: programs are executed after export, and the runtime is chosen by platform.
    Raises :class:`MissingDependency`, or :class:`Unsupported` for another major version, whose internals may differ.
    """
    version = coremltools_version()
    if version.partition(".")[0] != str(COREMLTOOLS_MAJOR):
        raise Unsupported(
            f"coremltools {version} is installed, edgestill knows {COREMLTOOLS_MAJOR}.x",
            hint=f"pip install 'coremltools>={COREMLTOOLS_MAJOR}.0,<{COREMLTOOLS_MAJOR + 1}'",
        )
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import coremltools
        except ImportError:
            raise MissingDependency.package("coremltools", "runtimes") from None
    return coremltools


def mil_messages() -> ModuleType:
    """The classes that protobuf made of ``MIL.proto``."""
    import_coremltools()
    from coremltools.proto import MIL_pb2

    module: ModuleType = MIL_pb2
    return module


def model_file(package: Path) -> Path:
    """The ``model.mlmodel`` inside a package, as its manifest names it."""
    manifest = read_json(package / "Manifest.json")
    try:
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError):
        raise BadInput(f"{package / 'Manifest.json'} names no model", hint=_HINT) from None
    path = safe_join(package / "Data", str(relative))
    if not path.is_file():
        raise BadInput(f"{path} does not exist", hint=_HINT)
    return path


def function_names(package: Path) -> tuple[str, ...]:
    """The functions of a package, the one first that is run when none is named; most have ``main`` alone.

    Raises as :func:`load_program` does.
    """
    return _functions(*_parsed(package))


def _functions(path: Path, model: Any) -> tuple[str, ...]:
    names = set(model.mlProgram.functions) if model.WhichOneof("Type") == "mlProgram" else set()
    default = model.description.defaultFunctionName or "main"
    if default not in names:
        raise Unsupported(f"{path} is no ML program with a function {default}", hint="convert it to an mlprogram")
    return (default, *sorted(names - {default}))


def load_program(package: Path, function: str | None = None) -> Program:
    """Parse a package: the function of that name, or the default one. Weights are memory-mapped, not copied.

    Raises :class:`BadInput` for a damaged package or an unknown function, :class:`Unsupported` for a package that is no
    ML program or uses a part of MIL that edgestill does not know.
    """
    path, model = _parsed(package)
    names = _functions(path, model)
    if function is not None and function not in names:
        raise BadInput(f"{path} has no function {function!r}", hint=f"it has {', '.join(names)}")
    try:
        return _Reader(path, mil_messages()).program(model, function or names[0])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error}", hint=_HINT) from None


def enumerated_lengths(package: Path) -> tuple[int, ...]:
    """The sizes of the last axis that the first input of a package may have, rising; none when it may have any.

    Raises :class:`BadInput` for a damaged package.
    """
    _, model = _parsed(package)
    inputs = model.description.input
    shapes = inputs[0].type.multiArrayType.enumeratedShapes.shapes if inputs else ()
    return tuple(sorted({int(shape.shape[-1]) for shape in shapes if shape.shape}))


def _parsed(package: Path) -> tuple[Path, Any]:
    """Path and message of a package's model."""
    path = model_file(package)
    import_coremltools()
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    model = Model_pb2.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise BadInput(f"{path} is not a Core ML model", hint=_HINT) from None
    return path, model


class _Reader:
    """Turns messages into values. ``model_path`` is where ``@model_path`` of a weight reference points to."""

    def __init__(self, path: Path, messages: Any) -> None:
        self._folder = path.parent
        self._name_of_dtype = {number: name.lower() for name, number in messages.DataType.items()}
        self._blobs: dict[str, BlobFile] = {}

    def program(self, model: Any, name: str) -> Program:
        function = model.mlProgram.functions[name]
        inputs, states = {}, {}
        for item in function.inputs:
            if item.type.WhichOneof("type") == "stateType":
                states[item.name] = self._type(item.type.stateType.wrappedType)
            else:
                inputs[item.name] = self._type(item.type)
        block = function.block_specializations[function.opset]
        self._constants: dict[str, Constant] = {}
        operations = self._operations(block, 0)
        types = {name: kind for operation in operations for name, kind in operation.outputs}
        outputs = tuple(block.outputs)
        return Program(
            inputs, states, self._constants, operations, outputs, function.opset, model.specificationVersion,
            {name: types[name] for name in outputs if name in types},
        )  # fmt: skip

    def _operations(self, block: Any, depth: int) -> tuple[Operation, ...]:
        """The operations of a block; its constants go to those of the function."""
        if depth > _DEEPEST:
            raise Unsupported(f"blocks in blocks, {depth} deep", hint="export with less control flow")
        operations = []
        for operation in block.operations:
            if operation.type == "const":
                name = operation.outputs[0].name
                if name in self._constants:
                    raise Unsupported(f"two constants are called {name}", hint=_HINT)
                self._constants[name] = self._value(operation.attributes["val"])
            else:
                operations.append(self._operation(operation, depth))
        return tuple(operations)

    def _operation(self, message: Any, depth: int) -> Operation:
        arguments: dict[str, tuple[str | Constant, ...]] = {
            parameter: tuple(
                item.name if item.WhichOneof("binding") == "name" else self._value(item.value)
                for item in argument.arguments
            )
            for parameter, argument in message.inputs.items()
        }
        name = message.outputs[0].name if message.outputs else ""
        for key, value in message.attributes.items():
            if key == "name":
                name = name or str(self._value(value).value)
            else:  # constexpr operations of iOS 16 carry their arrays as attributes
                arguments[key] = (self._value(value),)
        outputs = tuple((item.name, self._type(item.type)) for item in message.outputs)
        blocks = tuple(
            Block(
                tuple((item.name, self._type(item.type)) for item in block.inputs),
                self._operations(block, depth + 1),
                tuple(block.outputs),
            )
            for block in message.blocks
        )
        return Operation(message.type, name, arguments, outputs, blocks)

    def _type(self, message: Any) -> ValueType:
        if message.WhichOneof("type") != "tensorType":
            raise Unsupported(f"values of {message.WhichOneof('type')} are not known", hint="use tensors only")
        tensor = message.tensorType
        sizes = [d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions]
        return ValueType(self._name_of_dtype[tensor.dataType], tuple(sizes))

    def _value(self, message: Any) -> Constant:
        kind = self._type(message.type)
        shape = tuple(size or 0 for size in kind.shape)
        if message.WhichOneof("value") == "blobFileValue":
            blob = message.blobFileValue
            array, stored = self._blob(blob.fileName, blob.offset, kind.dtype, shape)
            return Constant(kind, array, stored)
        field = message.immediateValue.tensor.WhichOneof("value")
        raw = getattr(message.immediateValue.tensor, field).values
        if kind.dtype == "string":
            return Constant(kind, str(raw[0]) if not shape else [str(item) for item in raw])
        dtype = NUMPY_DTYPES[kind.dtype]
        if field == "bytes":
            array = _unpack(np.frombuffer(raw, np.uint8), kind.dtype, math.prod(shape))
        else:
            array = np.array(raw, dtype)
        if array.size == 1 and math.prod(shape) > 1:  # MIL.proto: one value stands for all
            array = np.broadcast_to(array, shape)
        return Constant(kind, array.reshape(shape))

    def _blob(self, reference: str, offset: int, dtype: str, shape: tuple[int, ...]) -> tuple[Array, int]:
        """The array at ``offset`` of a weight file, a view of the memory map, and its size in bytes."""
        file = self._blobs.get(reference)
        if file is None:
            path = safe_join(self._folder, reference.removeprefix("@model_path/"))
            file = self._blobs[reference] = BlobFile(path)
        return file.array(offset, dtype, shape), -(-math.prod(shape) * _bits(dtype) // 8)


class BlobFile:
    """A weight file, memory-mapped. Raises :class:`BadInput` when it is missing."""

    def __init__(self, path: Path) -> None:
        if not path.is_file() or path.stat().st_size < 64:
            raise BadInput(f"weight file {path} is missing or empty", hint=_HINT)
        self._name = path.name
        self._data = np.memmap(path, np.uint8, mode="r")

    def array(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The array that a program names by ``offset``; values under a byte come one a byte, others as a view.

        Raises :class:`BadInput` when something else stands there.
        """
        data, where = self._data, f"{self._name} at offset {offset}"
        if offset + 64 > data.size:
            raise BadInput(f"{where}: beyond the end of the file", hint=_HINT)
        sentinel, code = (int(n) for n in data[offset : offset + 8].view("<u4"))
        size, begin = (int(n) for n in data[offset + 8 : offset + 24].view("<u8"))
        if sentinel != _SENTINEL:
            raise BadInput(f"{where}: no weight begins there", hint=_HINT)
        if _BLOB_DTYPES.get(code) != dtype:
            raise BadInput(f"{where}: stored as {_BLOB_DTYPES.get(code)}, the program says {dtype}", hint=_HINT)
        count = math.prod(shape)
        if size != -(-count * _bits(dtype) // 8) or begin + size > data.size:
            raise BadInput(f"{where}: {size} bytes do not hold {dtype} {list(shape)}", hint=_HINT)
        return _unpack(data[begin : begin + size], dtype, count).reshape(shape)


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or 8 * int(np.dtype(NUMPY_DTYPES[dtype]).itemsize)


def _unpack(raw: Array, dtype: str, count: int) -> Array:
    """``count`` values from their bytes; values under a byte are packed little end first, across byte borders."""
    bits = _BITS.get(dtype)
    if bits is None:
        return raw.view(np.dtype(NUMPY_DTYPES[dtype]).newbyteorder("<"))
    if bits == 4:
        values = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:count]
        return ((values ^ 8).astype(np.int8) - 8) if dtype == "int4" else values
    stream = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    if bits == 1:
        return stream[:, 0]
    return np.packbits(np.pad(stream, ((0, 0), (0, 8 - bits))), axis=1, bitorder="little")[:, 0]
