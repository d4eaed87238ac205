"""Scores against scipy and plain double loops."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from edgestill.errors import BadInput
from edgestill.runtimes import scoring
from edgestill.runtimes.scoring import kl_divergence, score
from edgestill.runtimes.session import SessionInfo

VOCABULARY = 23


class Table:
    """A session that looks its outputs up by the first token of a row, so that batching can't matter."""

    def __init__(self, task: str, rows: np.ndarray, vocabulary: int = VOCABULARY, max_length: int = 64) -> None:
        self.rows = rows
        self.shapes: list[tuple[int, ...]] = []
        self._info = SessionInfo("table", "1", "cpu", task, ("forward",), vocabulary, max_length)

    def info(self) -> SessionInfo:
        return self._info

    def forward(self, ids, attention_mask):
        self.shapes.append(ids.shape)
        rows = self.rows[ids[:, 0]]
        return rows[:, : ids.shape[1]] if rows.ndim == 3 else rows


def write(folder: Path, task: str, said: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "reference.json").write_text(json.dumps({"task": task, "windows": len(ids)}))
    np.save(folder / "ids.npy", ids)
    np.save(folder / "mask.npy", mask)
    np.save(folder / ("embeddings.npy" if task == "feature-extraction" else "logits.npy"), said.astype(np.float32))
    return folder


@pytest.fixture
def tokens(tmp_path: Path):
    """Five windows of different lengths: (reference folder, what it says, what the session says, ids, lengths)."""
    rng = np.random.default_rng(0)
    lengths = [7, 3, 9, 2, 5]
    said = rng.normal(size=(5, 9, VOCABULARY)).astype(np.float32) * 3
    got = said + rng.normal(size=said.shape).astype(np.float32)
    ids = rng.integers(0, VOCABULARY, (5, 9))
    ids[:, 0] = range(5)
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int64)
    return write(tmp_path / "ref", "text-generation", said, ids, mask), said, got, ids, lengths


def test_tokens_equal_a_double_loop_over_scipy(tokens):
    folder, said, got, ids, lengths = tokens
    result = score(Table("text-generation", got), folder, batch_size=2)
    wanted: dict[str, list] = {
        name: [] for name in ("kl", "top1", "top5", "logprob", "reference_logprob", "confidence", "right", "window")
    }
    for window, length in enumerate(lengths):
        for place in range(length - 1):
            p = softmax(said[window, place].astype(np.float64))
            q = softmax(got[window, place].astype(np.float64))
            wanted["kl"].append(rel_entr(p, q).sum())
            wanted["top1"].append(p.argmax() == q.argmax())
            wanted["top5"].append(p.argmax() in np.argsort(-q)[:5])
            wanted["logprob"].append(math.log(q[ids[window, place + 1]]))
            wanted["reference_logprob"].append(math.log(p[ids[window, place + 1]]))
            wanted["confidence"].append(max(q))
            wanted["right"].append(q.argmax() == ids[window, place + 1])
            wanted["window"].append(window)
    assert set(result) == set(wanted)
    for name in ("kl", "logprob", "reference_logprob", "confidence"):
        assert result[name].dtype == np.float64
        np.testing.assert_allclose(result[name], wanted[name], rtol=1e-10, atol=1e-12)
    for name in ("top1", "top5", "right", "window"):
        np.testing.assert_array_equal(result[name], wanted[name])
    assert 0 < result["top1"].mean() < result["top5"].mean() <= 1  # the sample tells them apart


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batching_and_chunking_change_nothing(tokens, batch_size, monkeypatch):
    folder, _, got, _, _ = tokens
    whole = score(Table("text-generation", got), folder)
    monkeypatch.setattr(scoring, "_REDUCE_VALUES", 2 * VOCABULARY)
    monkeypatch.setattr(scoring, "_FORWARD_VALUES", 9 * VOCABULARY * 2)
    session = Table("text-generation", got)
    parts = score(session, folder, batch_size=batch_size)
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])
    assert max(rows for rows, _ in session.shapes) <= min(batch_size, 2)
    if batch_size == 1:
        assert [length for _, length in session.shapes] == [7, 3, 9, 2, 5]  # padding is not computed


def test_a_session_that_says_the_same_scores_zero(tokens):
    folder, said, _, _, _ = tokens
    result = score(Table("text-generation", said), folder)
    assert np.all(result["kl"] == 0)
    assert result["top1"].all()
    np.testing.assert_array_equal(result["logprob"], result["reference_logprob"])


def test_small_divergences_do_not_drown_in_rounding():
    """KL of a tiny shift d of one logit is p(1-p)d²/2 to second order; float32 reduction would lose it."""
    logits = np.linspace(-8, 8, 50_000, dtype=np.float32)[None]
    other = logits.astype(np.float64)
    other[0, -1] += 1e-3
    p = softmax(logits.astype(np.float64)[0])[-1]
    got = kl_divergence(logits, other)
    np.testing.assert_allclose(got, p * (1 - p) * 1e-6 / 2, rtol=1e-3)


def test_excluded_tokens_cost_nothing_and_impossible_ones_everything():
    infinite = np.array([[0.0, 1.0, -np.inf]], np.float32)
    finite = np.array([[0.0, 1.0, 2.0]], np.float32)
    p, q = softmax([0.0, 1.0]), softmax([0.0, 1.0, 2.0])[:2]
    np.testing.assert_allclose(kl_divergence(infinite, finite), rel_entr(p, q).sum())
    assert kl_divergence(infinite, infinite) == 0
    assert np.isposinf(kl_divergence(finite, infinite))


def test_nan_is_neither_hidden_nor_contagious(tokens):
    folder, _, got, _, lengths = tokens
    broken = got.copy()
    broken[2, 4, 7] = np.nan
    result, clean = (score(Table("text-generation", values), folder) for values in (broken, got))
    place = sum(length - 1 for length in lengths[:2]) + 4
    assert np.isnan(result["kl"][place])
    assert not result["top1"][place]
    assert not result["top5"][place]
    assert not result["right"][place]
    assert np.isnan(result["confidence"][place])
    keep = np.arange(len(result["kl"])) != place
    np.testing.assert_array_equal(result["kl"][keep], clean["kl"][keep])


def test_ties_rank_by_lowest_id():
    flat = np.zeros((1, 10), np.float32)
    assert [int(scoring._rank(flat, np.array([[i]]))[0]) for i in range(10)] == list(range(10))


def test_classification(tmp_path):
    rng = np.random.default_rng(1)
    said, got = rng.normal(size=(2, 11, 3)).astype(np.float32)
    ids = np.tile(np.arange(11)[:, None], (1, 4))
    folder = write(tmp_path / "ref", "text-classification", said, ids, np.ones_like(ids))
    result = score(Table("text-classification", got), folder, batch_size=4)
    wanted = [
        rel_entr(softmax(a.astype(float)), softmax(b.astype(float))).sum() for a, b in zip(said, got, strict=True)
    ]
    np.testing.assert_allclose(result["kl"], wanted, rtol=1e-9)
    np.testing.assert_array_equal(result["top1"], said.argmax(1) == got.argmax(1))
    np.testing.assert_array_equal(result["logits"], got)


def test_labels_of_tokens(tmp_path):
    """Real tokens only, row by row, however the batches are cut; padding may hold anything."""
    rng = np.random.default_rng(3)
    said, got = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    ids = np.tile(np.arange(3)[:, None], (1, 5))
    mask = (np.arange(5) < np.array([[2], [5], [3]])).astype(np.int64)
    folder = write(tmp_path / "ref", "token-classification", said, ids, mask)
    said[0, 2:] = got[0, 2:] = np.nan
    for size in (1, 2, 8):
        result = score(Table("token-classification", got), folder, batch_size=size)
        places = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (2, 2)]
        wanted = [
            rel_entr(softmax(said[place].astype(float)), softmax(got[place].astype(float))).sum() for place in places
        ]
        np.testing.assert_allclose(result["kl"], wanted, rtol=1e-9)
        assert result["window"].tolist() == [row for row, _ in places]
        assert result["top1"].tolist() == [said[place].argmax() == got[place].argmax() for place in places]
        np.testing.assert_array_equal(result["logits"], np.stack([got[place] for place in places]))


def test_embeddings(tmp_path):
    rng = np.random.default_rng(2)
    said, got = rng.normal(size=(2, 5, 6)).astype(np.float32)
    got[3] = 0  # a vector without a direction agrees with nothing
    ids = np.tile(np.arange(5)[:, None], (1, 2))
    folder = write(tmp_path / "ref", "feature-extraction", said, ids, np.ones_like(ids))
    result = score(Table("feature-extraction", got), folder, batch_size=2)
    for row in range(5):
        norms = math.sqrt(sum(x * x for x in said[row].tolist())) * math.sqrt(sum(x * x for x in got[row].tolist()))
        dot = sum(x * y for x, y in zip(said[row].tolist(), got[row].tolist(), strict=True))
        assert result["cosine"][row] == pytest.approx(dot / norms if norms else 0, abs=1e-12)
    np.testing.assert_array_equal(result["embeddings"], got)


def test_memory_follows_a_batch_not_the_reference(tmp_path):
    vocabulary, windows, length = 4096, 48, 32  # 25 MB of logits
    rng = np.random.default_rng(3)
    said = rng.normal(size=(windows, length, vocabulary)).astype(np.float32)
    ids = np.zeros((windows, length), np.int64)
    folder = write(tmp_path / "ref", "text-generation", said, ids, np.ones_like(ids))
    session = Table("text-generation", said[:1], vocabulary)
    total = said.nbytes
    del said
    tracemalloc.start()
    score(session, folder, batch_size=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "logits.npy").unlink(), "does not exist"),
        (lambda f: (f / "ids.npy").write_bytes(b"\x93NUMPY junk"), "not a numpy array"),
        (lambda f: np.save(f / "ids.npy", np.array([{}], dtype=object)), "not a numpy array"),
        (lambda f: np.save(f / "mask.npy", np.ones((5, 8), np.int64)), "shapes"),
        (lambda f: np.save(f / "logits.npy", np.ones((5, 8, VOCABULARY), np.float32)), "shapes"),
        (lambda f: np.save(f / "logits.npy", np.ones((5, 9, VOCABULARY))), "float64"),
        (lambda f: np.save(f / "logits.npy", np.ones((5, 9, 7), np.float32)), "the reference has"),
        (lambda f: np.save(f / "ids.npy", np.full((5, 9), VOCABULARY)), "vocabulary"),
        (lambda f: np.save(f / "mask.npy", np.eye(5, 9, dtype=np.int64)), "mask"),
        (lambda f: (f / "reference.json").write_text('{"task": "translation"}'), "translation"),
        (lambda f: (f / "reference.json").write_text('{"task": "feature-extraction"}'), "does not exist"),
        (lambda f: (f / "reference.json").write_text("[]"), "unknown task"),
    ],
)
def test_a_bad_reference_is_one_clear_error(tokens, spoil, message):
    folder, _, got, _, _ = tokens
    spoil(folder)
    with pytest.raises(BadInput, match=message):
        score(Table("text-generation", got), folder)


def test_a_reference_of_another_task_or_a_batch_of_nothing_is_refused(tokens):
    folder, _, got, _, _ = tokens
    with pytest.raises(BadInput, match="text-generation, the model does feature-extraction"):
        score(Table("feature-extraction", got), folder)
    with pytest.raises(BadInput, match="batch size 0"):
        score(Table("text-generation", got), folder, batch_size=0)
    with pytest.raises(BadInput, match="9 tokens, the model takes 8"):
        score(Table("text-generation", got, max_length=8), folder)
