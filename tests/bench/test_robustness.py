"""What noise costs teacher and student, on tiny models, with figures checked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.bench.perturb import PERTURBATIONS, perturb
from edgestill.bench.reference import encode_texts
from edgestill.bench.robustness import NoiseRow, Renumbered, Sizes, measure_robustness
from edgestill.bench.tasks import fit_probe, predict_probe
from edgestill.checkpoints import load_tokenizer, open_model
from edgestill.data import LabelledSet
from edgestill.distill.student import StudentPlan, make_student
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.torch_session import TorchSession
from edgestill.torch_models import save_model

SMALL = Sizes(texts=20, tokens=120, train=30, test=20)
KINDS = {"clean", *PERTURBATIONS}


class Counting:
    """A session that counts the rows that it runs."""

    def __init__(self, folder: Path) -> None:
        self._session = TorchSession(folder, SessionOptions(1))
        self.info = self._session.info
        self.rows = 0

    def forward(self, ids: Any, mask: Any) -> Any:
        self.rows += len(ids)
        return self._session.forward(ids, mask)


def cut(teacher: Path, out: Path) -> Path:
    """The first and the last layer of a teacher."""
    folder = open_model(teacher)
    plan = StudentPlan.of_layers(folder, (0, folder.layers - 1))
    save_model(make_student(folder, plan), load_tokenizer(teacher), out, folder)
    return out


def pick(rows: list[NoiseRow], **wanted: str) -> list[NoiseRow]:
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def test_embeddings(tiny_bert: Path, sentences: list[str], tmp_path: Path) -> None:
    labelled = tuple((text, index % 2) for index, text in enumerate(sentences[:60]))
    data = LabelledSet("parity", ("even", "odd"), labelled[:40], labelled[40:], "0" * 64)
    teacher, student = Counting(tiny_bert), Counting(cut(tiny_bert, tmp_path / "cut"))
    tokenizer = load_tokenizer(tiny_bert)
    rows = measure_robustness(
        {"teacher": teacher, "student": student}, tokenizer, {"words": sentences[60:]}, [data], max_length=32,
        sizes=SMALL,
    )  # fmt: skip
    assert {row.noise for row in rows} == KINDS
    assert {row.metric for row in pick(rows, subject="student", data="words")} == {"spearman", "cosine", "self_cosine"}
    assert {row.metric for row in pick(rows, subject="teacher", data="words")} == {"self_cosine"}
    assert not pick(rows, noise="clean", metric="self_cosine")
    # this tokenizer lower-cases: text in capitals is the same text, and is not run again
    for subject in ("teacher", "student"):
        assert not pick(rows, subject=subject, noise="case", metric="self_cosine"), "nothing to compare with"
        assert pick(rows, subject=subject, noise="case", metric="accuracy")[0].value == (
            pick(rows, subject=subject, noise="clean", metric="accuracy")[0].value
        )
    assert teacher.rows == student.rows == 3 * 20 + 30 + 3 * 20
    # one figure of each kind once more, by hand
    inputs = encode_texts(tokenizer, [perturb(t, "typos") for t in sentences[60:80]], max_length=32)
    plain = encode_texts(tokenizer, sentences[60:80], max_length=32)
    a, b = (session.forward(i.ids, i.mask) for session in (student,) for i in (plain, inputs))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    [row] = pick(rows, subject="student", noise="typos", metric="self_cosine")
    assert row.value == pytest.approx(cosine.mean(), abs=1e-5)
    assert row.n == 20
    learnt = encode_texts(tokenizer, [text for text, _ in labelled[:30]], max_length=32)
    asked = encode_texts(tokenizer, [perturb(text, "typos") for text, _ in labelled[40:]], max_length=32)
    probe = fit_probe(teacher.forward(learnt.ids, learnt.mask), np.array([y for _, y in labelled[:30]]), 2)
    right = predict_probe(teacher.forward(asked.ids, asked.mask), probe) == np.array([y for _, y in labelled[40:]])
    [row] = pick(rows, subject="teacher", noise="typos", metric="accuracy")
    assert row.value == pytest.approx(right.mean())


def test_generation(tiny_llama: Path, sentences: list[str], tmp_path: Path) -> None:
    teacher, student = Counting(tiny_llama), Counting(cut(tiny_llama, tmp_path / "cut"))
    rows = measure_robustness(
        {"teacher": teacher, "student": student}, load_tokenizer(tiny_llama), {"words": sentences}, max_length=64,
        window=16, sizes=SMALL,
    )  # fmt: skip
    assert {row.noise for row in rows} == KINDS
    own = {"perplexity", "next_token_accuracy"}
    for noise in KINDS:
        assert {row.metric for row in pick(rows, subject="teacher", noise=noise)} == own
        assert {row.metric for row in pick(rows, subject="student", noise=noise)} == own | {"kl", "top1_agreement"}
    kl = {noise: pick(rows, subject="student", noise=noise, metric="kl")[0].value for noise in KINDS}
    assert len(set(kl.values())) == 4  # other text, other figures
    assert min(kl.values()) > 0
    assert teacher.rows == student.rows


def test_classification(tiny_classifier: Path, sentences: list[str], tmp_path: Path) -> None:
    rows_of = tuple((text, index % 3) for index, text in enumerate(sentences[:25]))
    data = LabelledSet("three", ("bad", "fair", "good"), (), rows_of, "0" * 64)
    teacher, student = Counting(tiny_classifier), Counting(cut(tiny_classifier, tmp_path / "cut"))
    rows = measure_robustness(
        {"teacher": teacher, "student": student}, load_tokenizer(tiny_classifier), {"words": sentences[30:]}, [data],
        max_length=32, sizes=SMALL,
    )  # fmt: skip
    noisy = pick(rows, subject="student", data="words", noise="typos")
    assert {row.metric for row in noisy} == {"kl", "top1_agreement", "self_agreement"}
    # first and last of two layers are both: the student is the teacher
    assert pick(rows, subject="student", noise="typos", metric="kl")[0].value == pytest.approx(0, abs=1e-6)
    assert {row.value for row in pick(rows, noise="typos", metric="accuracy")} != set()


def test_same_seed_same_figures(tiny_bert: Path, sentences: list[str]) -> None:
    session = {"teacher": TorchSession(tiny_bert, SessionOptions(1))}
    arguments = {"texts": {"words": sentences}, "max_length": 32, "sizes": SMALL}
    first, second, other = (
        measure_robustness(session, load_tokenizer(tiny_bert), seed=seed, **arguments)
        for seed in (1, 1, 2)  # type: ignore[arg-type]
    )
    assert first == second
    assert first != other


def test_a_teacher_reads_the_ids_of_a_trimmed_student(tiny_llama: Path) -> None:
    session = TorchSession(tiny_llama, SessionOptions(1))
    columns = tuple(range(10, 60))
    teacher = Renumbered(session, columns)
    ids, mask = np.array([[0, 5, 49]]), np.ones((1, 3), np.int64)
    assert teacher.info().vocab_size == 50
    np.testing.assert_array_equal(teacher.forward(ids, mask), session.forward(ids + 10, mask)[..., 10:60])
