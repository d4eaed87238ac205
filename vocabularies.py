"""Do two tokenizers mean the same by an id? And if not: is one a part of the other?

Needs neither torch nor transformers: tokenizers are asked for their ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import BadInput

__all__ = [
    "Kind",
    "Relation",
    "Vocabularies",
    "compare_vocabularies",
    "merge_pairs",
    "tokenizer_kind",
    "tokenizer_spec",
]

Relation = Literal["same", "padded", "subset", "different"]
Kind = Literal["byte-level BPE", "BPE with byte fallback", "BPE", "WordPiece", "Unigram"]

# What decides how a text becomes pieces and what a piece stands for, beside the vocabulary itself.
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_MODEL_KEYS = (
    "type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges",
    "fuse_unk",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabularies:
    """How a student's ids relate to a teacher's.

    ``same``: equal ids, equal rows. ``padded``: equal ids, but embedding matrices of other heights; only the first
    ``size`` rows mean anything (Qwen2.5: 151,936 or 152,064 rows for 151,665 tokens). ``subset``: each student token
    is a teacher token; ``columns[i]`` is the teacher's id of student id ``i``. ``different``: ``reason`` says why.
    ``size`` is the number of ids that both sides share, in the student's numbering.
    """

    relation: Relation
    size: int
    columns: tuple[int, ...] | None = None
    reason: str = ""


def tokenizer_spec(tokenizer: Any) -> dict[str, Any]:
    """The content of ``tokenizer.json`` of a fast Transformers tokenizer (or of one of the tokenizers library)."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec


def tokenizer_kind(spec: Mapping[str, Any]) -> Kind | None:
    """Which family a ``tokenizer.json`` belongs to; ``None`` for one that we don't know (``WordLevel``, …)."""
    model = spec["model"]
    if model["type"] == "BPE":
        if model.get("byte_fallback"):
            return "BPE with byte fallback"
        return "byte-level BPE" if '"ByteLevel"' in json.dumps([spec.get(part) for part in _PARTS[:2]]) else "BPE"
    kinds: dict[str, Kind] = {"WordPiece": "WordPiece", "Unigram": "Unigram"}
    return kinds.get(model["type"])


def merge_pairs(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE ``tokenizer.json``, lowest rank first; both spellings of the format are read."""
    split = (item.split(" ") if isinstance(item, str) else item for item in spec["model"]["merges"])
    return [(first, second) for first, second in split]


def compare_vocabularies(teacher: Any, teacher_rows: int, student: Any, student_rows: int) -> Vocabularies:
    """How the ids of tokenizer ``student`` relate to those of ``teacher``; ``rows`` are those of their embeddings.

    Equal texts must give equal pieces for ``same`` and ``padded``; for ``subset`` a text may fall into other pieces,
    but each piece is one of the teacher's and stands for the same characters. Raises :class:`BadInput` when a
    tokenizer has ids that its own model has no row for.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    for name, vocabulary, rows in (("teacher", theirs, teacher_rows), ("student", ours, student_rows)):
        if vocabulary and max(vocabulary.values()) >= rows:
            raise BadInput(
                f"the {name}'s tokenizer has id {max(vocabulary.values())}, its model {rows} tokens",
                hint="tokenizer and weights are not of the same model",
            )
    size = max(ours.values(), default=-1) + 1
    their_spec, our_spec = tokenizer_spec(teacher), tokenizer_spec(student)
    for part in _PARTS:
        if their_spec.get(part) != our_spec.get(part):
            return Vocabularies("different", 0, reason=f"their {part.replace('_', '-')}s differ")
    for key in _MODEL_KEYS:
        if their_spec["model"].get(key) != our_spec["model"].get(key):
            return Vocabularies("different", 0, reason=f"their tokenizer models differ in {key}")
    foreign = next((token for token in ours if token not in theirs), None)
    if foreign is not None:
        return Vocabularies("different", 0, reason=f"the teacher has no token {foreign!r}")
    if ours == theirs:
        if _pieces(their_spec) != _pieces(our_spec):
            return Vocabularies("different", 0, reason="equal tokens, but other merges or scores")
        return Vocabularies("same" if teacher_rows == student_rows else "padded", size)
    by_id = {index: token for token, index in ours.items()}
    if len(by_id) != size:
        gap = next(index for index in range(size) if index not in by_id)
        return Vocabularies("different", 0, reason=f"the student's tokenizer has no token for id {gap}")
    return Vocabularies("subset", size, tuple(theirs[by_id[index]] for index in range(size)))


def _pieces(spec: Mapping[str, Any]) -> Any:
    model = spec["model"]
    return merge_pairs(spec) if model["type"] == "BPE" else model["vocab"]
