"""What goes into each matrix, against hooks written down by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.errors import BadInput
from edgestill.export.onnx_moments import Moments
from edgestill.export.source import Source


@pytest.mark.parametrize("most_bytes", [1, 30_000, 1 << 30])
def test_moments_of_a_decoder(most_bytes: int, tiny_llama: Path, sentences: list[str]) -> None:
    """However little memory is given, and so in however many passes."""
    import torch

    texts = sentences[:7]
    moments = Moments(Source(open_model(tiny_llama)), texts, most_bytes=most_bytes)
    model, tokenizer = load_torch(tiny_llama), load_tokenizer(tiny_llama)
    seen: dict[str, list[np.ndarray]] = {}
    wanted = {
        "model.embed_tokens.weight": model.lm_head,
        "model.layers.0.self_attn.v_proj.weight": model.model.layers[0].self_attn.v_proj,
        "model.layers.3.mlp.down_proj.weight": model.model.layers[3].mlp.down_proj,
    }
    for name, module in wanted.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0].double().numpy())
        )
    with torch.no_grad():
        for text in texts:  # one at a time: no padding
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    for name in wanted:
        rows = np.concatenate(seen[name])
        np.testing.assert_allclose(moments.of(name), rows.T @ rows / len(rows), rtol=2e-4, atol=2e-4)
    assert moments.of("model.norm.weight") is None


def test_moments_of_an_encoder(tiny_bert: Path, sentences: list[str]) -> None:
    moments = Moments(Source(open_model(tiny_bert)), sentences[:5])
    found = moments.of("encoder.layer.2.output.dense.weight")
    assert found is not None
    assert found.shape == (64, 64)
    assert np.linalg.eigvalsh(found.astype(np.float64)).min() > -1e-6
    assert moments.of("embeddings.word_embeddings.weight") is None


def test_text_without_a_token(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="no token"):
        Moments(Source(open_model(tiny_llama)), [""])
