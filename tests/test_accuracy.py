"""Accuracy on the artifact: against teacher and student, on tasks of one's own, and what goes wrong for one subject."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgestill.accuracy import AccuracyRequest, measure_accuracy
from edgestill.bench.measure import Subject
from edgestill.errors import BadInput, UsageError
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.stages import Observer


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llama, tmp_path_factory.mktemp("accuracy") / "it's 4 bits", ExportConfig(to="gguf:q4_0")).path


@pytest.fixture
def text(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(" ".join(sentences[i : i + 6]) for i in range(0, 60, 6)))
    return path


@pytest.mark.whole
def test_against_teacher_and_student_and_on_tasks(artifact, tiny_llama, text, tmp_path):
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps({"context": "the film was", "choices": [a, b], "answer": a}) + "\n"
                            for a, b in (("good", "bad"), ("slow", "never fast"), ("red", "green"))))  # fmt: skip
    other = Subject("gone", tmp_path / "gone", "artifact", None, "0" * 64)
    subjects = [Subject("q4", artifact, "artifact", None, "1" * 64), other]
    request = AccuracyRequest(tiny_llama, tiny_llama, text, (quiz,), threads=1, tokens=300, window=32)
    rows = measure_accuracy(subjects, request, Observer())
    mine = {(row.metric, row.against, row.data): row for row in rows if row.subject == "q4"}
    for against in ("teacher", "student"):
        kl = mine["kl", against, "words"]
        assert kl.summary.value > 0
        assert kl.summary.n >= 300
        assert kl.summary.low < kl.summary.value < kl.summary.high
        assert 5 < kl.protocol["independent_units"] <= 10  # documents
        assert mine["kl_max", against, "words"].summary.value == pytest.approx(max(kl.samples[0]), rel=1e-4)
        assert np.median(kl.samples[0]) == pytest.approx(mine["kl_median", against, "words"].summary.value, rel=1e-3)
        assert {"delta_p", "delta_p_rms", "perplexity_ratio", "top5_agreement", "ece"} <= {
            m for m, a, _ in mine if a == against
        }
    assert mine["accuracy", None, "quiz"].summary.n == 3
    assert mine["accuracy", None, "quiz"].runtime == "llama.cpp"
    lost = [row for row in rows if row.subject == "gone"]
    assert [(row.metric, row.against) for row in lost] == [("kl", "teacher"), ("kl", "student"), ("accuracy", None)]
    assert all(row.summary is None and row.reason for row in lost)


@pytest.mark.whole
def test_the_teacher_itself_is_at_no_distance(tiny_bert, tmp_path):
    """And targets that can't be asked have a row each, with the reason."""
    request = AccuracyRequest(tiny_bert, threads=1, examples=12)
    targets = ("profile:raspberry-pi-5-8gb", "ssh://nobody@127.0.0.1:1", "host")
    rows = measure_accuracy([Subject("teacher", tiny_bert, "model", 1, "1" * 64)], request, Observer(), targets=targets)
    found = {row.metric: row.summary.value for row in rows if row.target == "host"}
    assert found == {"cosine": pytest.approx(1), "spearman": pytest.approx(1)}
    predicted, unreachable = (row for row in rows if row.target != "host")
    assert (predicted.metric, predicted.summary, predicted.device) == ("spearman", None, "profile:raspberry-pi-5-8gb")
    assert "a calculation has no answers" in predicted.reason
    assert (unreachable.target, unreachable.summary) == ("ssh://nobody@127.0.0.1:1", None)
    assert "127.0.0.1" in unreachable.reason


def test_options_that_make_no_sense(tiny_llama, tmp_path):
    for request in (AccuracyRequest(), AccuracyRequest(text=tmp_path), AccuracyRequest(student=tiny_llama)):
        with pytest.raises(UsageError):
            measure_accuracy([], request, Observer())
    with pytest.raises(BadInput, match="does not exist"):
        measure_accuracy([], AccuracyRequest(tasks=(tmp_path / "none.jsonl",)), Observer())
    with pytest.raises(BadInput, match="does not exist"):
        measure_accuracy([], AccuracyRequest(tiny_llama, text=tmp_path / "none.txt"), Observer())


def test_a_disk_that_is_too_small_is_told_before(tiny_llama, monkeypatch):
    import shutil
    from collections import namedtuple

    from edgestill.errors import ResourceExhausted

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(ResourceExhausted, match="GB"):
        measure_accuracy([], AccuracyRequest(tiny_llama), Observer())
