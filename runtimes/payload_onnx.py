"""Reading the weights of an ONNX artifact back from its file, through :mod:`edgestill.grids` only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..errors import Unsupported
from ..grids import Affine, InputGrid, dequantise_affine
from .onnx_constants import OnnxConstants
from .onnx_reader import OnnxFile, graph_path

__all__ = ["OnnxPayload", "histogram"]

Floats = npt.NDArray[np.float32]


class OnnxPayload:
    """The weights in an ONNX artifact; see :class:`edgestill.artifact.StoredTensor` for what is known of each."""

    def __init__(self, artifact: Artifact) -> None:
        self._file = OnnxFile(graph_path(artifact))

    def stored(self, tensor: StoredTensor) -> Floats:
        """The dequantised float32 array in the payload's own layout (``tensor.layout`` leads to the student's)."""
        if tensor.grid.startswith(("folded", "dynamic")) or tensor.stored not in self._file.tensors:
            constants = OnnxConstants(self._file)  # of another tool
            if constants.is_constant(tensor.stored):
                return np.asarray(constants.value(tensor.stored), np.float32)
        raw = self._file.array(tensor.stored)
        match tensor.grid:
            case "float32" | "float16":
                return np.asarray(raw, np.float32)
            case "int8" | "int8-static":
                return self._int8(tensor, raw)
            case grid if re.fullmatch(r"int[48]-b\d+(-search|-gptq)?", grid):
                return self._blocks(tensor, raw, int(grid[3]))
            case other:
                raise Unsupported(f"{tensor.stored}: an ONNX payload has no grid {other!r}", hint="export it again")

    def input_grid(self, tensor: StoredTensor) -> InputGrid | None:
        """The fixed grid that the graph puts the input of the product with ``tensor`` on; ``None`` if there is none."""
        made = {name: node for node in self._file.graph.node for name in node.output}
        weights = {node.output[0] for node in self._file.graph.node
                   if node.op_type == "DequantizeLinear" and node.input[0] == tensor.stored}  # fmt: skip
        for node in self._file.graph.node:
            if node.op_type == "MatMul" and node.input[1] in weights:
                given = made.get(node.input[0])
                if given is not None and given.op_type == "DequantizeLinear":
                    scale, zero = (self._file.array(name).reshape(()) for name in given.input[1:3])
                    return InputGrid(np.float32(scale), int(zero))
        return None

    def histogram(self) -> dict[str, Histogram]:
        """What is stored in which type, read from the file."""
        return histogram(self._file)

    def _int8(self, tensor: StoredTensor, raw: npt.NDArray[Any]) -> Floats:
        """Signed codes ``[K, N]`` with a scale for each of the N columns."""
        codes = (raw.T.astype(np.int16) + 128).astype(np.uint8)
        scales = self._file.array(tensor.scales or "").reshape(-1, 1)
        zeros = np.full(scales.shape, 128, np.uint8)
        return np.ascontiguousarray(dequantise_affine(Affine(codes, scales, zeros, 8, codes.shape[1])).T)

    def _blocks(self, tensor: StoredTensor, raw: npt.NDArray[Any], bits: int) -> Floats:
        """Codes ``[N, blocks, bytes]``, scales ``[N, blocks]``, zero points packed a row or none."""
        scales = self._file.array(tensor.scales or "").astype(np.float32)
        rows, blocks = scales.shape
        codes = _unpack(raw, bits).reshape(rows, -1)
        if tensor.zero_points:
            zeros = _unpack(self._file.array(tensor.zero_points), bits)[:, :blocks]
        else:
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return dequantise_affine(Affine(codes, scales, zeros, bits, codes.shape[1] // blocks))


def _unpack(packed: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of ``export.onnx_graph.pack_bits`` along the last axis."""
    if bits == 8:
        return np.asarray(packed, np.uint8)
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2] = packed & 0xF
    out[..., 1::2] = packed >> 4
    return out


def histogram(file: OnnxFile) -> dict[str, Histogram]:
    """Initialisers of a file by what their bytes mean.

    A matrix that a quantised operator reads counts once, with scales and zero points (``"int4-b32"``, ``"int8"``);
    everything else by its type (``"float32"``, ``"int64"``).
    """
    rows: dict[str, list[int]] = {}
    counted: set[str] = set()

    def count(kind: str, name: str, parameters: int, companions: Sequence[str] = ()) -> None:
        parts = [part for part in (name, *companions) if part in file.tensors and part not in counted]
        if name not in parts:
            return
        counted.update(parts)
        row = rows.setdefault(kind, [0, 0, 0])
        row[0] += 1
        row[1] += parameters
        row[2] += sum(file.tensors[part].size_bytes for part in parts)

    widened = {node.output[0]: node.input[0] for node in file.graph.node if node.op_type == "Cast"}
    reshaped = {node.output[0]: node.input[0] for node in file.graph.node if node.op_type == "Reshape"}

    def elements(name: str) -> int:
        return math.prod(file.tensors[name].shape)

    # matrices first: a table that is both gathered from and multiplied with is described better by the latter
    for node in sorted(file.graph.node, key=lambda node: node.op_type == "GatherBlockQuantized"):
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        stored = node.input[1 if node.op_type.startswith("MatMul") else 0] if node.input else ""
        stored = reshaped.get(stored, stored) if node.op_type == "GatherBlockQuantized" else stored
        if stored not in file.tensors:
            continue
        match node.op_type:
            case "MatMulNBits":
                kind = f"int{fields['bits']}-b{fields['block_size']}"
                count(kind, stored, fields["N"] * fields["K"], [widened.get(name, name) for name in node.input[2:4]])
            case "MatMulInteger":
                count("int8", stored, elements(stored), [stored.removesuffix(".int8") + ".scales"])
            case "DequantizeLinear":
                count("int8-static", stored, elements(stored), [node.input[1]])
            case "GatherBlockQuantized":
                kind = f"int{fields['bits']}-b{fields['block_size']}"
                count(kind, stored, elements(stored) * 8 // fields["bits"], [f"{stored}.scales", f"{stored}.zeros"])
    for name, tensor in file.tensors.items():
        count(tensor.dtype.name, name, elements(name))
    return {kind: Histogram(*rows[kind]) for kind in sorted(rows)}
