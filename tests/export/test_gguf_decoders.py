"""GGUF files of Gemma 3 and GPT-2 in llama.cpp against torch, and what of them llama.cpp could not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgestill.artifact import Artifact
from edgestill.checkpoints import load_torch
from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.payload import open_payload
from edgestill.runtimes.session import SessionOptions

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

SLIDING, FULL = "sliding_attention", "full_attention"


def _changed(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def _logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.long)}
        return np.asarray(load_torch(folder)(**given).logits.numpy())


def _difference(artifact: Artifact, folder: Path) -> float:
    """Largest difference of logits over 40 tokens, with a float32 cache, as a share of the largest logit."""
    from edgestill.runtimes.llamacpp_session import LlamaCppSession

    ids = np.random.default_rng(0).integers(3, 300, (1, 40))
    session = LlamaCppSession(artifact, SessionOptions(threads=1, extra={"kv": "f32"}))
    want = _logits(folder, ids)
    return float(np.abs(session.forward(ids, np.ones_like(ids)) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("model", ["tiny_gemma3", "tiny_gpt2"])
def test_weights_come_back_and_logits_are_those_of_torch(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    artifact = export(folder, tmp_path / "a", ExportConfig(to="gguf:f32"))
    payload = open_payload(artifact)
    truth = load_file(folder / "model.safetensors")
    decoded = {tensor.name: payload.decode(tensor) for tensor in artifact.tensors()}
    assert decoded.keys() == truth.keys()
    for name, weight in truth.items():
        ulp = 2**-23 if "norm" in name and model == "tiny_gemma3" else 0.0  # 1 + w was rounded
        np.testing.assert_allclose(decoded[name], weight, rtol=0, atol=ulp, err_msg=name)
    # What is left is GELU, which llama.cpp looks up in a table of float16.
    assert _difference(artifact, folder) < 2e-3


def test_layers_in_any_order_are_named_in_the_file(tiny_gemma3: Path, tmp_path: Path) -> None:
    """llama.cpp takes every sixth layer to see all; a student with other layers says which do."""
    kinds = [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]
    folder = _changed(tiny_gemma3, tmp_path / "m", layer_types=kinds)
    artifact = export(folder, tmp_path / "a", ExportConfig(to="gguf:f32"))
    with GgufFile(artifact.entry) as file:
        assert list(file.metadata["gemma3.attention.sliding_window_pattern"]) == [kind == SLIDING for kind in kinds]
        assert file.metadata["gemma3.attention.sliding_window"] == 8
    assert _difference(artifact, folder) < 2e-3
    assert _difference(artifact, tiny_gemma3) > 1e-2  # the order matters
    plain = export(tiny_gemma3, tmp_path / "b", ExportConfig(to="gguf:f32"))
    with GgufFile(plain.entry) as file:
        assert "gemma3.attention.sliding_window_pattern" not in file.metadata
        assert file.metadata["gemma3.rope.freq_base"] == 1e6
        assert file.metadata["gemma3.rope.freq_base_swa"] == 1e4


def test_a_linear_rope_scaling_is_that_of_the_layers_that_see_all(tiny_gemma3: Path, tmp_path: Path) -> None:
    rope = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4}, SLIDING: {"rope_type": "default",
                                                                                    "rope_theta": 2e3}}  # fmt: skip
    folder = _changed(tiny_gemma3, tmp_path / "m", rope_parameters=rope)
    artifact = export(folder, tmp_path / "a", ExportConfig(to="gguf:f32"))
    assert _difference(artifact, folder) < 2e-3
    assert _difference(artifact, tiny_gemma3) > 1e-2


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("tiny_gemma3", {"query_pre_attn_scalar": 24}, r"by 1 / sqrt\(16\), its config says .* = 24"),
        ("tiny_gemma3", {"hidden_activation": "silu"}, "activation = 'silu'"),
        ("tiny_gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("tiny_gpt2", {"activation_function": "relu"}, "activation = 'relu'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    model: str, change: dict[str, Any], words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = _changed(request.getfixturevalue(model), tmp_path / "m", **change)
    with pytest.raises(Unsupported, match=words):
        export(folder, tmp_path / "a", ExportConfig(to="gguf:f32"))
    assert not (tmp_path / "a").exists()
