"""The torch session against Transformers called directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.errors import BadInput, Unsupported, WorkerError
from edgestill.runtimes.session import Session, SessionOptions, open_session
from edgestill.runtimes.torch_session import TorchSession

ONE = SessionOptions(threads=1)


def padded(rows: list[list[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, rows))
    ids = np.array([row + [pad] * (length - len(row)) for row in rows])
    return ids, np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def test_a_model_folder_is_opened_by_torch(tiny_llama: Path):
    session = open_session(tiny_llama, ONE)
    assert isinstance(session, TorchSession)
    assert isinstance(session, Session)
    info = session.info()
    assert (info.runtime, info.backend, info.task) == ("torch", "cpu", "text-generation")
    assert info.capabilities == ("forward", "decode", "score", "latency")
    assert (info.vocab_size, info.max_length) == (320, 128)


def test_generation_equals_transformers(tiny_llama: Path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    session = TorchSession(tiny_llama, ONE)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]]
    logits = session.forward(*padded(rows, pad=2))
    assert (logits.dtype, logits.shape) == (np.float32, (3, 6, 320))
    with torch.no_grad():
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0].numpy()
            np.testing.assert_allclose(logits[index, : len(row)], alone, atol=2e-5)
        prompt = rows[0]
        whole = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
    tokens = list(session.decode(prompt, 12, logits=True))
    assert [token.id for token in tokens] == whole[0, len(prompt) :].tolist()
    assert all(token.seconds > 0 for token in tokens)
    assert all(token.logits.shape == (320,) for token in tokens)
    assert all(token.logits is None for token in session.decode(prompt, 2))


def test_end_of_text_is_not_obeyed(tiny_llama: Path, monkeypatch):
    session = TorchSession(tiny_llama, ONE)
    session._model.lm_head.weight.data.zero_()  # all logits equal: the lowest id wins, and it is <|endoftext|>
    assert [token.id for token in session.decode([5], 4)] == [0, 0, 0, 0]


def test_classification_equals_transformers(tiny_classifier: Path):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier, dtype=torch.float32).eval()
    session = TorchSession(tiny_classifier, ONE)
    assert session.info().capabilities == ("forward", "score", "latency")
    rows = [[2, 50, 60, 70, 3], [2, 80, 3]]
    logits = session.forward(*padded(rows))
    assert (logits.dtype, logits.shape) == (np.float32, (2, 3))
    with torch.no_grad():
        for index, row in enumerate(rows):
            np.testing.assert_allclose(logits[index], model(torch.tensor([row])).logits[0].numpy(), atol=1e-5)


def test_embeddings_are_the_normalised_mean_of_real_tokens(tiny_bert: Path):
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_bert, dtype=torch.float32).eval()
    session = TorchSession(tiny_bert, ONE)
    rows = [[2, 50, 60, 70, 3], [2, 80, 3]]
    got = session.forward(*padded(rows))
    assert (got.dtype, got.shape) == (np.float32, (2, 32))
    with torch.no_grad():
        for index, row in enumerate(rows):
            mean = model(torch.tensor([row])).last_hidden_state[0].numpy().astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(got[index], mean / np.sqrt((mean**2).sum()), atol=1e-5)


def test_a_folder_with_other_weights_runs_those(tiny_llama: Path, tmp_path: Path):
    """How a dequantised student is run: the same folder with other numbers."""
    import torch

    from edgestill.checkpoints import load_tokenizer, load_torch, open_model, save_model

    model = load_torch(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    save_model(model, load_tokenizer(tiny_llama), tmp_path / "changed", open_model(tiny_llama))
    ids = np.array([[5, 6, 7]])
    changed, before = (TorchSession(f, ONE).forward(ids, np.ones_like(ids)) for f in (tmp_path / "changed", tiny_llama))
    with torch.no_grad():
        np.testing.assert_array_equal(changed, model(torch.from_numpy(ids)).logits.numpy())
    assert np.abs(changed - before).max() > 1e-3


def test_a_closed_session_and_an_unknown_backend_are_errors(tiny_bert: Path, tmp_path: Path):
    session = TorchSession(tiny_bert, ONE)
    session.close()
    with pytest.raises(WorkerError, match="closed"):
        session.forward(np.array([[2, 3]]), np.array([[1, 1]]))
    with pytest.raises(Unsupported, match="cuda"):
        TorchSession(tiny_bert, SessionOptions(backend="cuda"))
    with pytest.raises(BadInput):
        TorchSession(tmp_path, ONE)
