"""Entities and their F1, against the rules of the CoNLL-2003 scorer written out a second time."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.bench.tagging import entities, f1_estimate
from edgestill.bench.tasks import make_task_reference, task_estimates
from edgestill.data import LabelledSet, TaggedSet
from edgestill.errors import RecipeError
from edgestill.runtimes.scoring import open_reference

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER")


def _by_states(tags):
    """The scorer's two questions for each pair of neighbours: does a chunk end here, does one begin?"""
    found, begin = set(), None
    before, kind_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        ended = before in "BIES" and before != "O" and (
            before in "ES" or mark in ("B", "S", "O") or kind != kind_before)  # fmt: skip
        if ended:
            found.add((kind_before, begin, place - 1))
        if mark in ("B", "S") or (mark in ("I", "E") and (before in ("O", "E", "S") or kind != kind_before)):
            begin = place
        before, kind_before = mark, kind
    return found


def test_entities_are_those_of_the_scorer():
    rng = np.random.default_rng(0)
    for _ in range(500):
        tags = [LABELS[n] for n in rng.integers(len(LABELS), size=int(rng.integers(1, 9)))]
        assert entities(tags) == _by_states(tags), tags


def test_f1_by_hand():
    # two sentences: PER at 0-1 and LOC at 3; PER at 0. Found: PER 0-1, LOC 3 as PER; PER at 0 and LOC at 1.
    true = [1, 2, 0, 3, 1, 0]
    said = [1, 2, 0, 1, 1, 3]
    estimate = f1_estimate(said, true, np.array([0, 0, 0, 0, 1, 1]), LABELS)
    assert estimate.summary.value == pytest.approx(2 * 2 / (4 + 3))
    assert estimate.protocol["precision"] == pytest.approx(2 / 4)
    assert estimate.protocol["recall"] == pytest.approx(2 / 3)
    assert estimate.summary.low <= estimate.summary.value <= estimate.summary.high
    assert f1_estimate([1], [0], np.array([0]), LABELS) is None


def _tagged(sentences):
    rows = tuple((tuple(text.split()), tuple(int(w in ("film", "movie")) for w in text.split())) for text in sentences)
    return TaggedSet("people", ("O", "B-PER"), (), rows, "0" * 64)


def test_words_are_judged_on_their_first_tokens(tiny_tagger, sentences, tmp_path):
    data = _tagged(sentences[:40])
    reference = make_task_reference(tiny_tagger, tmp_path / "r", data, max_length=32, threads=1)
    opened = open_reference(reference)
    mask = np.asarray(opened.mask) == 1
    said = np.asarray(opened.said)
    f1, accuracy, ratio, ece = task_estimates(said[mask], reference, teacher_outputs=said)
    assert [e.metric for e in (f1, accuracy, ratio, ece)] == ["f1", "accuracy", "accuracy_ratio", "ece"]
    right = words = 0
    for row, (text, labels) in enumerate(data.test):
        # every word of the fixture is one token, behind [CLS]
        choice = said[row, 1 : 1 + len(text)].argmax(-1)
        right += int((choice == np.asarray(labels)).sum())
        words += len(text)
    assert accuracy.summary.value == pytest.approx(right / words)
    assert (accuracy.summary.n, accuracy.protocol["words_without_token"]) == (words, 0)
    assert ratio.summary.value == 1
    perfect = np.zeros((int(mask.sum()), 3), np.float32)
    place = 0
    for _, labels in data.test:
        for label in (0, *labels, 0):
            perfect[place, label] = 9
            place += 1
    assert [e.summary.value for e in task_estimates(perfect, reference)[:2]] == [1, 1]


def test_a_set_of_the_other_kind_is_refused(tiny_tagger, tiny_classifier, sentences, tmp_path):
    texts = LabelledSet("mood", ("bad", "good"), (), (("a film", 1),), "0" * 64)
    with pytest.raises(RecipeError, match=r"mood labels whole texts, and .* labels words") as error:
        make_task_reference(tiny_tagger, tmp_path / "r", texts)
    assert "tags" in error.value.hint
    with pytest.raises(RecipeError, match=r"people labels words, and .* does not"):
        make_task_reference(tiny_classifier, tmp_path / "r", _tagged(sentences))


def test_a_classifiers_labels_are_found_by_name(tiny_classifier, sentences, tmp_path):
    """The set's labels in alphabetical order are not the model's numbers: here good is 1, and the model's 2."""
    rows = tuple((text, n % 2) for n, text in enumerate(sentences[:20]))
    data = LabelledSet("two", ("fair", "good"), (), rows, "0" * 64)
    reference = make_task_reference(tiny_classifier, tmp_path / "r", data, threads=1)
    said = np.asarray(open_reference(reference).said)
    expected = np.mean([said[n].argmax() == 1 + label for n, (_, label) in enumerate(rows)])
    assert task_estimates(said, reference)[0].summary.value == pytest.approx(expected)
