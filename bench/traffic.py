"""What an artifact must read and compute for a token: bytes and floating-point operations, counted in its own files.

The two numbers behind every roofline and every prediction of decode speed. A pass reads each weight once, however many
tokens it takes; a decoder also reads the keys and values of all tokens before, and writes those of the new ones.
Intermediate results are not counted: they stay in the caches. An operation is an addition or a multiplication, so a
multiply-add counts two.

>>> traffic = Traffic(weight_bytes=1000, row_bytes=10, kv_bytes=4, body_flops=1600, head_flops=400, pair_flops=8)
>>> traffic.bytes_of(1), traffic.bytes_of(1, past=100)
(1014, 1414)
>>> traffic.flops_of(2, past=3), traffic.flops_of(2, past=3, answers=1)
(4080, 3680)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..artifact import Artifact
from ..errors import BadInput, Unsupported
from ..runtimes.gguf_file import GgufFile
from .predict_work import gguf_work

__all__ = ["Arithmetic", "Traffic", "count_traffic"]

Arithmetic = Literal["float", "int8"]


@dataclass(frozen=True)
class Traffic:
    """Of one artifact, all as it lies in the file.

    ``weight_bytes``: read by every pass. ``row_bytes``: rows of embedding tables, read for each new token (a table that
    is also multiplied with stands in both). ``kv_bytes``: keys and values of one token, all layers; 0 for an encoder.
    ``body_flops``: of a token in the matrices of the layers, ``head_flops`` in the one that makes logits (0 where there
    is none), ``pair_flops`` for each pair of a new token and one that it may look at (all layers; pairs that a causal
    mask hides are counted, as most kernels compute them). ``arithmetic``: in which most products are computed, see
    ``note`` for what the runtime is known to do otherwise.
    """

    weight_bytes: int
    row_bytes: int
    kv_bytes: int
    body_flops: int
    head_flops: int
    pair_flops: int
    arithmetic: Arithmetic = "float"
    note: str = ""

    def bytes_of(self, new: int, *, past: int = 0, batch: int = 1) -> int:
        """Bytes that a pass over ``new`` tokens (in each of ``batch`` sequences) after ``past`` cached ones moves."""
        return self.weight_bytes + batch * (new * self.row_bytes + (past + new) * self.kv_bytes)

    def flops_of(self, new: int, *, past: int = 0, answers: int | None = None, batch: int = 1) -> int:
        """Operations of that pass; ``answers``: of how many tokens logits are made (default: all)."""
        heads = new if answers is None else answers
        return batch * (
            new * self.body_flops + heads * self.head_flops + new * (past + new) * self.pair_flops
        )  # fmt: skip


def count_traffic(artifact: Artifact) -> Traffic:
    """Count an artifact's own files. :class:`Unsupported` where the format does not tell, :class:`BadInput` for damage.

    GGUF: tensors and hyper-parameters of the header; ONNX: the graph; Core ML: the program.
    """
    match artifact.manifest.format:
        case "gguf":
            return _gguf(artifact)
        case "onnx":
            from .traffic_onnx import onnx_traffic

            return onnx_traffic(artifact)
        case "coreml":
            from .traffic_coreml import coreml_traffic

            return coreml_traffic(artifact)
        case other:
            raise Unsupported(f"can't count what {other!r} reads", hint="known: onnx, gguf, coreml")


# Tables of which a token takes one row (names of llama.cpp's `llama-arch.cpp`).
_TABLES = ("token_embd.weight", "position_embd.weight", "token_types.weight")
_FLOATS = ("f32", "f16", "bf16")


def _gguf(artifact: Artifact) -> Traffic:
    """Every tensor is read by every pass, except tables; one that is both (tied embeddings) is read as the head."""
    generates = artifact.manifest.task == "text-generation"
    with GgufFile(artifact.entry) as file:
        weights, products = gguf_work(file)
        name = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        head = 2 * file.tensors[name].parameters if generates and name in file.tensors else 0
        rows = sum(t.size_bytes // t.shape[0] for t in file.tensors.values() if t.name in _TABLES)
        matrices = [t for t in file.tensors.values() if len(t.shape) > 1 and (t.name not in _TABLES or t.name == name)]
        exact = sum(t.parameters for t in matrices if t.grid in _FLOATS)
        unknown = next((t for t in file.tensors.values() if t.size_bytes == 0), None)
        if unknown is not None:
            raise Unsupported(f"{artifact.entry}: {unknown.name} is of a type that is not known ({unknown.grid})")
        kind = str(file.metadata.get("general.architecture", ""))
        try:
            layers = int(file.metadata[f"{kind}.block_count"])
            heads = int(file.metadata[f"{kind}.attention.head_count"])
            width = int(file.metadata[f"{kind}.embedding_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{artifact.entry} does not say {error}", hint="export it again") from None
        key = int(file.metadata.get(f"{kind}.attention.key_length", width // heads))
        value = int(file.metadata.get(f"{kind}.attention.value_length", key))
        key_values = int(file.metadata.get(f"{kind}.attention.head_count_kv", heads))
    # llama.cpp's cache is float16 unless it is told otherwise
    kept = 2 * layers * key_values * (key + value) if generates else 0
    return Traffic(
        weights, rows, kept, 2 * products - head, head, 2 * layers * heads * (key + value),
        "float" if 2 * exact > sum(t.parameters for t in matrices) else "int8",
    )  # fmt: skip
