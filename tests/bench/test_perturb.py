"""Noise in text: how much of it, of which kind, and always the same."""

from __future__ import annotations

import pytest

from edgestill.bench.perturb import PERTURBATIONS, perturb
from edgestill.errors import UsageError

TEXT = "the quick brown fox jumps over some really lazy dogs and never looks back again " * 40


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_same_text_and_seed_same_noise(kind: str) -> None:
    assert perturb(TEXT, kind, 1) == perturb(TEXT, kind, 1)
    several = {perturb(TEXT, kind, seed) for seed in range(12)}
    assert len(several) > 1
    assert any(noisy != TEXT for noisy in several)


def test_typos_change_some_words_by_one_edit_each() -> None:
    words, noisy = TEXT.split(), perturb(TEXT, "typos").split()
    assert len(words) == len(noisy)
    changed = [(a, b) for a, b in zip(words, noisy, strict=True) if a != b]
    long = [word for word in words if len(word) >= 4]
    assert 0.10 < len(changed) / len(long) < 0.20
    for before, after in changed:
        assert len(before) >= 4
        assert before[0] == after[0]
        assert abs(len(before) - len(after)) <= 1
        # equal after taking at most two letters out of the middle: one edit, or a swap
        start = next(i for i in range(len(before)) if i >= len(after) or before[i] != after[i])
        assert before[start + 2 :] in (after[start + 2 :], after[start + 1 :], after[start + 3 :])
    assert len({len(b) - len(a) for a, b in changed}) == 3  # lost, as long, doubled


def test_case_changes_only_case() -> None:
    seen = {perturb(TEXT, "case", seed) for seed in range(20)}
    assert seen == {TEXT.upper(), TEXT, TEXT.title()}


def test_whitespace_changes_only_whitespace() -> None:
    noisy = perturb(TEXT, "whitespace")
    assert noisy.split() != TEXT.split()  # some spaces are lost
    assert "".join(noisy.split()) == "".join(TEXT.split())
    assert "\t" in noisy
    assert "\n" in noisy


def test_other_letters_and_nothing_are_no_problem() -> None:
    for text in ("", " ", "à", "ein Straßenfest größer", "日本語のテキスト", "a1b2 123456"):
        for kind in PERTURBATIONS:
            assert isinstance(perturb(text, kind, 3), str)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        perturb("x", "typo")
    assert "typos" in caught.value.hint
