"""What an artifact costs a device, counted in the file itself: bytes read and multiplications for each token.

Decoding a token reads every weight once, with three exceptions: a table that is only looked up (the input embedding of
a model whose head is a matrix of its own, learned positions, the rows of a rotary table) costs a row; a head that is
tied to the embedding counts once; of experts only those in use are read. To this comes the cache of keys and values
that lies behind the token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..artifact import Artifact, Task
from ..errors import Unsupported
from ..runtimes.gguf_file import GgufFile
from ..runtimes.onnx_reader import OnnxFile, graph_path

__all__ = ["Work", "gguf_work", "onnx_work", "work_of"]

_ENGINES = {"gguf": "llama.cpp", "onnx": "onnxruntime", "coreml": "coreml"}
_TABLES = ("token_embd.weight", "position_embd.weight", "token_types.weight")  # of llama.cpp's names
_LOOK_UP = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"})
_SAME_BYTES = frozenset({"Reshape", "Cast", "Identity", "Transpose", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Work:
    """Of one artifact: ``weight_bytes`` read and ``weights`` multiplied with for each token (two operations each),
    ``kv_bytes_per_token`` of cache that each token behind adds, ``model_bytes`` of its files."""

    engine: str
    task: Task
    weight_bytes: int
    weights: int
    kv_bytes_per_token: int | None
    model_bytes: int
    max_length: int

    @property
    def bits(self) -> float:
        """Bits read for each weight."""
        return self.weight_bytes * 8 / self.weights

    def bytes_per_token(self, depth: float) -> float:
        """Bytes read for a token that has ``depth`` tokens behind it."""
        return self.weight_bytes + depth * (self.kv_bytes_per_token or 0)


def work_of(artifact: Artifact) -> Work:
    """Count it. :class:`Unsupported` for a format whose bytes a token are not known."""
    manifest = artifact.manifest
    match manifest.format:
        case "gguf":
            with GgufFile(artifact.entry) as file:
                read, weights = gguf_work(file)
        case "onnx":
            read, weights = onnx_work(OnnxFile(graph_path(artifact)))
        case other:
            raise Unsupported(
                f"no published speed tells how fast {other} reads weights", hint="predicted are gguf and onnx"
            )
    if not weights:
        raise Unsupported(f"{artifact.entry.name} multiplies with no weight", hint="predicted are gguf and onnx")
    return Work(
        _ENGINES[manifest.format], manifest.task, read, weights, manifest.kv_cache_bytes_per_token,
        artifact.model_bytes, manifest.max_length,
    )  # fmt: skip


def gguf_work(file: GgufFile) -> tuple[int, int]:
    """Bytes read and weights multiplied for a token of a GGUF file."""
    architecture = str(file.metadata.get("general.architecture", ""))
    experts = _count(file.metadata.get(f"{architecture}.expert_count"))
    used = _count(file.metadata.get(f"{architecture}.expert_used_count"))
    share = used / experts if experts and 0 < used <= experts else 1.0
    tied = "output.weight" not in file.tensors and "cls.output.weight" not in file.tensors
    decoder = not architecture.endswith("bert")
    read = weights = 0.0
    for tensor in file.tensors.values():
        if tensor.name in _TABLES and not (tensor.name == "token_embd.weight" and tied and decoder):
            continue
        factor = share if "_exps." in tensor.name else 1.0
        read += tensor.size_bytes * factor
        if len(tensor.shape) >= 2:
            weights += tensor.parameters * factor
    return round(read), round(weights)


def onnx_work(file: OnnxFile) -> tuple[int, int]:
    """Bytes read and weights multiplied for a token of an ONNX graph.

    An initialiser counts when something else than a look-up uses it, directly or through operators that only change
    its shape or type.
    """
    stands_for = {name: name for name in file.tensors}
    used: set[str] = set()
    weights: dict[str, int] = {}
    for node in file.graph.node:
        sources = [stands_for[name] for name in node.input if name in stands_for]
        if node.op_type in _SAME_BYTES:
            if sources and node.input[0] in stands_for:
                stands_for |= dict.fromkeys(node.output, sources[0])
            continue
        if node.op_type in _LOOK_UP:
            continue
        used.update(sources)
        weights |= _multiplied(node, file, stands_for)
    return sum(file.tensors[name].size_bytes for name in used), sum(weights.values())


def _multiplied(node: object, file: OnnxFile, stands_for: dict[str, str]) -> dict[str, int]:
    """Weights that a node multiplies with, by the initialiser that holds them."""
    kind, inputs = node.op_type, list(node.input)  # type: ignore[attr-defined]
    if kind == "MatMulNBits" and inputs[1] in stands_for:
        fields = {attribute.name: attribute.i for attribute in node.attribute}  # type: ignore[attr-defined]
        return {stands_for[inputs[1]]: int(fields["N"]) * int(fields["K"])}
    if kind in ("MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul",
                "Conv", "DequantizeLinear"):  # fmt: skip
        return {stands_for[name]: size for name, size in _matrices(inputs, file, stands_for)}
    return {}


def _matrices(inputs: list[str], file: OnnxFile, stands_for: dict[str, str]) -> Iterable[tuple[str, int]]:
    for name in inputs:
        tensor = file.tensors.get(stands_for.get(name, ""))
        if tensor is not None and len(tensor.shape) >= 2:
            yield name, math.prod(tensor.shape)


def _count(value: object) -> int:
    return int(value) if isinstance(value, int) else 0
