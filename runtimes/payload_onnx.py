"""Reading the weights of an ONNX artifact back from its file, through :mod:`edgestill.grids` only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..errors import BadInput, MissingDependency, Unsupported
from ..grids import Affine, dequantise_affine

__all__ = ["OnnxPayload", "histogram", "load_model"]

Floats = npt.NDArray[np.float32]


def load_model(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a file, external data not read; :class:`BadInput` for anything else."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingDependency.package("onnx", "runtimes") from None
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise BadInput(f"{path} is not a whole ONNX file: {error}", hint="export it again") from None
    if not model.graph.node:
        raise BadInput(f"{path} holds no graph", hint="export it again")
    return model


class OnnxPayload:
    """The weights in an ONNX artifact; see :class:`edgestill.artifact.StoredTensor` for what is known of each."""

    def __init__(self, artifact: Artifact) -> None:
        self._path = artifact.entry
        self._model = load_model(artifact.entry)
        self._initialisers = {tensor.name: tensor for tensor in self._model.graph.initializer}

    def stored(self, tensor: StoredTensor) -> Floats:
        """The dequantised float32 array in the payload's own layout (``tensor.layout`` leads to the student's)."""
        raw = self._array(tensor.stored)
        match tensor.grid:
            case "float32" | "float16":
                return np.asarray(raw, np.float32)
            case "int8":
                return self._int8(tensor, raw)
            case grid if re.fullmatch(r"int[48]-b\d+", grid):
                return self._blocks(tensor, raw, int(grid[3]))
            case other:
                raise Unsupported(f"{tensor.stored}: an ONNX payload has no grid {other!r}", hint="export it again")

    def histogram(self) -> dict[str, Histogram]:
        """What is stored in which type, read from the file."""
        return histogram(self._path, self._model)

    def _int8(self, tensor: StoredTensor, raw: npt.NDArray[Any]) -> Floats:
        """Signed codes ``[K, N]`` with a scale for each of the N columns."""
        codes = (raw.T.astype(np.int16) + 128).astype(np.uint8)
        scales = self._array(tensor.scales or "").reshape(-1, 1)
        zeros = np.full(scales.shape, 128, np.uint8)
        return np.ascontiguousarray(dequantise_affine(Affine(codes, scales, zeros, 8, codes.shape[1])).T)

    def _blocks(self, tensor: StoredTensor, raw: npt.NDArray[Any], bits: int) -> Floats:
        """Codes ``[N, blocks, bytes]``, scales ``[N, blocks]``, zero points packed a row or none."""
        scales = self._array(tensor.scales or "")
        rows, blocks = scales.shape
        codes = _unpack(raw, bits).reshape(rows, -1)
        if tensor.zero_points:
            zeros = _unpack(self._array(tensor.zero_points), bits)[:, :blocks]
        else:
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return dequantise_affine(Affine(codes, scales, zeros, bits, codes.shape[1] // blocks))

    def _array(self, name: str) -> npt.NDArray[Any]:
        from onnx import numpy_helper

        if name not in self._initialisers:
            raise BadInput(f"{self._path}: no tensor {name!r}", hint="export it again")
        try:
            return np.asarray(numpy_helper.to_array(self._initialisers[name], str(self._path.parent)))
        except (ValueError, OSError, TypeError) as error:
            raise BadInput(f"{self._path}: tensor {name!r} can't be read: {error}", hint="export it again") from None


def _unpack(packed: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of ``export.onnx_graph.pack_bits`` along the last axis."""
    if bits == 8:
        return np.asarray(packed, np.uint8)
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2] = packed & 0xF
    out[..., 1::2] = packed >> 4
    return out


def histogram(path: Path, model: Any = None) -> dict[str, Histogram]:
    """Initialisers of a file by what their bytes mean.

    A matrix that a quantised operator reads counts once, with scales and zero points (``"int4-b32"``, ``"int8"``);
    everything else by its type (``"float32"``, ``"int64"``).
    """
    model = model or load_model(path)
    sizes = {tensor.name: (tensor, _size(tensor)) for tensor in model.graph.initializer}
    rows: dict[str, list[int]] = {}
    counted: set[str] = set()

    def count(kind: str, name: str, parameters: int, companions: tuple[str, ...] = ()) -> None:
        if name in counted:
            return
        row = rows.setdefault(kind, [0, 0, 0])
        parts = [part for part in (name, *companions) if part in sizes and part not in counted]
        counted.update(parts)
        row[0] += 1
        row[1] += parameters
        row[2] += sum(sizes[part][1] for part in parts)

    for node in model.graph.node:
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits" and node.input[1] in sizes:
            companions = tuple(node.input[2:4])
            kind = f"int{fields['bits']}-b{fields['block_size']}"
            count(kind, node.input[1], fields["N"] * fields["K"], companions)
        elif node.op_type == "MatMulInteger" and node.input[1] in sizes:
            scales = node.input[1].removesuffix(".int8") + ".scales"
            count("int8", node.input[1], int(np.prod(sizes[node.input[1]][0].dims)), (scales,))
    for node in model.graph.node:
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "GatherBlockQuantized" and node.input[0] in sizes:
            codes = int(np.prod(sizes[node.input[0]][0].dims)) * 8 // fields["bits"]
            companions = tuple(f"{node.input[0]}.{part}" for part in ("scales", "zeros"))
            count(f"int{fields['bits']}-b{fields['block_size']}", node.input[0], codes, companions)
    for name, (tensor, _) in sizes.items():
        if name not in counted:
            count(_type_name(tensor.data_type), name, int(np.prod(tensor.dims)))
    return {kind: Histogram(*rows[kind]) for kind in sorted(rows)}


def _size(tensor: Any) -> int:
    """Bytes of a tensor, without reading them where they stand in another file."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in external:
        return int(external["length"])
    return len(tensor.raw_data) or tensor.ByteSize()


def _type_name(data_type: int) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(data_type).name)
