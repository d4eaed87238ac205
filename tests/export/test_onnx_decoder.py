"""ONNX decoders against the torch model that they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.checkpoints import load_torch
from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.export.decoder_plan import rotary_frequencies
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions

LAYERS = 2
SIZES = {
    "vocab_size": 320, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3,
    "num_key_value_heads": 1, "intermediate_size": 80, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip

GPT2_SIZES = {
    "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 2, "n_embd": 48, "n_layer": LAYERS,
    "n_head": 3, "n_inner": 80, "n_positions": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def _save(kind: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A random model of another architecture; 48 and 80 are no multiples of a quantisation block."""
    import torch
    import transformers

    torch.manual_seed(1)
    names = {"llama": ("Llama", "ForCausalLM"), "qwen2": ("Qwen2", "ForCausalLM"), "qwen3": ("Qwen3", "ForCausalLM"),
             "gemma3_text": ("Gemma3Text", "ForCausalLM"), "gpt2": ("GPT2", "LMHeadModel")}  # fmt: skip
    stem, head = names[kind]
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    config = getattr(transformers, f"{stem}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{stem.removesuffix('Text')}{head}")(config)
    for name, parameter in model.named_parameters():
        # else they are 1 or 0, and a forgotten one would not be seen
        if name.endswith(("norm.weight", ".bias")) or ".ln_" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    (folder / "edgestill.json").write_text(json.dumps({"schema_version": 1, "task": "text-generation"}))
    return folder


MODELS = {
    "llama-untied": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-rope3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3-linear": ("gemma3_text", {
        "head_dim": 16, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"],
        "hidden_activation": "silu", "tie_word_embeddings": False, "attention_bias": True,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "gpt2": ("gpt2", {}),
    "gpt2-odd": ("gpt2", {"n_head": 6, "activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True,
                          "tie_word_embeddings": False}),
}  # fmt: skip


def _logits(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return load_torch(folder)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def _greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the slow way that can't be wrong."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(_logits(folder, np.array([ids]), np.ones((1, len(ids)), np.int64))[0, -1].argmax()))
    return ids[len(prompt) :]


def _open(folder: Path, out: Path, quantisation: str = "fp32") -> OrtSession:
    return OrtSession(export(folder, out, ExportConfig(to=f"onnx:{quantisation}")), SessionOptions(threads=1))


def test_padded_batch_equals_torch(tiny_llama: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 300, (3, 13))
    mask = (np.arange(13) < np.array([[13], [8], [1]])).astype(np.int64)
    got = _open(tiny_llama, tmp_path / "a").forward(ids, mask)
    want = _logits(tiny_llama, ids, mask)
    assert np.abs(got - want)[mask == 1].max() < 1e-4


def test_cached_decode_equals_torch_for_32_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    prompt = [5, 77, 130, 9]
    tokens = list(_open(tiny_llama, tmp_path / "a").decode(prompt, 32, logits=True))
    assert [token.id for token in tokens] == _greedy(tiny_llama, prompt, 32)
    ids = np.array([prompt + [token.id for token in tokens[:-1]]])
    want = _logits(tiny_llama, ids, np.ones_like(ids))[0, len(prompt) - 1 :]
    assert np.abs(np.stack([token.logits for token in tokens]) - want).max() < 1e-4


@pytest.mark.parametrize("name", sorted(MODELS))
def test_other_architectures(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    folder = _save(kind, tmp_path / "model", tiny_llama, **changes)
    ids = np.random.default_rng(2).integers(3, 300, (2, 40))
    mask = (np.arange(40) < np.array([[40], [25]])).astype(np.int64)
    session = _open(folder, tmp_path / "a")
    assert np.abs(session.forward(ids, mask) - _logits(folder, ids, mask))[mask == 1].max() < 2e-4
    assert [token.id for token in session.decode([7, 8, 9], 8)] == _greedy(folder, [7, 8, 9], 8)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("quantisation", ["fp16", "int8", "int4", "int8-dynamic"])
def test_variants_of_odd_sizes_run(quantisation: str, name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Rows that no block divides are padded in the file; logits must stay near those of float weights."""
    kind, changes = MODELS[name]
    folder = _save(kind, tmp_path / "model", tiny_llama, **changes)
    ids = np.random.default_rng(2).integers(3, 300, (1, 20))
    mask = np.ones_like(ids)
    got, want = _open(folder, tmp_path / "a", quantisation).forward(ids, mask), _logits(folder, ids, mask)
    least = {"fp16": 0.99999, "int8": 0.999, "int4": 0.9, "int8-dynamic": 0.98}[quantisation]
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > least


@pytest.mark.parametrize("fixture", ["tiny_gemma3", "tiny_gpt2"])
def test_prefill_padding_and_cached_decode_equal_torch(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Beyond Gemma's window of 8 tokens by far, in one go, token by token, and padded."""
    folder = request.getfixturevalue(fixture)
    session = _open(folder, tmp_path / "a")
    ids = np.random.default_rng(0).integers(3, 300, (3, 40))
    mask = (np.arange(40) < np.array([[40], [11], [1]])).astype(np.int64)
    assert np.abs(session.forward(ids, mask) - _logits(folder, ids, mask))[mask == 1].max() < 1e-4
    prompt = ids[0, :11].tolist()
    tokens = list(session.decode(prompt, 32, logits=True))
    assert [token.id for token in tokens] == _greedy(folder, prompt, 32)
    whole = np.array([prompt + [token.id for token in tokens[:-1]]])
    want = _logits(folder, whole, np.ones_like(whole))[0, len(prompt) - 1 :]
    assert np.abs(np.stack([token.logits for token in tokens]) - want).max() < 1e-4


def test_a_window_that_is_wider_or_left_out_would_be_seen(tiny_gemma3: Path, tmp_path: Path) -> None:
    """The window of 8 matters: the same weights with another are far off."""
    ids = np.random.default_rng(0).integers(3, 300, (1, 40))
    want = _logits(tiny_gemma3, ids, np.ones_like(ids))
    for window in (7, 9, 128):
        folder = shutil.copytree(tiny_gemma3, tmp_path / f"model{window}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
        got = _open(folder, tmp_path / f"a{window}").forward(ids, np.ones_like(ids))
        assert np.abs(got - want)[0, :7].max() < 1e-4
        assert np.abs(got - want)[0, 20:].max() > 0.05


def test_half_precision_survives_a_large_residual_stream(tiny_llama: Path, tmp_path: Path) -> None:
    """SmolLM2's reaches 22,552, whose square overflows fp16: embeddings scaled up 20,000 times must not hurt."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 20_000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    ids = np.arange(5, 25)[None]
    got = _open(folder, tmp_path / "a", "fp16").forward(ids, np.ones_like(ids))
    want = _logits(folder, ids, np.ones_like(ids))
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_rotary_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for changes in ({}, MODELS["llama-rope3"][1], {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4,
                                                                       "factor": 2.0}}):  # fmt: skip
        config = LlamaConfig(**{**SIZES, **changes})
        want = LlamaRotaryEmbedding(config).inv_freq.numpy()
        np.testing.assert_allclose(rotary_frequencies(config.to_dict(), 16), want, rtol=4e-7)


def test_old_spelling_of_rotary_configs() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    np.testing.assert_array_equal(rotary_frequencies(old, 16), rotary_frequencies(new, 16))


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, {"hidden_act": "relu"}, {"head_dim": 12}]
)
def test_what_it_has_no_graph_for_is_refused(change: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Unsupported, match=r"ONNX|activation"):
        export(folder, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    assert not (tmp_path / "a").exists()
