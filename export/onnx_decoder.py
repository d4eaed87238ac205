"""The graph of a Llama-like decoder (llama, qwen2, qwen3), written node by node around ONNX Runtime's attention.

GroupQueryAttention keeps the KV cache, rotates queries and keys inside, and takes right-padded batches through the
lengths that it gets from the attention mask. Residual stream and norms stay float32 in every variant: SmolLM2's reaches
22,552, whose square is beyond half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import TensorSpec
from ..checkpoints import ModelFolder
from ..errors import Unsupported
from .onnx_graph import MICROSOFT, Graph

__all__ = ["build_decoder", "rotary_frequencies"]


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Inverse frequencies ``[head_dim / 2]`` of rotary embedding, plain, ``linear`` or ``llama3``.

    As ``transformers.modeling_rope_utils`` computes them, for both spellings of the config (``rope_parameters`` of
    transformers 5; ``rope_theta`` with ``rope_scaling`` before).
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise Unsupported("ONNX: rotary embedding of a part of each head is not supported", hint="export GGUF instead")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    match kind:
        case "default":
            return inverse
        case "linear":
            return inverse / np.float32(rope["factor"])
        case "llama3":
            factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            length = 2 * math.pi / inverse
            smooth = np.clip((old / length - low) / (high - low), 0, 1)
            return np.asarray((1 - smooth) * inverse / factor + smooth * inverse, np.float32)
        case _:
            raise Unsupported(f"ONNX: rotary embedding of type {kind!r} is not supported", hint="export GGUF instead")


class _Shape:
    """The numbers of a config that the graph needs."""

    def __init__(self, model: ModelFolder) -> None:
        config = model.config
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or model.hidden_size // self.heads)
        self.epsilon = float(config.get("rms_norm_eps", 1e-6))
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise Unsupported(f"ONNX: activation {config['hidden_act']!r} of a decoder", hint="supported: silu")
        if self.head_dim % 16:
            raise Unsupported(
                f"ONNX: heads of {self.head_dim} values", hint="GroupQueryAttention wants multiples of 16"
            )
        if config.get("use_sliding_window"):
            raise Unsupported("ONNX: sliding-window attention is not supported", hint="export GGUF instead")


def build_decoder(graph: Graph, model: ModelFolder, length: int) -> tuple[list[TensorSpec], list[TensorSpec], int]:
    """Add the whole decoder to ``graph``; returns inputs, outputs and KV-cache bytes a token.

    ``input_ids [batch, length]``, ``attention_mask [batch, total]`` (1 for each past and present real token; padding
    on the right, without a past only), ``past_key_values.{i}.key/value [batch, kv_heads, past, head_dim]`` ->
    ``logits [batch, length, vocab]``, ``present.{i}.key/value``. ``length`` tokens at most in all.
    """
    shape = _Shape(model)
    cache = "float16" if graph.scheme.half else "float32"
    angles = np.arange(length, dtype=np.float32)[:, None] * rotary_frequencies(model.config, shape.head_dim)
    rotary = (graph.constant(np.cos(angles), cache), graph.constant(np.sin(angles), cache))
    real = graph.op("ReduceSum", "attention_mask", graph.constant([1]), name="mask.real", keepdims=0)
    last = graph.op("Max", graph.op("Sub", real, graph.constant(1)), graph.constant(0), name="mask.last")
    lengths = graph.cast(last, "int32")
    total = graph.op("Gather", graph.op("Shape", "attention_mask"), graph.constant(1), name="mask.total")
    places = (lengths, graph.cast(total, "int32"))

    x = graph.embed("input_ids", "model.embed_tokens.weight")
    delta = ""
    for layer in range(model.layers):
        base = f"model.layers.{layer}"
        y, x = _norm(graph, x, delta, f"{base}.input_layernorm.weight", shape.epsilon)
        delta = _attention(graph, y, layer, shape, rotary, places)
        y, x = _norm(graph, x, delta, f"{base}.post_attention_layernorm.weight", shape.epsilon)
        delta = _mlp(graph, y, f"{base}.mlp")
    y, x = _norm(graph, x, delta, "model.norm.weight", shape.epsilon)
    head = "lm_head.weight" if "lm_head.weight" in graph.weights else "model.embed_tokens.weight"
    graph.rename(graph.linear(y, [head], role="head"), "logits")

    kv = ("batch", shape.kv_heads)
    keys = [f"{layer}.{which}" for layer in range(model.layers) for which in ("key", "value")]
    inputs = [TensorSpec("input_ids", "int64", ("batch", "length")),
              TensorSpec("attention_mask", "int64", ("batch", "total"))]  # fmt: skip
    inputs += [TensorSpec(f"past_key_values.{key}", cache, (*kv, "past", shape.head_dim)) for key in keys]
    outputs = [TensorSpec("logits", "float32", ("batch", "length", model.vocab_size))]
    outputs += [TensorSpec(f"present.{key}", cache, (*kv, "present", shape.head_dim)) for key in keys]
    bytes_per_token = 2 * model.layers * shape.kv_heads * shape.head_dim * np.dtype(cache).itemsize
    return inputs, outputs, bytes_per_token


def _norm(graph: Graph, x: str, delta: str, weight: str, epsilon: float) -> tuple[str, str]:
    """``(norm(x + delta), x + delta)``; without a delta, ``(norm(x), x)``."""
    name = weight.removesuffix(".weight")
    scale = graph.parameter(weight)
    if not delta:
        y = graph.op("SimplifiedLayerNormalization", x, scale, name=name, axis=-1, epsilon=epsilon, stash_type=1)
        return y, x
    y, _, _, total = graph.ops(
        "SkipSimplifiedLayerNormalization", [x, delta, scale], [name, "", "", f"{name}.sum"], name=name,
        domain=MICROSOFT, epsilon=epsilon,
    )  # fmt: skip
    return y, total


def _attention(
    graph: Graph, x: str, layer: int, shape: _Shape, rotary: tuple[str, str], places: tuple[str, str]
) -> str:
    base = f"model.layers.{layer}.self_attn"
    parts = [f"{base}.{part}_proj" for part in "qkv"]
    biases = [f"{part}.bias" for part in parts] if f"{parts[0]}.bias" in graph.weights else []
    packed = graph.linear(x, [f"{part}.weight" for part in parts], biases, role="attention", half=True)
    query, key, value = packed, "", ""
    if f"{base}.q_norm.weight" in graph.weights:  # Qwen3 normalises each head before it is rotated
        sizes = graph.constant([n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)])
        query, key, value = graph.ops("Split", [packed, sizes], 3, name=f"{base}.split", axis=-1)
        query = _head_norm(graph, query, f"{base}.q_norm.weight", shape.heads, shape)
        key = _head_norm(graph, key, f"{base}.k_norm.weight", shape.kv_heads, shape)
    mixed, _, _ = graph.ops(
        "GroupQueryAttention",
        [query, key, value, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", *places, *rotary],
        [f"{base}.attention", f"present.{layer}.key", f"present.{layer}.value"],
        name=f"{base}.attention", domain=MICROSOFT, num_heads=shape.heads, kv_num_heads=shape.kv_heads, do_rotary=1,
        scale=1 / math.sqrt(shape.head_dim),
    )  # fmt: skip
    out = [f"{base}.o_proj.bias"] if f"{base}.o_proj.bias" in graph.weights else []
    return graph.linear(mixed, [f"{base}.o_proj.weight"], out, role="attention")


def _head_norm(graph: Graph, x: str, weight: str, heads: int, shape: _Shape) -> str:
    name = weight.removesuffix(".weight")
    half = graph.scheme.half
    wide = graph.cast(x, "float32") if half else x
    split = graph.op("Reshape", wide, graph.constant([0, 0, heads, shape.head_dim]), name=f"{name}.split")
    y = graph.op("SimplifiedLayerNormalization", split, graph.parameter(weight), name=name, axis=-1,
                 epsilon=shape.epsilon, stash_type=1)  # fmt: skip
    merged = graph.op("Reshape", y, graph.constant([0, 0, heads * shape.head_dim]), name=f"{name}.merge")
    return graph.cast(merged, "float16") if half else merged


def _mlp(graph: Graph, x: str, base: str) -> str:
    def linear(value: str, part: str, half: bool) -> str:
        biases = [f"{base}.{part}.bias"] if f"{base}.{part}.bias" in graph.weights else []
        role = "down" if part == "down_proj" else "mlp"
        return graph.linear(value, [f"{base}.{part}.weight"], biases, role=role, half=half)  # type: ignore[arg-type]

    gate = linear(x, "gate_proj", True)
    up = linear(x, "up_proj", True)
    act = graph.op("QuickGelu", gate, name=f"{base}.silu", domain=MICROSOFT, alpha=1.0)  # x * sigmoid(1.0 * x)
    return linear(graph.op("Mul", act, up, name=f"{base}.product"), "down_proj", False)
