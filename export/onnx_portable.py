"""A decoder's parts in standard ONNX operators only (opset 18), for runtimes without ``com.microsoft``.

Inputs, outputs and their names are those of the fused graph, with one difference in meaning: what comes out as
``present`` is the past with the new tokens behind it, ``total`` long, so the past that goes in is exactly as long as
what came out before. Scores, softmax and the mixing of values are float32, whatever the cache's type is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import Unsupported
from .decoder_plan import DecoderPlan, LayerPlan
from .onnx_fused import norm_scale
from .onnx_graph import Graph

__all__ = ["Portable", "PortableGraph"]

_HIDDEN = -1e30
"""Added to the score of a token that must not be seen: e to it is 0, and unlike infinity it makes no NaN."""


class PortableGraph(Graph):
    """A graph whose matrix products are standard ones; float weights only."""

    def _linear_float(self, x: str, names: Sequence[str], biases: Sequence[str], label: str) -> str:
        if names[0] not in self._spool:
            return super()._linear_float(x, names, biases, label)
        x = self.cast(x, "float16") if self.scheme.half else x
        turned = self.op("Transpose", names[0], name=f"{label}.transposed", perm=[1, 0])  # tied to the embedding
        y = self.op("MatMul", x, turned, name=f"{label}.matmul")
        dtype = "float16" if self.scheme.half else "float32"
        return self.op("Add", y, self.bias(biases, dtype), name=f"{label}.add") if biases else y


class Portable:
    """See :class:`edgestill.export.onnx_decoder.Dialect`. ``cache`` is ``float32`` or ``float16``."""

    present = "total"

    def __init__(self, graph: Graph, plan: DecoderPlan, length: int, cache: str) -> None:
        if plan.rotary and plan.head_dim % 2:
            raise Unsupported(f"ONNX: rotary heads of {plan.head_dim} values", hint="an even number is needed")
        self.cache = cache
        self._graph, self._plan, self._length = graph, plan, length
        self._tables: dict[str, tuple[str, str]] = {}
        self._masks: dict[int | None, str] = {}
        self._positions = self._queries = self._keys = self._real = ""

    def begin(self) -> None:
        """Places of new and of all tokens, and the rotary tables at the new places."""
        graph = self._graph
        first = self._size("past_key_values.0.key", 2, "past")
        count = self._size("input_ids", 1, "length")
        end = graph.op("Add", first, count, name="places.end")
        step = graph.constant(1)
        self._positions = graph.op("Range", first, end, step, name="places.new")
        self._queries = graph.op("Unsqueeze", self._positions, graph.constant([1]), name="places.queries")
        every = graph.op("Range", graph.constant(0), end, step, name="places.all")
        self._keys = graph.op("Unsqueeze", every, graph.constant([0]), name="places.keys")
        real = graph.op("Greater", "attention_mask", graph.constant(0), name="mask.real")
        self._real = graph.op("Unsqueeze", real, graph.constant([1, 2]), name="mask.rows")
        for name, inverse in self._plan.rotary.items():
            angles = np.arange(self._length, dtype=np.float32)[:, None] * inverse
            cosine, sine = (
                graph.op("Gather", graph.constant(table, np.float32), self._positions, name=f"rotary.{name}.{which}")
                for which, table in (("cos", np.cos(angles)), ("sin", np.sin(angles)))
            )
            self._tables[name] = (cosine, sine)

    def positions(self) -> str:
        """Counted from the length of the past."""
        return self._graph.op("Unsqueeze", self._positions, self._graph.constant([0]), name="ids.positions")

    def norm(self, x: str, delta: str, weight: str) -> tuple[str, str]:
        """The sum, then its norm in single steps."""
        graph, plan = self._graph, self._plan
        total = graph.op("Add", x, delta, name=f"{weight}.sum") if delta else x
        if plan.norm == "layer":
            scale, bias = graph.parameter(f"{weight}.weight"), graph.parameter(f"{weight}.bias")
            y = graph.op("LayerNormalization", total, scale, bias, name=weight, axis=-1, epsilon=plan.epsilon)
            return y, total
        return self._rms(total, norm_scale(graph, plan, weight), weight), total

    def _rms(self, x: str, scale: str, name: str) -> str:
        graph = self._graph
        square = graph.op("Mul", x, x, name=f"{name}.square")
        mean = graph.op("ReduceMean", square, graph.constant([-1]), name=f"{name}.mean", keepdims=1)
        shifted = graph.op("Add", mean, graph.constant(self._plan.epsilon, np.float32), name=f"{name}.shifted")
        root = graph.op("Sqrt", shifted, name=f"{name}.root")
        return graph.op("Mul", graph.op("Div", x, root, name=f"{name}.unit"), scale, name=name)

    def attention(self, packed: str, index: int, layer: LayerPlan) -> str:
        """Queries in groups ``[batch, kv_heads, heads / kv_heads, length, head_dim]`` meet keys that broadcast."""
        graph, plan = self._graph, self._plan
        inside = f"{plan.names.layer}.{index}"
        base = f"{inside}.{plan.names.attention_out.rpartition('.')[0]}"
        if graph.scheme.half:
            packed = graph.cast(packed, "float32")
        sizes = graph.constant([n * plan.head_dim for n in (plan.heads, plan.kv_heads, plan.kv_heads)])
        parts = graph.ops("Split", [packed, sizes], 3, name=f"{base}.split", axis=-1)
        counts = (plan.heads, plan.kv_heads, plan.kv_heads)
        norms = (plan.names.query_norm, plan.names.key_norm, "")
        rotaries = (layer.rotary, layer.rotary, "")
        query, key, value = (
            self._heads(part, count, f"{inside}.{norm}" if norm else "", f"{base}.{what}", rotary)
            for part, count, norm, what, rotary in zip(parts, counts, norms, "qkv", rotaries, strict=True)
        )
        key = self._extended(key, f"{index}.key")
        value = self._extended(value, f"{index}.value")
        groups = plan.heads // plan.kv_heads
        query = graph.op("Mul", query, graph.constant(layer.scale, np.float32), name=f"{base}.scaled")
        query = graph.op("Reshape", query, graph.constant([0, plan.kv_heads, groups, -1, plan.head_dim]),
                         name=f"{base}.groups")  # fmt: skip
        key = graph.op("Unsqueeze", graph.op("Transpose", key, perm=[0, 1, 3, 2], name=f"{base}.keys"),
                       graph.constant([2]), name=f"{base}.shared_keys")  # fmt: skip
        value = graph.op("Unsqueeze", value, graph.constant([2]), name=f"{base}.shared_values")
        scores = graph.op("Add", graph.op("MatMul", query, key, name=f"{base}.scores"), self._mask(layer.window),
                          name=f"{base}.masked")  # fmt: skip
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1, name=f"{base}.shares"), value,
                         name=f"{base}.mixed")  # fmt: skip
        flat = graph.op("Reshape", mixed, graph.constant([0, plan.heads, -1, plan.head_dim]), name=f"{base}.heads")
        turned = graph.op("Transpose", flat, perm=[0, 2, 1, 3], name=f"{base}.tokens")
        merged = graph.op("Reshape", turned, graph.constant([0, 0, plan.heads * plan.head_dim]),
                          name=f"{base}.attention")  # fmt: skip
        return graph.cast(merged, "float16") if graph.scheme.half else merged

    def _heads(self, x: str, count: int, norm: str, name: str, rotary: str) -> str:
        """``[batch, length, count * head_dim]`` as ``[batch, count, length, head_dim]``, normalised and rotated."""
        graph, size = self._graph, self._plan.head_dim
        x = graph.op("Reshape", x, graph.constant([0, 0, count, size]), name=f"{name}.split")
        if norm and f"{norm}.weight" in graph.weights:
            x = self._rms(x, norm_scale(graph, self._plan, norm), norm)
        x = graph.op("Transpose", x, perm=[0, 2, 1, 3], name=f"{name}.heads")
        if not rotary:
            return x
        cosine, sine = self._tables[rotary]
        halves = graph.constant([size // 2, size // 2])
        low, high = graph.ops("Split", [x, halves], 2, name=f"{name}.halves", axis=-1)
        left = graph.op("Sub", graph.op("Mul", low, cosine), graph.op("Mul", high, sine), name=f"{name}.left")
        right = graph.op("Add", graph.op("Mul", high, cosine), graph.op("Mul", low, sine), name=f"{name}.right")
        return graph.op("Concat", left, right, axis=-1, name=f"{name}.rotated")

    def _extended(self, x: str, key: str) -> str:
        """The past with ``x`` behind it, float32; in the cache's type it is an output."""
        graph = self._graph
        new = graph.cast(x, self.cache) if self.cache != "float32" else x
        graph.ops("Concat", [f"past_key_values.{key}", new], [f"present.{key}"], name=f"present.{key}", axis=2)
        return graph.cast(f"present.{key}", "float32") if self.cache != "float32" else f"present.{key}"

    def _mask(self, window: int | None) -> str:
        """0 for what a token sees, :data:`_HIDDEN` for the rest: ``[batch, 1, 1, length, total]``."""
        if window not in self._masks:
            graph = self._graph
            name = "mask.all" if window is None else f"mask.window{window}"
            seen = graph.op("LessOrEqual", self._keys, self._queries, name=f"{name}.past")
            if window is not None:
                oldest = graph.op("Sub", self._queries, graph.constant(window), name=f"{name}.edge")
                near = graph.op("Greater", self._keys, oldest, name=f"{name}.near")
                seen = graph.op("And", seen, near, name=f"{name}.both")
            seen = graph.op("And", seen, self._real, name=f"{name}.seen")
            bias = graph.op("Where", seen, graph.constant(0.0, np.float32), graph.constant(_HIDDEN, np.float32),
                            name=f"{name}.bias")  # fmt: skip
            self._masks[window] = graph.op("Unsqueeze", bias, graph.constant([1]), name=name)
        return self._masks[window]

    def activation(self, x: str, name: str) -> str:
        """In single steps, in float32."""
        graph, kind = self._graph, self._plan.activation
        wide = graph.cast(x, "float32") if graph.scheme.half else x
        if kind == "silu":
            y = graph.op("Mul", wide, graph.op("Sigmoid", wide, name=f"{name}.sigmoid"), name=f"{name}.silu")
            return graph.cast(y, "float16") if graph.scheme.half else y

        def number(value: float) -> str:
            return graph.constant(value, np.float32)

        if kind == "gelu":
            inner = graph.op("Erf", graph.op("Mul", wide, number(0.5**0.5), name=f"{name}.narrow"), name=f"{name}.erf")
        else:
            cube = graph.op("Mul", graph.op("Mul", wide, wide), wide, name=f"{name}.cube")
            bent = graph.op("Add", wide, graph.op("Mul", cube, number(0.044715)), name=f"{name}.bent")
            inner = graph.op("Tanh", graph.op("Mul", bent, number((2 / np.pi) ** 0.5)), name=f"{name}.tanh")
        gate = graph.op("Mul", graph.op("Add", inner, number(1.0)), number(0.5), name=f"{name}.gate")
        y = graph.op("Mul", wide, gate, name=f"{name}.gelu")
        return graph.cast(y, "float16") if graph.scheme.half else y

    def _size(self, value: str, axis: int, name: str) -> str:
        shape = self._graph.op("Shape", value, name=f"{name}.shape")
        return self._graph.op("Gather", shape, self._graph.constant(axis), name=f"{name}.size")
