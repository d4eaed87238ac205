"""ONNX encoders against the torch model that they came from."""

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
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions

BERT = {
    "vocab_size": 137, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "initializer_range": 0.3, "num_labels": 3,
}  # fmt: skip
DISTILBERT = {"vocab_size": 137, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3,
              "max_position_embeddings": 66, "initializer_range": 0.3}  # fmt: skip
CLASSES = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", BERT),
    "xlm-roberta": ("XLMRoberta", BERT),
    "electra": ("Electra", {**BERT, "embedding_size": 16}),
    "mpnet": ("MPNet", BERT),
    "distilbert": ("DistilBert", DISTILBERT),
}


def _save(kind: str, task: str, folder: Path, tokenizer: Path, **facts: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(3)
    name, sizes = CLASSES[kind]
    config = getattr(transformers, f"{name}Config")(**sizes)
    head = {"feature-extraction": "Model", "text-classification": "ForSequenceClassification",
            "token-classification": "ForTokenClassification"}[task]  # fmt: skip
    model = getattr(transformers, f"{name}{head}")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # else biases are 0 and norms 1, and a forgotten one would not be seen
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    labels = [] if task == "feature-extraction" else ["a", "b", "c"]
    (folder / "edgestill.json").write_text(
        json.dumps({"schema_version": 1, "task": task, "max_length": 64, "labels": labels, **facts})
    )
    return folder


def _batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 130, (3, 20))
    mask = (np.arange(20) < np.array([[20], [11], [2]])).astype(np.int64)
    return np.where(mask == 1, ids, 1), mask


def _torch(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = load_torch(folder)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return (out if torch.is_tensor(out) else out.logits).numpy()


def _onnx(folder: Path, out: Path, ids: np.ndarray, mask: np.ndarray, quantisation: str = "fp32") -> np.ndarray:
    artifact = export(folder, out, ExportConfig(to=f"onnx:{quantisation}"))
    return OrtSession(artifact, SessionOptions(threads=1)).forward(ids, mask)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_embeddings_of_every_architecture(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = _save(kind, "feature-extraction", tmp_path / "m", tiny_bert, pooling="mean", normalize=True)
    ids, mask = _batch()
    np.testing.assert_allclose(_onnx(folder, tmp_path / "a", ids, mask), _torch(folder, ids, mask), atol=2e-6)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_logits_of_every_architecture(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = _save(kind, "text-classification", tmp_path / "m", tiny_bert)
    ids, mask = _batch()
    got = _onnx(folder, tmp_path / "a", ids, mask)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, _torch(folder, ids, mask), atol=2e-5)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_labels_of_tokens_of_every_architecture(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = _save(kind, "token-classification", tmp_path / "m", tiny_bert)
    ids, mask = _batch()
    got = _onnx(folder, tmp_path / "a", ids, mask)
    assert got.shape == (3, 20, 3)
    real = mask == 1
    np.testing.assert_allclose(got[real], _torch(folder, ids, mask)[real], atol=2e-5)


@pytest.mark.parametrize(("to", "missing"), [("gguf:f32", "llama.cpp has no head"), ("coreml:fp16", "Core ML: no")])
def test_formats_that_label_no_tokens_say_which_one_does(to: str, missing: str, tiny_tagger: Path, tmp_path: Path):
    with pytest.raises(Unsupported, match=f"{missing}.*token-classification.*") as error:
        export(tiny_tagger, tmp_path / "a", ExportConfig(to=to))
    assert error.value.hint == "export it to onnx"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("last", False), ("mean", False)])
def test_pooling_is_in_the_graph(pooling: str, normalize: bool, tiny_bert: Path, tmp_path: Path) -> None:
    folder = _save("bert", "feature-extraction", tmp_path / "m", tiny_bert, pooling=pooling, normalize=normalize)
    ids, mask = _batch()
    got = _onnx(folder, tmp_path / "a", ids, mask)
    np.testing.assert_allclose(got, _torch(folder, ids, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("quantisation", "least"),
    [("fp16", 0.99999), ("int8", 0.999), ("int4", 0.97), ("int8-dynamic", 0.999), ("int8-dynamic-per-channel", 0.99)],
)
def test_variants_stay_near(quantisation: str, least: float, tiny_bert: Path, tmp_path: Path) -> None:
    ids, mask = _batch()
    got = _onnx(tiny_bert, tmp_path / "a", ids, mask, quantisation)
    cosine = (got * _torch(tiny_bert, ids, mask)).sum(axis=1)
    assert cosine.min() > least
    assert cosine.max() < 1 + 1e-5


def test_padding_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    session = OrtSession(export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp16")), SessionOptions(threads=1))
    ids, mask = _batch()
    short = session.forward(ids[1:2, :11], mask[1:2, :11])
    np.testing.assert_allclose(session.forward(ids, mask)[1:2], short, atol=2e-3)
