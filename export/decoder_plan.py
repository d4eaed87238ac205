"""What a decoder computes, read from its config once: names, norms, positions, attention of each layer.

All decoders here are one idea: an embedding; in each layer attention and a feed-forward network, each behind a norm and
added to the residual stream; a last norm; a head. What differs between families is what a :class:`DecoderPlan` says:

* the norm: RMSNorm by ``w``, RMSNorm by ``1 + w`` (Gemma 3) or LayerNorm with a bias (GPT-2), and whether what is added
  is normalised once more before (Gemma 3);
* positions: rotary, with one table or one for each kind of layer, or a learned table that is added at the start;
* attention: apart or merged matrices, heads that are normalised first (Qwen3, Gemma 3), a window of tokens or all;
* the FFN: gated or plain, and its activation; a scaled embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..architectures import SLIDING_ATTENTION
from ..checkpoints import ARCHITECTURES, ModelFolder
from ..errors import Unsupported

__all__ = ["Activation", "DecoderNames", "DecoderPlan", "LayerPlan", "decoder_plan", "rotary_frequencies"]

Floats = npt.NDArray[np.float32]
Activation = Literal["silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class DecoderNames:
    """Module names: ``layer`` is the state dict path of the list of layers, the ones below are inside a layer.

    ``""`` for what a family does not have. ``qkv`` are three names, or one whose matrix holds queries, keys and values
    in this order.
    """

    layer: str
    last_norm: str
    attention_norm: str
    qkv: tuple[str, ...]
    attention_out: str
    ffn_norm: str
    up: str
    down: str
    gate: str = ""
    after_attention: str = ""
    after_ffn: str = ""
    query_norm: str = ""
    key_norm: str = ""
    positions: str = ""


_LLAMA = DecoderNames(
    layer="model.layers", last_norm="model.norm", attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.o_proj",
    ffn_norm="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
)  # fmt: skip
_GEMMA3 = DecoderNames(
    layer="model.layers", last_norm="model.norm", attention_norm="input_layernorm", qkv=_LLAMA.qkv,
    attention_out="self_attn.o_proj", ffn_norm="pre_feedforward_layernorm", gate="mlp.gate_proj", up="mlp.up_proj",
    down="mlp.down_proj", after_attention="post_attention_layernorm", after_ffn="post_feedforward_layernorm",
    query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
)  # fmt: skip
_GPT2 = DecoderNames(
    layer="transformer.h", last_norm="transformer.ln_f", attention_norm="ln_1", qkv=("attn.c_attn",),
    attention_out="attn.c_proj", ffn_norm="ln_2", up="mlp.c_fc", down="mlp.c_proj", positions="transformer.wpe.weight",
)  # fmt: skip

_NAMES: Mapping[str, DecoderNames] = {
    "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma3_text": _GEMMA3, "gpt2": _GPT2,
}  # fmt: skip


@dataclass(frozen=True)
class LayerPlan:
    """Attention of one layer: scores times ``scale``; a token sees itself and ``window - 1`` before it (``None``: all);
    ``rotary`` names its frequencies in the plan (``""``: none)."""

    scale: float
    window: int | None = None
    rotary: str = ""


@dataclass(frozen=True)
class DecoderPlan:
    """One decoder. ``rotary``: inverse frequencies ``[head_dim / 2]`` by name. ``embed_scale`` 1.0 leaves the embedding
    as it is. ``norm``: ``rms`` (times w), ``rms1`` (times 1 + w) or ``layer`` (with a bias)."""

    names: DecoderNames
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    norm: Literal["rms", "rms1", "layer"]
    activation: Activation
    embedding: str
    layers: tuple[LayerPlan, ...]
    rotary: Mapping[str, Floats] = field(default_factory=dict)
    embed_scale: float = 1.0


def decoder_plan(model: ModelFolder) -> DecoderPlan:
    """The plan of a decoder's folder; :class:`Unsupported` for an activation or rotary embedding of another kind."""
    config, row = model.config, ARCHITECTURES[model.architecture]
    heads = int(config[row.heads_key])
    size = int(config.get("head_dim") or model.hidden_size // heads)
    gpt2, gemma3 = model.architecture == "gpt2", model.architecture == "gemma3_text"
    key = "activation_function" if gpt2 else "hidden_activation" if gemma3 else "hidden_act"
    activation = str(config.get(key, "silu"))
    if activation not in _ACTIVATIONS:
        raise Unsupported(f"activation {activation!r} of a decoder", hint=f"supported: {', '.join(_ACTIVATIONS)}")
    epsilon = config["layer_norm_epsilon"] if gpt2 else config.get("rms_norm_eps", 1e-6)
    return DecoderPlan(
        names=_NAMES[model.architecture],
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=size,
        epsilon=float(epsilon),
        norm="layer" if gpt2 else "rms1" if gemma3 else "rms",
        activation=_ACTIVATIONS[activation],
        embedding=model.embeddings_path,
        layers=tuple(_layer(model, index, size) for index in range(model.layers)),
        rotary=_rotary(model, size),
        embed_scale=float(np.float32(model.hidden_size**0.5)) if gemma3 else 1.0,
    )


def _layer(model: ModelFolder, index: int, size: int) -> LayerPlan:
    config = model.config
    if model.architecture == "gpt2":
        scale = 1 / math.sqrt(size) if config["scale_attn_weights"] else 1.0
        return LayerPlan(scale / (index + 1) if config.get("scale_attn_by_inverse_layer_idx") else scale)
    if model.architecture == "gemma3_text":
        kind = config["layer_types"][index]
        window = int(config["sliding_window"]) if kind == SLIDING_ATTENTION else None
        return LayerPlan(1 / math.sqrt(config["query_pre_attn_scalar"]), window, kind)
    return LayerPlan(1 / math.sqrt(size), rotary="all")


def _rotary(model: ModelFolder, size: int) -> dict[str, Floats]:
    if model.architecture == "gpt2":
        return {}
    if model.architecture != "gemma3_text":
        return {"all": rotary_frequencies(model.config, size)}
    kinds = dict.fromkeys(model.config["layer_types"])
    return {
        kind: rotary_frequencies({"rope_parameters": model.config["rope_parameters"][kind]}, size) for kind in kinds
    }


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> Floats:
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
