"""Tasks for encoders: files, and what is counted, against transformers and scipy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from edgestill.accuracy import read_task
from edgestill.bench.completions import CompletionSet
from edgestill.bench.labelled import LabelledTexts, ScoredPairs, read_labelled, read_pairs
from edgestill.bench.tasks import fit_probe, predict_probe
from edgestill.errors import BadInput
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.torch_session import TorchSession

LABEL = {"text": "the film was good", "label": "good"}
PAIR = {"first": "the film was good", "second": "a good film", "score": 4}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def outputs(folder: Path, texts: list[str], kind: str) -> np.ndarray:
    """By transformers, text by text: class logits, or normalised means of the last hidden states."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            said = model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt"))
            if kind == "AutoModel":
                mean = said.last_hidden_state[0].mean(dim=0)
                found.append((mean / mean.norm()).numpy())
            else:
                found.append(said.logits[0].numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Any:
    return TorchSession(tiny_bert, SessionOptions(threads=1))


def test_the_first_line_says_the_kind(tmp_path):
    kinds = {LabelledTexts: LABEL, ScoredPairs: PAIR, CompletionSet: {"context": "a", "target": "b"}}
    for kind, row in kinds.items():
        rows = [row, {**row, "score": 1}, {**row, "score": 2}] if kind is ScoredPairs else [row]
        assert type(read_task(write(tmp_path / "x.jsonl", "", *rows))) is kind
    for text in ("{", "[1]", '{"a": 1}'):
        with pytest.raises(BadInput, match=r"x\.jsonl:1"):
            read_task(write(tmp_path / "x.jsonl", text))


@pytest.mark.parametrize(
    ("read", "row", "says"),
    [
        (read_labelled, [1], "not an object"),
        (read_labelled, {**LABEL, "labels": 1}, "unknown field 'labels'"),
        (read_labelled, {**LABEL, "text": " "}, "`text`"),
        (read_labelled, {**LABEL, "label": True}, "`label`"),
        (read_labelled, {**LABEL, "split": "dev"}, "train or test"),
        (read_pairs, {**PAIR, "second": 1}, "`first` and `second`"),
        (read_pairs, {**PAIR, "score": "4"}, "`score`"),
        (read_pairs, '{"first": "a", "second": "b", "score": NaN}', "`score`"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, read, row, says):
    with pytest.raises(BadInput, match=says) as caught:
        read(write(tmp_path / "x.jsonl", row))
    assert f"{tmp_path / 'x.jsonl'}:1" in str(caught.value)


def test_files_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(BadInput, match="nothing but examples to learn from"):
        read_labelled(write(tmp_path / "x.jsonl", {**LABEL, "split": "train"}))
    with pytest.raises(BadInput, match="2 pairs"):
        read_pairs(write(tmp_path / "x.jsonl", PAIR, {**PAIR, "score": 1}))
    with pytest.raises(BadInput, match="1 different"):
        read_pairs(write(tmp_path / "x.jsonl", PAIR, PAIR, PAIR))


def test_a_classifier_answers_with_its_own_labels(tmp_path, tiny_classifier, sentences):
    texts = sentences[:17]
    said = outputs(tiny_classifier, texts, "AutoModelForSequenceClassification")
    names = ["bad", "fair", "good"]
    true = [int(row.argmax()) if number % 3 else (int(row.argmax()) + 1) % 3 for number, row in enumerate(said)]
    rows = [{"text": text, "label": names[index] if place % 2 else index}
            for place, (text, index) in enumerate(zip(texts, true, strict=True))]  # fmt: skip
    data = read_labelled(write(tmp_path / "x.jsonl", *rows))
    worker = TorchSession(tiny_classifier, SessionOptions(threads=1))
    answers = data.ask(worker, tiny_classifier, batch_size=4)
    assert list(answers[0]) == [bool(number % 3) for number in range(17)]
    sure = np.exp(said - said.max(axis=1, keepdims=True))
    np.testing.assert_allclose(answers[1], (sure / sure.sum(axis=1, keepdims=True)).max(axis=1), rtol=1e-4)
    found = {one.metric: one.summary for one in data.estimates(answers, teacher=answers)}
    assert found["accuracy"].value == pytest.approx(11 / 17)
    assert found["accuracy_ratio"].value == 1
    assert set(found) == {"accuracy", "accuracy_ratio", "ece"}
    for label in ("great", 3):
        with pytest.raises(BadInput, match="has no label"):
            read_labelled(write(tmp_path / "x.jsonl", {**LABEL, "label": label})).ask(worker, tiny_classifier)
    with pytest.raises(BadInput, match="is for text-classification"):
        read_pairs(write(tmp_path / "y.jsonl", PAIR, PAIR, {**PAIR, "score": 1})).ask(worker, tiny_classifier)


def test_a_probe_learns_on_an_encoders_own_embeddings(tmp_path, tiny_bert, encoder, sentences):
    texts = list(dict.fromkeys(sentences))[:40]
    labels = ["long" if len(text) > 40 else "short" for text in texts]
    rows = [{"text": text, "label": label, **({"split": "train"} if place % 2 else {})}
            for place, (text, label) in enumerate(zip(texts, labels, strict=True))]  # fmt: skip
    data = read_labelled(write(tmp_path / "x.jsonl", *rows))
    assert (data.train, len(data.texts)) == (20, 40)
    right, _, classes = data.ask(encoder, tiny_bert, batch_size=7)
    said = outputs(tiny_bert, texts, "AutoModel")
    known = np.array([["long", "short"].index(label) for label in labels])
    guessed = predict_probe(said[::2], fit_probe(said[1::2], known[1::2], 2))
    assert classes == 2
    assert list(right) == list(guessed == known[::2])
    with pytest.raises(BadInput, match="needs examples to learn from"):
        read_labelled(write(tmp_path / "x.jsonl", LABEL)).ask(encoder, tiny_bert)
    strange = write(tmp_path / "x.jsonl", LABEL, {**LABEL, "label": "bad", "split": "train"})
    with pytest.raises(BadInput, match="no example to learn 'good' from"):
        read_labelled(strange).ask(encoder, tiny_bert)


def test_pairs_are_ranked_as_people_do(tmp_path, tiny_bert, encoder, sentences):
    texts = sentences[:24]
    scores = [round(float(score), 1) for score in np.random.default_rng(0).uniform(0, 5, 12)]
    rows = [{"first": a, "second": b, "score": score}
            for a, b, score in zip(texts[::2], texts[1::2], scores, strict=True)]  # fmt: skip
    data = read_pairs(write(tmp_path / "x.jsonl", *rows))
    cosines = data.ask(encoder, tiny_bert, batch_size=5)
    said = outputs(tiny_bert, texts, "AutoModel")
    np.testing.assert_allclose(cosines, (said[::2] * said[1::2]).sum(axis=1), atol=1e-5)
    (found,) = data.estimates(cosines, teacher=np.array(scores))
    assert found.metric == "sts_spearman"
    assert found.summary.value == pytest.approx(spearmanr(cosines, scores).statistic)
    assert found.summary.low < found.summary.value < found.summary.high
    assert found.protocol["teacher_sts_spearman"] == pytest.approx(1)
    (perfect,) = data.estimates(np.array(scores) * 2)
    assert (perfect.summary.value, perfect.summary.high) == (pytest.approx(1), pytest.approx(1))
