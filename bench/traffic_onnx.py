"""What an ONNX graph reads and computes for a token: :func:`edgestill.bench.traffic.count_traffic` of the format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..artifact import Artifact
from ..runtimes.onnx_reader import OnnxFile, graph_path
from .predict_work import onnx_work
from .traffic import Traffic

__all__ = ["onnx_traffic"]

# Operators that multiply their first input with a matrix -> at which inputs the matrix and its scales and zeros are.
_PRODUCTS = {
    "MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulNBits": 1,
    "QLinearMatMul": 3, "MatMulIntegerToFloat": 1,
}  # fmt: skip
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_WHOLE_NUMBERS = ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulIntegerToFloat")
# What makes one value of another without looking at a token: weights pass through on their way to a product.
_FORMS = ("Cast", "Reshape", "Identity", "Transpose", "DequantizeLinear", "Unsqueeze", "Squeeze")
_ATTENTION = ("Softmax", "MultiHeadAttention", "GroupQueryAttention", "Attention")
_FARTHEST = 12


class _Graph:
    """Who makes and who reads a value."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.made = {name: node for node in file.graph.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in file.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    def stored(self, name: str) -> str | None:
        """The initialiser behind ``name``, through casts and the like; ``None`` for what depends on the input."""
        for _ in range(_FARTHEST):
            if name in self.file.tensors:
                return name
            node = self.made.get(name)
            if node is None or node.op_type not in _FORMS:
                return None
            name = node.input[0]
        return None

    def uses(self, name: str) -> Iterator[tuple[Any, str]]:
        """(node, which of its inputs) of everything that computes with ``name``, through casts and the like."""
        for node in self.readers.get(name, ()):
            if node.op_type in _FORMS and node.input[0] == name:
                yield from self.uses(node.output[0])
            else:
                yield node, name


def onnx_traffic(artifact: Artifact) -> Traffic:
    """Bytes by :func:`edgestill.bench.predict_work.onnx_work`, operations by the matrices behind products."""
    graph = _Graph(OnnxFile(graph_path(artifact)))
    tensors = graph.file.tensors
    vocabulary = artifact.manifest.vocab_size
    body = head = whole = 0
    for node in graph.file.graph.node:
        size = _matrix(graph, node)
        if size is None:
            continue
        inner, outer = size
        flops = 2 * inner * outer
        if outer == vocabulary and artifact.manifest.task == "text-generation":
            head += flops
        else:
            body += flops
        level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
        whole += flops if node.op_type in _WHOLE_NUMBERS or level == 4 or _between_pairs(graph, node) else 0
    weights, _ = onnx_work(graph.file)
    rows = halves = 0
    for name, tensor in tensors.items():
        tables = [node.op_type in _LOOKUPS and node.input[0] == as_what for node, as_what in graph.uses(name)]
        if len(tensor.shape) > 1 and any(tables):
            rows += tensor.size_bytes // tensor.shape[0]
        if len(tensor.shape) > 1 and not all(tables) and tensor.dtype.name == "float16":
            halves += tensor.size_bytes
    note = ""
    if 2 * halves > weights:
        note = "onnxruntime's CPU provider widens float16 weights to float32 at load: it reads up to twice these bytes"
    return Traffic(
        weights, rows, artifact.manifest.kv_cache_bytes_per_token or 0, body, head, _pairs(graph),
        "int8" if 2 * whole > body + head else "float", note,
    )  # fmt: skip


def _matrix(graph: _Graph, node: Any) -> tuple[int, int] | None:
    """(values in, values out) of a product with a stored matrix."""
    if node.op_type not in _PRODUCTS:
        return None
    if node.op_type == "MatMulNBits":
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        return fields["K"], fields["N"]
    at = _PRODUCTS[node.op_type]
    stored = graph.stored(node.input[at]) if len(node.input) > at else None
    if stored is None or len(graph.file.tensors[stored].shape) < 2:
        return None
    shape = graph.file.tensors[stored].shape[-2:]
    turned = _turned(graph, node, node.input[at])
    return (shape[1], shape[0]) if turned else (shape[0], shape[1])


def _between_pairs(graph: _Graph, node: Any) -> bool:
    """Both factors come dequantised: the runtime computes the product with what they were before (QDQ)."""
    made = [graph.made.get(name) for name in node.input[:2]]
    return all(one is not None and one.op_type == "DequantizeLinear" for one in made)


def _turned(graph: _Graph, node: Any, name: str) -> bool:
    """Whether the matrix is stored as [out, in]."""
    count = sum(a.i for a in node.attribute if a.name == "transB")
    while name not in graph.file.tensors:
        count += graph.made[name].op_type == "Transpose"
        name = graph.made[name].input[0]
    return bool(count % 2)


def _pairs(graph: _Graph) -> int:
    """Operations of a pair of tokens in attention: twice two for each value of the mixed heads.

    How wide those are together is what the matrix behind the attention takes in, for fused operators as for a graph
    that spells attention out (there, Softmax stands for it).
    """
    total = 0
    for node in graph.file.graph.node:
        if node.op_type not in _ATTENTION:
            continue
        front = [node]
        width = 0
        for _ in range(_FARTHEST):
            front = [reader for one in front for reader in graph.readers.get(one.output[0], ())]
            found = [size[0] for one in front if (size := _matrix(graph, one)) is not None]
            if found:
                width = found[0]
                break
        total += 4 * width
    return total
