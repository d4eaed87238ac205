"""The graph of a BERT-like encoder (bert, roberta, xlm-roberta, distilbert, electra, mpnet) with its pooling or head.

Residual stream, norms and pooling stay float32 in every variant. Padding is masked with -1e4, not with -inf: in half
precision -inf becomes NaN as soon as it is multiplied by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..artifact import TensorSpec
from ..checkpoints import ModelFolder
from ..errors import Unsupported
from .onnx_graph import MICROSOFT, Graph

__all__ = ["build_encoder"]

MASKED = -1e4


@dataclass(frozen=True)
class _Names:
    """Where one family keeps its weights: paths below the base model, ``{i}`` is the layer."""

    base: str
    layer: str = "encoder.layer.{i}"
    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    norm1: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm2: str = "output.LayerNorm"


_NAMES = {
    "bert": _Names("bert"),
    "electra": _Names("electra"),
    "roberta": _Names("roberta"),
    "xlm-roberta": _Names("roberta"),
    "mpnet": _Names("mpnet", qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"), out="attention.attn.o",
                    norm1="attention.LayerNorm"),
    "distilbert": _Names("distilbert", "transformer.layer.{i}", ("attention.q_lin", "attention.k_lin",
                         "attention.v_lin"), "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2",
                         "output_layer_norm"),
}  # fmt: skip


class _Encoder:
    """One encoder in the making."""

    def __init__(self, graph: Graph, model: ModelFolder, length: int) -> None:
        if model.architecture not in _NAMES:
            raise Unsupported(f"ONNX: no writer for {model.architecture!r} encoders", hint=", ".join(sorted(_NAMES)))
        self.graph, self.model, self.length = graph, model, length
        self.names = _NAMES[model.architecture]
        self.prefix = "" if model.task == "feature-extraction" else f"{self.names.base}."
        config = model.config
        self.heads = int(config.get("num_attention_heads") or config["n_heads"])
        self.epsilon = float(config.get("layer_norm_eps", 1e-12))
        self.activation = str(config.get("hidden_act") or config.get("activation") or "gelu")
        self.offset = int(config.get("pad_token_id", 1)) + 1 if "position_ids" not in config and self._shifted else 0

    @property
    def _shifted(self) -> bool:
        """RoBERTa and MPNet count positions from ``padding_idx + 1``."""
        return self.model.architecture in ("roberta", "xlm-roberta", "mpnet")

    def body(self) -> str:
        """Hidden states ``[batch, length, hidden]``."""
        graph = self.graph
        x = self._embeddings()
        mask = graph.cast("attention_mask", "int32")
        bias = self._relative_bias()
        for layer in range(self.model.layers):
            x = self._layer(x, layer, mask, bias)
        return x

    def _embeddings(self) -> str:
        graph, base = self.graph, f"{self.prefix}embeddings"
        shape = graph.op("Shape", "input_ids", name="ids.shape")
        length = graph.op("Gather", shape, graph.constant(1), name="ids.length")
        step = (graph.constant(self.offset), graph.op("Add", length, graph.constant(self.offset)), graph.constant(1))
        places = graph.op("Unsqueeze", graph.op("Range", *step, name="positions"), graph.constant([0]))
        x = graph.embed("input_ids", f"{base}.word_embeddings.weight")
        x = graph.op("Add", x, graph.embed(places, f"{base}.position_embeddings.weight"), name=f"{base}.sum")
        kinds = f"{base}.token_type_embeddings.weight"
        if kinds in graph.weights:  # every token is of type 0: sentence pairs are not among our tasks
            kind = graph.op("Gather", graph.parameter(kinds), graph.constant(0), name=f"{base}.type")
            x = graph.op("Add", x, kind, name=f"{base}.sum")
        x = self._norm(x, f"{base}.LayerNorm")
        project = f"{self.prefix}embeddings_project"
        if f"{project}.weight" in graph.weights:
            x = graph.linear(x, [f"{project}.weight"], [f"{project}.bias"], role="mlp")
        return x

    def _norm(self, x: str, name: str) -> str:
        scale, shift = (self.graph.parameter(f"{name}.{part}") for part in ("weight", "bias"))
        return self.graph.op("LayerNormalization", x, scale, shift, name=name, axis=-1, epsilon=self.epsilon)

    def _add_norm(self, x: str, delta: str, name: str) -> str:
        scale, shift = (self.graph.parameter(f"{name}.{part}") for part in ("weight", "bias"))
        return self.graph.op(
            "SkipLayerNormalization", x, delta, scale, shift, name=name, domain=MICROSOFT, epsilon=self.epsilon
        )

    def _layer(self, x: str, layer: int, mask: str, bias: str) -> str:
        graph, names = self.graph, self.names
        base = f"{self.prefix}{names.layer.format(i=layer)}."
        parts = [base + part for part in names.qkv]
        packed = graph.linear(
            x, [f"{part}.weight" for part in parts], [f"{part}.bias" for part in parts], role="attention", half=True
        )
        query, key, value = graph.ops("Split", [packed], 3, name=f"{base}split", axis=-1, num_outputs=3)
        inputs = [query, key, value, "", mask, bias]
        mixed = graph.op(
            "MultiHeadAttention", *(inputs if bias else inputs[:-1]), name=f"{base}attention", domain=MICROSOFT,
            num_heads=self.heads, mask_filter_value=MASKED,
        )  # fmt: skip
        out = self._linear(mixed, base + names.out, "attention")
        x = self._add_norm(x, out, base + names.norm1)
        wide = self._activate(self._linear(x, base + names.up, "mlp", half=True), base + names.up)
        return self._add_norm(x, self._linear(wide, base + names.down, "down"), base + names.norm2)

    def _linear(self, x: str, name: str, role: str, *, half: bool = False) -> str:
        return self.graph.linear(x, [f"{name}.weight"], [f"{name}.bias"], role=role, half=half)  # type: ignore[arg-type]

    def _activate(self, x: str, name: str) -> str:
        match self.activation:
            case "gelu":
                return self.graph.op("Gelu", x, name=f"{name}.gelu", domain=MICROSOFT)
            case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
                return self.graph.op("FastGelu", x, name=f"{name}.gelu", domain=MICROSOFT)
            case "relu":
                return self.graph.op("Relu", x, name=f"{name}.relu")
            case other:
                raise Unsupported(f"ONNX: activation {other!r} of an encoder", hint="supported: gelu, gelu_new, relu")

    def _relative_bias(self) -> str:
        """MPNet's bias ``[1, heads, length, length]`` by the bucket of the distance between two tokens, else ""."""
        graph = self.graph
        name = f"{self.prefix}encoder.relative_attention_bias.weight"
        if name not in graph.weights:
            return ""
        buckets = graph.weights.shape(name)[0]
        table = graph.constant(_buckets(np.arange(1 - self.length, self.length), buckets))
        row = graph.op("Gather", graph.op("Shape", "input_ids"), graph.constant(1), name="bias.length")
        places = graph.op("Range", graph.constant(0), row, graph.constant(1), name="bias.range")
        distance = graph.op("Sub", graph.op("Unsqueeze", places, graph.constant([0])),
                            graph.op("Unsqueeze", places, graph.constant([1])), name="bias.distance")  # fmt: skip
        index = graph.op("Add", distance, graph.constant(self.length - 1), name="bias.index")
        bucket = graph.op("Gather", table, index, name="bias.bucket")
        values = graph.op("Gather", graph.parameter(name), bucket, name="bias.values")
        heads = graph.op("Transpose", values, name="bias.heads", perm=[2, 0, 1])
        bias = graph.op("Unsqueeze", heads, graph.constant([0]), name="bias")
        return graph.cast(bias, "float16") if graph.scheme.half else bias

    # -- what stands on top --------------------------------------------------------------------------------------

    def pool(self, x: str) -> str:
        """``sentence_embedding [batch, hidden]``: pooled, and normalised where the model does so."""
        graph = self.graph
        real = graph.cast("attention_mask", "float32")
        count = graph.op("ReduceSum", real, graph.constant([1]), name="pool.count", keepdims=1)
        match self.model.pooling:
            case "mean":
                mask = graph.op("Unsqueeze", real, graph.constant([2]), name="pool.mask")
                total = graph.op("ReduceSum", graph.op("Mul", x, mask, name="pool.masked"), graph.constant([1]),
                                 name="pool.sum", keepdims=0)  # fmt: skip
                least = graph.constant(1e-9, np.float32)
                y = graph.op("Div", total, graph.op("Max", count, least, name="pool.least"), name="pool.mean")
            case "cls":
                y = graph.op("Gather", x, graph.constant(0), name="pool.cls", axis=1)
            case "last":
                last = graph.op("Sub", graph.cast(count, "int64"), graph.constant(1), name="pool.last")
                y = graph.op("GatherND", x, last, name="pool.row", batch_dims=1)
            case other:
                raise Unsupported(f"ONNX: pooling {other!r}", hint="supported: mean, cls, last")
        if self.model.normalize:
            norm = graph.op("ReduceL2", y, graph.constant([-1]), name="normalize.norm", keepdims=1)
            norm = graph.op("Max", norm, graph.constant(1e-12, np.float32), name="normalize.least")
            y = graph.op("Div", y, norm, name="normalize")
        return y

    def label(self, x: str) -> str:
        """``logits [batch, length, labels]``: one linear layer on every token, whatever the architecture."""
        return self._linear(x, "classifier", "head")

    def classify(self, x: str) -> str:
        """``logits [batch, labels]`` by the head of the architecture, on the first token."""
        first = self.graph.op("Gather", x, self.graph.constant(0), name="first", axis=1)
        match self.model.architecture:
            case "bert":
                y = self.graph.op("Tanh", self._linear(first, "bert.pooler.dense", "head"), name="pooler.tanh")
                return self._linear(y, "classifier", "head")
            case "distilbert":
                y = self.graph.op("Relu", self._linear(first, "pre_classifier", "head"), name="pre_classifier.relu")
                return self._linear(y, "classifier", "head")
            case "electra":
                y = self.graph.op("Gelu", self._linear(first, "classifier.dense", "head"), domain=MICROSOFT)
            case _:
                y = self.graph.op("Tanh", self._linear(first, "classifier.dense", "head"), name="classifier.tanh")
        return self._linear(y, "classifier.out_proj", "head")


def _buckets(distance: np.ndarray, count: int, most: int = 128) -> np.ndarray:
    """T5's bidirectional buckets, as MPNet uses them: exact for near tokens, logarithmic for far ones, to ``most``."""
    half = count // 2
    near = half // 2
    size = np.abs(distance)
    far = near + (np.log(np.maximum(size, 1) / near) / np.log(most / near) * (half - near)).astype(np.int64)
    return np.where(distance > 0, half, 0) + np.where(size < near, size, np.minimum(far, half - 1))


def build_encoder(graph: Graph, model: ModelFolder, length: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Add the whole encoder to ``graph``; returns inputs and outputs.

    ``input_ids``, ``attention_mask`` ``int64 [batch, length]`` -> ``sentence_embedding [batch, hidden]`` for
    feature-extraction, ``logits [batch, labels]`` for text-classification, ``logits [batch, length, labels]`` for
    token-classification, float32.
    """
    encoder = _Encoder(graph, model, length)
    x = encoder.body()
    if model.task == "feature-extraction":
        name, size, y = "sentence_embedding", model.hidden_size, encoder.pool(x)
    else:
        every = model.task == "token-classification"
        name, size, y = "logits", len(model.labels), encoder.label(x) if every else encoder.classify(x)
    graph.rename(y, name)
    inputs = [TensorSpec(n, "int64", ("batch", "length")) for n in ("input_ids", "attention_mask")]
    places = ("batch", "length") if model.task == "token-classification" else ("batch",)
    return inputs, [TensorSpec(name, "float32", (*places, size))]
