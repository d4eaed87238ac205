"""The llama.cpp session against torch on tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Artifact, open_artifact, seal_artifact
from edgestill.errors import BadInput, MissingDependency, UsageError
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes import llamacpp_api
from edgestill.runtimes.llamacpp_session import LlamaCppSession
from edgestill.runtimes.session import Session, SessionOptions

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")

EXACT = SessionOptions(threads=1, extra={"kv": "f32"})
Open = Callable[..., LlamaCppSession]


@pytest.fixture(scope="module")
def artifacts(
    tiny_llama: Path, tiny_bert: Path, tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("gguf")
    models = {"llama": tiny_llama, "bert": tiny_bert, "classifier": tiny_classifier}
    return {name: export(model, root / name, ExportConfig(to="gguf:f32")) for name, model in models.items()}


@pytest.fixture
def start(artifacts: dict[str, Artifact]) -> Iterator[Open]:
    sessions: list[LlamaCppSession] = []

    def make(name: str, options: SessionOptions = EXACT) -> LlamaCppSession:
        sessions.append(LlamaCppSession(artifacts[name], options))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def _batch(vocabulary: int, lengths: tuple[int, ...] = (24, 10, 1, 17)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, vocabulary, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return ids * mask, mask


def _torch(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    from edgestill.checkpoints import load_torch

    with torch.no_grad():
        out = load_torch(folder)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return np.asarray(getattr(out, "logits", out))


def test_logits_of_a_padded_batch_are_those_of_torch(start: Open, tiny_llama: Path) -> None:
    ids, mask = _batch(320)
    real = mask.astype(bool)
    np.testing.assert_allclose(start("llama").forward(ids, mask)[real], _torch(tiny_llama, ids, mask)[real], atol=1e-4)


def test_long_rows_are_fed_in_parts(start: Open, tiny_llama: Path) -> None:
    """100 tokens are more than one batch of logits: the parts must share one cache."""
    ids, mask = _batch(320, (100, 65))
    real = mask.astype(bool)
    np.testing.assert_allclose(start("llama").forward(ids, mask)[real], _torch(tiny_llama, ids, mask)[real], atol=1e-4)


def test_embeddings_are_pooled_and_normalised_like_torch(start: Open, tiny_bert: Path) -> None:
    ids, mask = _batch(110)
    got = start("bert").forward(ids, mask)
    np.testing.assert_allclose(got, _torch(tiny_bert, ids, mask), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_more_texts_than_fit_one_batch(start: Open, tiny_bert: Path) -> None:
    ids, mask = _batch(110, (*[3] * 70, *[60] * 12))
    session = start("bert")
    together = session.forward(ids, mask)
    alone = np.concatenate([session.forward(ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))])
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_class_logits_are_those_of_torch(start: Open, tiny_classifier: Path) -> None:
    ids, mask = _batch(110)
    want = _torch(tiny_classifier, ids, mask)
    assert np.ptp(want, axis=0).max() > 1e-3  # else any constant would pass
    np.testing.assert_allclose(start("classifier").forward(ids, mask), want, atol=1e-4)


def test_greedy_decoding_is_that_of_forward(start: Open) -> None:
    session = start("llama")
    prompt = [5, 17, 200, 31]
    tokens = list(session.decode(prompt, 12, logits=True))
    assert len(tokens) == 12
    ids = np.array([[*prompt, *(token.id for token in tokens)]])
    logits = session.forward(ids, np.ones_like(ids))[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal([token.id for token in tokens], logits.argmax(axis=1))
    kept = np.stack([np.asarray(token.logits) for token in tokens])
    np.testing.assert_allclose(kept, logits, atol=1e-4)
    assert all(token.seconds > 0 for token in tokens)


def test_decoding_twice_starts_afresh(start: Open) -> None:
    session = start("llama")
    first = [token.id for token in session.decode([7, 8, 9], 8)]
    assert [token.id for token in session.decode([7, 8, 9], 8)] == first
    assert next(session.decode([7, 8, 9], 8)).logits is None


def test_info_tells_engine_and_cache(start: Open) -> None:
    session = start("llama", SessionOptions(threads=1))
    assert isinstance(session, Session)
    info = session.info()
    assert (info.runtime, info.backend, info.vocab_size, info.max_length) == ("llama.cpp", "cpu", 320, 128)
    assert info.placement == {"kv:f16": 1}
    assert {"forward", "decode", "score", "tokenize"} <= set(info.capabilities)
    assert "decode" not in start("bert").info().capabilities


def test_a_half_precision_cache_is_close(start: Open, tiny_llama: Path) -> None:
    ids, mask = _batch(320, (24,))
    got = start("llama", SessionOptions(threads=1)).forward(ids, mask)
    want = _torch(tiny_llama, ids, mask)
    assert 1e-4 < np.abs(got - want).max() < 0.1


def test_tokenises_like_transformers(start: Open, tiny_llama: Path, tiny_bert: Path) -> None:
    from edgestill.checkpoints import load_tokenizer

    text = "the actor was good, <|im_start|> perhaps 3 times"
    assert start("llama").tokenize(text) == load_tokenizer(tiny_llama)(text)["input_ids"]
    text = "The actor was good, perhaps 3 times"
    assert start("bert").tokenize(text) == load_tokenizer(tiny_bert)(text)["input_ids"]


def test_wrong_input_is_refused_before_llama_cpp_sees_it(start: Open) -> None:
    session = start("llama")
    ones = np.ones((1, 4), np.int64)
    for bad in (np.array([[1, 2, 320, 3]]), np.array([[1, -1, 2, 3]])):
        with pytest.raises(UsageError, match="outside"):
            session.forward(bad, ones)
    with pytest.raises(UsageError, match="129 tokens"):
        session.forward(np.ones((1, 129), np.int64), np.ones((1, 129), np.int64))
    with pytest.raises(UsageError, match="takes 1 to 128"):
        list(session.decode([1] * 120, 20))
    with pytest.raises(UsageError, match="0 tokens"):
        session.forward(ones, np.zeros((1, 4), np.int64))
    with pytest.raises(UsageError, match="can't decode"):
        next(start("bert").decode([1], 1))


@pytest.mark.parametrize("extra", [{"kv": "q1"}, {"flash": "maybe"}, {"threads": 3}])
def test_unknown_options_are_named(artifacts: dict[str, Artifact], extra: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown option"):
        LlamaCppSession(artifacts["llama"], SessionOptions(extra=extra))


def test_a_truncated_file_is_bad_input(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    source = artifacts["llama"]
    data = source.entry.read_bytes()
    for length in (100, len(data) // 2, len(data) - 1000):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "model.gguf").write_bytes(data[:length])
        artifact = seal_artifact(folder, dataclasses.replace(source.manifest, files=()))
        with pytest.raises(BadInput, match="damaged GGUF"):
            LlamaCppSession(artifact, EXACT)


def test_a_file_without_a_model_is_bad_input(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seal_artifact(tmp_path, dataclasses.replace(artifacts["llama"].manifest, files=()))
    with pytest.raises(BadInput, match="can't load"):
        LlamaCppSession(open_artifact(tmp_path), EXACT)


def test_a_missing_engine_names_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    llamacpp_api.engine.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependency) as caught:
        llamacpp_api.engine()
    assert caught.value.hint == "pip install 'edgestill[runtimes]'"


@pytest.mark.parametrize("change", ["size", "default"])
def test_an_engine_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    llamacpp_api.engine.cache_clear()
    size, defaults = llamacpp_api._LAYOUT["llama_context_params"]
    other = (size + 8, defaults) if change == "size" else (size, {**defaults, "n_ubatch": 1024})
    monkeypatch.setitem(llamacpp_api._LAYOUT, "llama_context_params", other)
    with pytest.raises(MissingDependency, match="llama_context_params"):
        llamacpp_api.engine()
    llamacpp_api.engine.cache_clear()
