"""How the ids of one tokenizer relate to those of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgestill.checkpoints import load_tokenizer
from edgestill.errors import BadInput
from edgestill.vocabularies import compare_vocabularies, merge_pairs, tokenizer_kind, tokenizer_spec


def _changed(tokenizer: Any, change: Any) -> Any:
    spec = tokenizer_spec(tokenizer)
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def _drop(spec: dict[str, Any], token: str) -> None:
    """Take a token that no merge needs out, and give the later ones their new ids."""
    model = spec["model"]
    gone = model["vocab"].pop(token)
    model["vocab"] = {name: index - (index > gone) for name, index in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != token]


def test_equal_tokenizers_are_the_same(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    assert compare_vocabularies(tokenizer, 320, tokenizer, 320).relation == "same"
    found = compare_vocabularies(tokenizer, 384, tokenizer, 320)
    assert (found.relation, found.size, found.columns) == ("padded", 320, None)


def test_fewer_tokens_are_a_subset_with_a_map(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    last = merge_pairs(tokenizer_spec(tokenizer))[-1]
    token = "".join(last)
    student = _changed(tokenizer, lambda spec: _drop(spec, token))
    found = compare_vocabularies(tokenizer, 320, student, 319)
    assert (found.relation, found.size) == ("subset", 319)
    assert found.columns is not None
    assert [tokenizer.convert_ids_to_tokens(index) for index in found.columns] == [
        student.id_to_token(index) for index in range(319)
    ]
    assert token not in student.get_vocab()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normalizers differ"),
        (lambda spec: spec["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda spec: spec["model"]["merges"].reverse(), "other merges"),
        (lambda spec: spec["model"]["vocab"].update(zebra=320), "no token 'zebra'"),
        (lambda spec: spec["model"]["vocab"].update({"Ġ": 400}), "no token for id"),
    ],
)
def test_other_rules_are_different_for_a_reason(tiny_llama: Path, change: Any, reason: str):
    tokenizer = load_tokenizer(tiny_llama)
    found = compare_vocabularies(tokenizer, 500, _changed(tokenizer, change), 500)
    assert found.relation == "different"
    assert reason in found.reason


def test_a_tokenizer_of_another_model_is_refused(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(BadInput, match="student's tokenizer has id 319, its model 100"):
        compare_vocabularies(tokenizer, 320, tokenizer, 100)


def test_kinds_are_recognised(tiny_llama: Path, tiny_bert: Path):
    assert tokenizer_kind(tokenizer_spec(load_tokenizer(tiny_llama))) == "byte-level BPE"
    assert tokenizer_kind(tokenizer_spec(load_tokenizer(tiny_bert))) == "WordPiece"
    assert tokenizer_kind({"model": {"type": "BPE", "byte_fallback": True}}) == "BPE with byte fallback"
    assert tokenizer_kind({"model": {"type": "BPE"}}) == "BPE"
    assert tokenizer_kind({"model": {"type": "Unigram"}}) == "Unigram"
    assert tokenizer_kind({"model": {"type": "WordLevel"}}) is None
    assert merge_pairs({"model": {"merges": ["a b", ["c", "d"]]}}) == [("a", "b"), ("c", "d")]
