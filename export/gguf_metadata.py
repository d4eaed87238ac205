"""The keys of a GGUF file that describe the model: what llama.cpp, Ollama and LM Studio read before the weights.

Names and types: ``docs/gguf.md`` of ggml and ``llama-arch.cpp`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..architectures import ARCHITECTURES, SLIDING_ATTENTION
from ..gguf_origin import origin_to_gguf
from ..model_origin import size_label
from .gguf_layout import GGUF_ARCHITECTURES, rope_parameters

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["Metadata", "importance_metadata", "kv_cache_bytes_per_token", "model_metadata"]

Metadata = dict[str, Any]
"""Key -> str, bool, int (stored as uint32; a numpy int32 as that), float (float32), or a list of one of them (int lists
as int32)."""

_POOLING = {"mean": 1, "cls": 2, "last": 3}
_RANK_POOLING = 4
_QUANTISATION_VERSION = 2  # GGML_QNT_VERSION: how the blocks of quants are laid out


def model_metadata(model: ModelFolder, length: int, file_type: int) -> Metadata:
    """All keys but the tokenizer's. ``length`` is the context in tokens, ``file_type`` an ``enum llama_ftype``.

    Nothing in it depends on where the folder lies.
    """
    arch = GGUF_ARCHITECTURES[model.architecture]
    size = size_label(model.parameters)
    found: Metadata = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": model.named.name,
        "general.size_label": size,
        "general.quantization_version": _QUANTISATION_VERSION,
        "general.file_type": file_type,
    }
    if model.license:
        found["general.license"] = model.license.lower()
    found |= origin_to_gguf(model.origin, [model.task])
    specific = _decoder(model, length) if model.task == "text-generation" else _encoder(model)
    return found | {f"{arch}.{key}": value for key, value in specific}


def _decoder(model: ModelFolder, length: int) -> Iterator[tuple[str, Any]]:
    config = model.config
    if model.architecture == "gpt2":
        yield from _gpt2(model)
        return
    heads = config["num_attention_heads"]
    yield "block_count", model.layers
    yield "context_length", length
    yield "embedding_length", model.hidden_size
    yield "feed_forward_length", config["intermediate_size"]
    yield "attention.head_count", heads
    yield "attention.head_count_kv", config.get("num_key_value_heads") or heads
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    yield "vocab_size", model.vocab_size
    yield "rope.dimension_count", _head_size(model)
    if config.get("head_dim"):
        yield "attention.key_length", config["head_dim"]
        yield "attention.value_length", config["head_dim"]
    rope = rope_parameters(model)
    yield "rope.freq_base", float(rope["rope_theta"])
    if model.architecture == "gemma3_text":
        yield from _sliding(config)
    if rope["rope_type"] in ("linear", "yarn"):
        yield "rope.scaling.type", rope["rope_type"]
        yield "rope.scaling.factor", float(rope["factor"])
    if rope["rope_type"] == "yarn":
        yield "rope.scaling.original_context_length", rope["original_max_position_embeddings"]
        for ours, theirs in (
            ("attn_factor", "attention_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
        ):
            if rope.get(theirs) is not None:
                yield f"rope.scaling.yarn_{ours}", float(rope[theirs])


def _sliding(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Gemma 3's windows. Every sixth layer without one is what llama.cpp takes for granted; else each is named."""
    kinds = [kind == SLIDING_ATTENTION for kind in config["layer_types"]]
    if not any(kinds):
        return
    yield "attention.sliding_window", config["sliding_window"]
    yield "rope.freq_base_swa", float(config["rope_parameters"][SLIDING_ATTENTION]["rope_theta"])
    if kinds != [bool((index + 1) % 6) for index in range(len(kinds))]:
        yield "attention.sliding_window_pattern", kinds


def _gpt2(model: ModelFolder) -> Iterator[tuple[str, Any]]:
    config = model.config
    yield "block_count", model.layers
    # The length of the position table, whatever the artifact's limit is: llama.cpp wants them equal.
    yield "context_length", config["n_positions"]
    yield "embedding_length", model.hidden_size
    yield "feed_forward_length", config["n_inner"]
    yield "attention.head_count", config["n_head"]
    yield "attention.layer_norm_epsilon", float(config["layer_norm_epsilon"])


def _encoder(model: ModelFolder) -> Iterator[tuple[str, Any]]:
    config, row = model.config, ARCHITECTURES[model.architecture]
    offset = config["pad_token_id"] + 1 if model.architecture in ("roberta", "xlm-roberta") else 0
    yield "block_count", model.layers
    # The length of the position table, whatever the artifact's limit is: llama.cpp wants them equal.
    yield "context_length", config["max_position_embeddings"] - offset
    yield "embedding_length", model.hidden_size
    yield "feed_forward_length", config[row.ffn_key]
    yield "attention.head_count", config[row.heads_key]
    yield "attention.layer_norm_epsilon", float(config.get("layer_norm_eps", 1e-12))
    yield "attention.causal", False
    if model.task == "text-classification":
        yield "pooling_type", _RANK_POOLING
        yield "classifier.output_labels", list(model.labels)
    elif model.pooling is not None:
        yield "pooling_type", _POOLING[model.pooling]


def importance_metadata(sha256: str, entries: int, texts: int) -> Metadata:
    """The keys by which ``llama-quantize`` says that it was given an importance matrix."""
    return {
        "quantize.imatrix.file": f"{sha256}.npz",
        "quantize.imatrix.dataset": f"{texts} calibration texts",
        "quantize.imatrix.entries_count": entries,
        "quantize.imatrix.chunks_count": texts,
    }


def kv_cache_bytes_per_token(model: ModelFolder) -> int | None:
    """Bytes that one token takes in llama.cpp's default (float16) KV cache; ``None`` for an encoder."""
    if model.task != "text-generation":
        return None
    heads = model.config.get("num_key_value_heads") or model.config[ARCHITECTURES[model.architecture].heads_key]
    return 2 * 2 * model.layers * int(heads) * _head_size(model)


def _head_size(model: ModelFolder) -> int:
    heads = model.config[ARCHITECTURES[model.architecture].heads_key]
    return int(model.config.get("head_dim") or model.hidden_size // heads)
