"""A decoder's parts in ONNX Runtime's own operators, the fastest there.

GroupQueryAttention keeps the KV cache, rotates queries and keys inside, and takes right-padded batches through the
lengths that it gets from the attention mask. Its ``local_window_size`` counts the token itself, as Transformers'
``sliding_window`` does (both were compared with a double loop, past included).
"""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from .decoder_plan import DecoderPlan, LayerPlan
from .onnx_graph import MICROSOFT, Graph

__all__ = ["Fused", "norm_scale"]


class Fused:
    """See :class:`edgestill.export.onnx_decoder.Dialect`. ``cache`` is ``float32`` or ``float16``."""

    present = "present"  # the runtime extends a buffer that may be longer

    def __init__(self, graph: Graph, plan: DecoderPlan, length: int, cache: str) -> None:
        step = 16 if plan.rotary else 8
        if plan.head_dim % step:
            raise Unsupported(
                f"ONNX: heads of {plan.head_dim} values", hint=f"GroupQueryAttention wants multiples of {step}"
            )
        self.cache = cache
        self._graph, self._plan, self._length = graph, plan, length
        self._tables: dict[str, tuple[str, str]] = {}
        self._places: tuple[str, str] = ("", "")
        self._total = ""

    def begin(self) -> None:
        """Lengths of the sequences, and the rotary tables."""
        graph = self._graph
        for name, inverse in self._plan.rotary.items():
            angles = np.arange(self._length, dtype=np.float32)[:, None] * inverse
            self._tables[name] = (
                graph.constant(np.cos(angles), self.cache), graph.constant(np.sin(angles), self.cache)
            )  # fmt: skip
        real = graph.op("ReduceSum", "attention_mask", graph.constant([1]), name="mask.real", keepdims=0)
        last = graph.op("Max", graph.op("Sub", real, graph.constant(1)), graph.constant(0), name="mask.last")
        lengths = graph.cast(last, "int32")
        self._total = graph.op("Gather", graph.op("Shape", "attention_mask"), graph.constant(1), name="mask.total")
        self._places = (lengths, graph.cast(self._total, "int32"))

    def positions(self) -> str:
        """The last ``length`` of ``total`` places."""
        graph = self._graph
        count = graph.op("Gather", graph.op("Shape", "input_ids"), graph.constant(1), name="ids.length")
        first = graph.op("Sub", self._total, count, name="ids.first")
        places = graph.op("Range", first, self._total, graph.constant(1), name="ids.places")
        return graph.op("Unsqueeze", places, graph.constant([0]), name="ids.positions")

    def norm(self, x: str, delta: str, weight: str) -> tuple[str, str]:
        """One node for the sum and the norm."""
        graph, epsilon = self._graph, self._plan.epsilon
        if self._plan.norm == "layer":
            scale, bias = graph.parameter(f"{weight}.weight"), graph.parameter(f"{weight}.bias")
            if not delta:
                y = graph.op("LayerNormalization", x, scale, bias, name=weight, axis=-1, epsilon=epsilon, stash_type=1)
                return y, x
            y, _, _, total = graph.ops(
                "SkipLayerNormalization", [x, delta, scale, bias], [weight, "", "", f"{weight}.sum"], name=weight,
                domain=MICROSOFT, epsilon=epsilon,
            )  # fmt: skip
            return y, total
        scale = norm_scale(graph, self._plan, weight)
        if not delta:
            return self._rms(x, scale, weight), x
        y, _, _, total = graph.ops(
            "SkipSimplifiedLayerNormalization", [x, delta, scale], [weight, "", "", f"{weight}.sum"], name=weight,
            domain=MICROSOFT, epsilon=epsilon,
        )  # fmt: skip
        return y, total

    def _rms(self, x: str, scale: str, name: str) -> str:
        return self._graph.op("SimplifiedLayerNormalization", x, scale, name=name, axis=-1,
                              epsilon=self._plan.epsilon, stash_type=1)  # fmt: skip

    def attention(self, packed: str, index: int, layer: LayerPlan) -> str:
        """GroupQueryAttention, in the type of the cache."""
        graph, plan = self._graph, self._plan
        base = f"{plan.names.layer}.{index}.{plan.names.attention_out.rpartition('.')[0]}"
        narrow = self.cache == "float16" and not graph.scheme.half
        query, key, value = packed, "", ""
        if plan.names.query_norm and f"{plan.names.layer}.{index}.{plan.names.query_norm}.weight" in graph.weights:
            sizes = graph.constant([n * plan.head_dim for n in (plan.heads, plan.kv_heads, plan.kv_heads)])
            query, key, value = graph.ops("Split", [packed, sizes], 3, name=f"{base}.split", axis=-1)
            query = self._head_norm(query, f"{plan.names.layer}.{index}.{plan.names.query_norm}", plan.heads)
            key = self._head_norm(key, f"{plan.names.layer}.{index}.{plan.names.key_norm}", plan.kv_heads)
        if narrow:
            query, key, value = (graph.cast(part, "float16") if part else "" for part in (query, key, value))
        tables = self._tables.get(layer.rotary, ())
        window = {} if layer.window is None else {"local_window_size": layer.window}
        mixed, _, _ = graph.ops(
            "GroupQueryAttention",
            [query, key, value, f"past_key_values.{index}.key", f"past_key_values.{index}.value", *self._places,
             *tables],
            [f"{base}.attention", f"present.{index}.key", f"present.{index}.value"],
            name=f"{base}.attention", domain=MICROSOFT, num_heads=plan.heads, kv_num_heads=plan.kv_heads,
            do_rotary=int(bool(tables)), scale=layer.scale, **window,
        )  # fmt: skip
        return graph.cast(mixed, "float32") if narrow else mixed

    def _head_norm(self, x: str, name: str, heads: int) -> str:
        graph, size = self._graph, self._plan.head_dim
        half = graph.scheme.half
        wide = graph.cast(x, "float32") if half else x
        split = graph.op("Reshape", wide, graph.constant([0, 0, heads, size]), name=f"{name}.split")
        y = self._rms(split, norm_scale(graph, self._plan, name), name)
        merged = graph.op("Reshape", y, graph.constant([0, 0, heads * size]), name=f"{name}.merge")
        return graph.cast(merged, "float16") if half else merged

    def activation(self, x: str, name: str) -> str:
        """One node each."""
        match self._plan.activation:
            case "silu":  # x * sigmoid(1.0 * x)
                return self._graph.op("QuickGelu", x, name=f"{name}.silu", domain=MICROSOFT, alpha=1.0)
            case "gelu_tanh":
                return self._graph.op("FastGelu", x, name=f"{name}.gelu", domain=MICROSOFT)
            case "gelu":
                return self._graph.op("Gelu", x, name=f"{name}.gelu", domain=MICROSOFT)


def norm_scale(graph: Graph, plan: DecoderPlan, module: str) -> str:
    """The scale of an RMSNorm. Where it is 1 + w, w is what is stored (the same bytes as in the model) and the sum is
    a node, which every runtime folds when it loads the graph."""
    weight = graph.parameter(f"{module}.weight")
    if plan.norm != "rms1":
        return weight
    return graph.op("Add", weight, graph.constant(1.0, np.float32), name=f"{module}.scale")
