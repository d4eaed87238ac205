"""``genai_config.json``: what onnxruntime-genai has to be told to open a decoder.

Its keys are those of the builder of onnxruntime-genai 0.18 (``src/python/py/models``). The graph is ours; genai only
learns the names of inputs and outputs, sizes, and which tokens begin and end a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json
from .decoder_plan import decoder_plan

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["GENAI_FILE", "genai_config", "write_genai_config"]

GENAI_FILE = "genai_config.json"

# genai's own names for a plain decoder; its "gpt2" is another graph, with one merged cache a layer.
_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3_text", "gpt2": "decoder"}


def genai_config(model: ModelFolder, length: int, *, shared_cache: bool = True) -> dict[str, Any]:
    """The content for a graph of ``model`` that takes ``length`` tokens, greedy by default.

    ``shared_cache``: the past is a buffer that is extended in place (the fused graph), not one that grows.
    """
    plan = decoder_plan(model)
    tokens = _tokens(model)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": plan.head_dim,
        "hidden_size": model.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
        "num_attention_heads": plan.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": plan.kv_heads,
    }  # fmt: skip
    return {
        "model": {
            **tokens, "context_length": length, "decoder": decoder, "type": _TYPES[model.architecture],
            "vocab_size": model.vocab_size,
        },
        "search": {
            "do_sample": False, "early_stopping": True, "max_length": length, "min_length": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": shared_cache, "repetition_penalty": 1.0,
        },
    }  # fmt: skip


def write_genai_config(model: ModelFolder, folder: Path, length: int, *, shared_cache: bool = True) -> None:
    """Write :data:`GENAI_FILE` into the artifact's folder, where it is part of the payload."""
    text = json.dumps(genai_config(model, length, shared_cache=shared_cache), indent=2, sort_keys=True)
    (folder / GENAI_FILE).write_text(text + "\n", encoding="utf-8")


def _tokens(model: ModelFolder) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` (one or several) and ``pad_token_id``; the generation config goes first."""
    path = model.path / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    generation = generation if isinstance(generation, dict) else {}
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(key)
        found[key] = model.config.get(key) if value is None else value
    ends = found["eos_token_id"]
    first_end = ends[0] if isinstance(ends, list) and ends else ends
    if found["pad_token_id"] is None:
        found["pad_token_id"] = first_end
    if found["bos_token_id"] is None:
        found["bos_token_id"] = first_end
    return {key: value for key, value in found.items() if value is not None}
