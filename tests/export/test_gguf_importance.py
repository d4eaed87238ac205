"""The importance matrix against a double loop, and what it is good for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.errors import Unsupported
from edgestill.export.gguf_importance import Importance, importance_matrix, measure_importance
from edgestill.export.source import Source
from edgestill.grids import dequantise
from edgestill.runtimes.ggml_api import quantise_rows, requires_importance

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")


def test_it_is_the_mean_square_of_each_input(tiny_llama: Path, sentences: list[str]) -> None:
    """The input of the first layer's query, key and value is the normed embedding: looked up and squared by hand."""
    texts = sentences[:4]
    found = measure_importance(Source(open_model(tiny_llama)), texts)
    model, tokenizer = load_torch(tiny_llama), load_tokenizer(tiny_llama)
    layer = model.model.layers[0]
    sums, count = np.zeros(64), 0
    for text in texts:
        for token in tokenizer(text)["input_ids"]:
            with torch.no_grad():
                row = layer.input_layernorm(model.model.embed_tokens.weight[token][None])[0].numpy()
            for column in range(64):
                sums[column] += float(row[column]) ** 2
            count += 1
    assert found.tokens == count
    for part in "qkv":
        values = found.values[f"model.layers.0.self_attn.{part}_proj.weight"]
        np.testing.assert_allclose(values, sums / count, rtol=1e-5)


def test_every_matrix_product_has_one_under_its_parameter_name(
    tiny_llama: Path, tiny_bert: Path, tiny_classifier: Path, sentences: list[str]
) -> None:
    decoder = measure_importance(Source(open_model(tiny_llama)), sentences[:2]).values
    assert len(decoder) == 4 * 7 + 1
    assert "lm_head.weight" not in decoder  # tied: it is stored as the embedding
    assert decoder["model.embed_tokens.weight"].shape == (64,)
    encoder = measure_importance(Source(open_model(tiny_bert)), sentences[:2]).values
    assert len(encoder) == 4 * 6
    assert encoder["encoder.layer.3.output.dense.weight"].shape == (64,)
    head = measure_importance(Source(open_model(tiny_classifier)), sentences[:2]).values
    assert head["classifier.weight"].shape == (32,)


@pytest.mark.parametrize("grid", ["q4_0", "q2_k", "q4_k", "iq4_nl", "iq3_xxs"])
def test_it_lowers_the_weighed_error(grid: str) -> None:
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(64, 256)).astype(np.float32)
    importance = np.exp(rng.normal(0, 2, 256)).astype(np.float32)

    def error(given: np.ndarray) -> float:
        decoded = dequantise(grid, quantise_rows(grid, weight, given), weight.shape)
        return float((importance * (decoded - weight) ** 2).sum())

    assert error(importance) < 0.9 * error(np.ones(256, np.float32))


def test_threads_do_not_change_the_bytes() -> None:
    weight = np.random.default_rng(7).normal(size=(37, 256)).astype(np.float32)
    np.testing.assert_array_equal(quantise_rows("q4_k", weight), quantise_rows("q4_k", weight, None, 3))
    assert requires_importance("iq2_xxs")
    assert not requires_importance("q4_k")


def test_it_is_kept_and_found_again(
    tiny_llama: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path))
    model = Source(open_model(tiny_llama))
    first = importance_matrix(model, sentences[:2])
    [stored] = (tmp_path / "importance").iterdir()
    kept = stored.stat().st_mtime_ns
    again = importance_matrix(model, sentences[:2])
    assert stored.stat().st_mtime_ns == kept
    assert (again.texts, again.tokens, again.sha256) == (first.texts, first.tokens, first.sha256)
    for name, values in first.values.items():
        np.testing.assert_array_equal(again.values[name], values)
    stored.write_bytes(stored.read_bytes()[:100])  # damaged: measured anew
    assert importance_matrix(model, sentences[:2]).tokens == first.tokens
    assert importance_matrix(model, sentences[:3]).sha256 != first.sha256


def test_a_channel_that_was_never_reached_weighs_a_little() -> None:
    importance = Importance({"a": np.float32([0, 4, 2]), "b": np.zeros(3, np.float32)}, 1, 1, "")
    np.testing.assert_allclose(importance.weights("a"), [2e-6, 4, 2])  # type: ignore[arg-type]
    np.testing.assert_array_equal(importance.weights("b"), [1, 1, 1])  # type: ignore[arg-type]
    assert importance.weights("c") is None


def test_texts_without_a_token_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(Unsupported, match="no token"):
        measure_importance(Source(open_model(tiny_llama)), ["", ""])
    with pytest.raises(Unsupported, match="there are none"):
        importance_matrix(Source(open_model(tiny_llama)), [])
