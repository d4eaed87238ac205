"""Likelihoods of continuations against scipy and a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax as reference_log_softmax

from edgestill.errors import BadInput
from edgestill.runtimes import likelihood
from edgestill.runtimes.scoring import score
from edgestill.runtimes.session import SessionInfo

VOCABULARY, LONGEST = 23, 6


class Chain:
    """What follows depends on a token and on how many stand before it."""

    def __init__(self, table: np.ndarray, task: str = "text-generation") -> None:
        self.table = table
        self.shapes: list[tuple[int, ...]] = []
        self._info = SessionInfo("chain", "1", "cpu", task, ("forward",), VOCABULARY, LONGEST)

    def info(self) -> SessionInfo:
        return self._info

    def forward(self, ids, attention_mask):
        self.shapes.append(ids.shape)
        return self.table[np.arange(ids.shape[1]), ids]


def write(folder: Path, rows: list[list[int]], first: list[int], **changed: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "reference.json").write_text(json.dumps({"task": "text-generation", "likelihood": True}))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    arrays = {"ids": ids, "mask": mask, "starts": np.array(first, np.int64), **changed}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.fixture
def question(tmp_path: Path):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(LONGEST, VOCABULARY, VOCABULARY)).astype(np.float32) * 3
    lengths, starts = [7, 3, 4, 2], [5, 1, 2, 1]  # the first row holds one token more than the model takes
    rows = [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]
    rows[1][1] = int(table[0, rows[1][0]].argmax())
    rows[1][2] = int(table[1, rows[1][1]].argmax())
    return table, rows, starts, write(tmp_path / "asked", rows, starts)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_a_plain_loop(question, batch_size, monkeypatch):
    monkeypatch.setattr(likelihood, "REDUCE_VALUES", VOCABULARY)
    table, rows, starts, folder = question
    session = Chain(table)
    got = score(session, folder, batch_size=batch_size)
    wanted = [
        (index, reference_log_softmax(table[at - 1, row[at - 1]].astype(np.float64))[row[at]],
         table[at - 1, row[at - 1]].argmax() == row[at])
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)) for at in range(start, len(row))
    ]  # fmt: skip
    assert got["window"].tolist() == [index for index, _, _ in wanted]
    np.testing.assert_allclose(got["logprob"], [value for _, value, _ in wanted], rtol=1e-12)
    assert got["right"].tolist() == [bool(hit) for _, _, hit in wanted]
    assert got["right"][got["window"] == 1].all()
    assert max(shape[1] for shape in session.shapes) == LONGEST  # the last token is not fed
    assert max(shape[0] for shape in session.shapes) == min(batch_size, 4)


def test_nan_is_never_right(question):
    table, _, _, folder = question
    got = score(Chain(np.full_like(table, np.nan)), folder)
    assert np.isnan(got["logprob"]).all()
    assert not got["right"].any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"starts": np.array([0, 1, 2, 1])}, "no continuation or no context"),
        ({"starts": np.array([5, 3, 2, 1])}, "no continuation or no context"),
        ({"starts": np.array([1, 1])}, "don't fit together"),
        ({"starts": np.array([5, 1, 2, 1], np.int32)}, "int64"),
        ({"ids": np.full((4, 7), VOCABULARY)}, "the vocabulary has 23"),
    ],
)  # fmt: skip
def test_a_question_that_does_not_fit_is_refused(question, tmp_path, change, says):
    table, rows, starts, _ = question
    with pytest.raises(BadInput, match=says):
        score(Chain(table), write(tmp_path / "bad", rows, starts, **change))


def test_a_last_token_outside_the_vocabulary_is_refused(question, tmp_path):
    table, rows, starts, _ = question
    with pytest.raises(BadInput, match="vocabulary"):
        score(Chain(table), write(tmp_path / "bad", [*rows[:3], [1, -1]], starts))


def test_only_text_generation_and_whole_folders(question):
    table, _, _, folder = question
    with pytest.raises(BadInput, match="text-classification"):
        score(Chain(table, "text-classification"), folder)
    (folder / "starts.npy").unlink()
    with pytest.raises(BadInput, match=r"starts\.npy does not exist"):
        score(Chain(table), folder)
