"""The graph of a decoder, written node by node from its plan (``decoder_plan.py``).

This file says in which order things happen; how a norm, an activation or attention is written stands in a dialect
(``onnx_fused.py``, ``onnx_portable.py``). The residual stream and the norms stay float32 in every variant: SmolLM2's
reaches 22,552, whose square is beyond half precision.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..artifact import TensorSpec
from ..checkpoints import ModelFolder
from .decoder_plan import DecoderPlan, LayerPlan, decoder_plan
from .onnx_fused import Fused
from .onnx_graph import Graph
from .onnx_portable import Portable, PortableGraph

__all__ = ["Dialect", "build_decoder"]


class Dialect(Protocol):
    """How the parts of a decoder are written. Values are names of float32 tensors unless said otherwise."""

    cache: str
    """Type of the key/value cache."""
    present: str
    """Name of the cache's length after the call: ``total`` if it is exactly what the attention mask counts."""

    def begin(self) -> None:
        """Write what all layers share."""

    def positions(self) -> str:
        """Place of each new token, int64 ``[1, length]``."""

    def norm(self, x: str, delta: str, weight: str) -> tuple[str, str]:
        """``(norm(x + delta), x + delta)`` with the parameters of the module ``weight``; ``""``: no delta."""

    def attention(self, packed: str, index: int, layer: LayerPlan) -> str:
        """Mix ``packed`` ``[batch, length, (heads + 2 kv_heads) * head_dim]`` of layer ``index`` (in the type that
        :meth:`Graph.linear` gives for ``half``) with its cache: ``[batch, length, heads * head_dim]``."""

    def activation(self, x: str, name: str) -> str:
        """The FFN's activation."""


def build_decoder(
    graph: Graph, model: ModelFolder, length: int, *, kv_cache: str | None = None
) -> tuple[list[TensorSpec], list[TensorSpec], int]:
    """Add the whole decoder to ``graph``; returns inputs, outputs and KV-cache bytes a token.

    ``input_ids [batch, length]``, ``attention_mask [batch, total]`` (1 for each past and present real token; padding
    on the right, without a past only), ``past_key_values.{i}.key/value [batch, kv_heads, past, head_dim]`` ->
    ``logits [batch, length, vocab]``, ``present.{i}.key/value``. ``length`` tokens at most in all. ``kv_cache``
    ``"fp16"`` keeps keys and values in half precision whatever the weights are. A
    :class:`~edgestill.export.onnx_portable.PortableGraph` gets standard operators only.

    Raises :class:`~edgestill.errors.Unsupported` for a part that has no graph.
    """
    plan = decoder_plan(model)
    dialect = _dialect(graph, plan, length, kv_cache)
    names = plan.names
    dialect.begin()
    x = graph.embed("input_ids", plan.embedding)
    if plan.embed_scale != 1.0:
        x = graph.op("Mul", x, graph.constant(plan.embed_scale, np.float32), name="embed.scale")
    if names.positions:
        places = graph.op("Gather", graph.parameter(names.positions), dialect.positions(), name="ids.table")
        x = graph.op("Add", x, places, name="embed.positions")
    delta = ""
    for index, layer in enumerate(plan.layers):
        base = f"{names.layer}.{index}"
        y, x = dialect.norm(x, delta, f"{base}.{names.attention_norm}")
        delta = _attention(graph, dialect, plan, y, index, layer)
        if names.after_attention:
            delta, _ = dialect.norm(delta, "", f"{base}.{names.after_attention}")
        y, x = dialect.norm(x, delta, f"{base}.{names.ffn_norm}")
        delta = _ffn(graph, dialect, plan, y, base)
        if names.after_ffn:
            delta, _ = dialect.norm(delta, "", f"{base}.{names.after_ffn}")
    y, x = dialect.norm(x, delta, names.last_norm)
    head = "lm_head.weight" if "lm_head.weight" in graph.weights else plan.embedding
    graph.rename(graph.linear(y, [head], role="head"), "logits")
    return _interface(model, plan, dialect)


def _dialect(graph: Graph, plan: DecoderPlan, length: int, kv_cache: str | None) -> Dialect:
    cache = "float16" if graph.scheme.half or kv_cache == "fp16" else "float32"
    return (Portable if isinstance(graph, PortableGraph) else Fused)(graph, plan, length, cache)


def _interface(
    model: ModelFolder, plan: DecoderPlan, dialect: Dialect
) -> tuple[list[TensorSpec], list[TensorSpec], int]:
    cache, kv = dialect.cache, ("batch", plan.kv_heads)
    keys = [f"{layer}.{which}" for layer in range(model.layers) for which in ("key", "value")]
    inputs = [TensorSpec("input_ids", "int64", ("batch", "length")),
              TensorSpec("attention_mask", "int64", ("batch", "total"))]  # fmt: skip
    inputs += [TensorSpec(f"past_key_values.{key}", cache, (*kv, "past", plan.head_dim)) for key in keys]
    outputs = [TensorSpec("logits", "float32", ("batch", "length", model.vocab_size))]
    outputs += [TensorSpec(f"present.{key}", cache, (*kv, dialect.present, plan.head_dim)) for key in keys]
    return inputs, outputs, 2 * model.layers * plan.kv_heads * plan.head_dim * np.dtype(cache).itemsize


def _biases(graph: Graph, modules: list[str]) -> list[str]:
    names = [f"{module}.bias" for module in modules]
    return names if names[0] in graph.weights else []


def _attention(graph: Graph, dialect: Dialect, plan: DecoderPlan, x: str, index: int, layer: LayerPlan) -> str:
    base = f"{plan.names.layer}.{index}"
    parts = [f"{base}.{part}" for part in plan.names.qkv]
    matrices = [f"{part}.weight" for part in parts]
    packed = graph.linear(x, matrices, _biases(graph, parts), role="attention", half=True)
    mixed = dialect.attention(packed, index, layer)
    out = f"{base}.{plan.names.attention_out}"
    return graph.linear(mixed, [f"{out}.weight"], _biases(graph, [out]), role="attention")


def _ffn(graph: Graph, dialect: Dialect, plan: DecoderPlan, x: str, base: str) -> str:
    names = plan.names
    up, down = f"{base}.{names.up}", f"{base}.{names.down}"
    if names.gate:
        gate = f"{base}.{names.gate}"
        opened = graph.linear(x, [f"{gate}.weight"], _biases(graph, [gate]), role="mlp", half=True)
        wide = graph.linear(x, [f"{up}.weight"], _biases(graph, [up]), role="mlp", half=True)
        inner = f"{base}.{names.gate.rpartition('.')[0]}"
        wide = graph.op("Mul", dialect.activation(opened, inner), wide, name=f"{inner}.product")
    else:
        wide = graph.linear(x, [f"{up}.weight"], _biases(graph, [up]), role="mlp", half=True)
        wide = dialect.activation(wide, f"{base}.{names.up.rpartition('.')[0]}")
    return graph.linear(wide, [f"{down}.weight"], _biases(graph, [down]), role="down")
