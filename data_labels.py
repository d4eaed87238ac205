"""Labelled sets: a label for a whole text, or one for each word of it, and what they are to a model.

Words come in files as the data set cut them, tokens come from a model's tokenizer. The words of a sentence are joined
with single spaces (the model reads plain text on a device, too), and the first token that ends in a word carries its
label, as in Devlin et al. (arXiv 1810.04805, 5.3); all others carry none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .data_files import as_label, clean_text
from .errors import BadInput, RecipeError

__all__ = [
    "NO_LABEL", "AnyLabelledSet", "LabelledSet", "TaggedSet", "Words", "in_labels_of", "join_words", "label_places",
    "read_words", "tag_tokens",
]  # fmt: skip

NO_LABEL = -100
"""What a token or a text has that is not labelled."""

Words = tuple[tuple[str, ...], tuple[int, ...]]
"""The words of a sentence, and the index of each one's label."""


@dataclass(frozen=True)
class LabelledSet:
    """Labelled text: pairs of a text and the index of its label in ``labels`` (sorted)."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    sha256: str


@dataclass(frozen=True)
class TaggedSet:
    """Labelled words: sentences with the index of each word's label in ``labels`` (sorted)."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Words, ...]
    test: tuple[Words, ...]
    sha256: str


def read_words(row: Mapping[str, Any], text: str, tags: str, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and labels of one row of a file; both empty for a row without words. Raises :class:`BadInput`."""
    words, labels = row[text], row[tags]
    for name, value in ((text, words), (tags, labels)):
        if not isinstance(value, list | tuple):
            raise BadInput(
                f"{path}: field {name!r} holds {type(value).__name__}, not a list with an entry for each word",
                hint="`text` names the list of words and `tags` that of their labels",
            )
    cleaned = tuple(" ".join(clean_text(word, path, text).split()) for word in words)
    known = [as_label(label) for label in labels]
    shown = " ".join(cleaned)[:60]
    if len(cleaned) != len(known):
        raise BadInput(f"{path}: {len(known)} labels for the {len(cleaned)} words of {shown!r}", hint="one for each")
    for word, label in zip(cleaned, known, strict=True):
        if not word or label is None:
            raise BadInput(
                f"{path}: {'an empty word' if not word else f'no label for {word!r}'} in {shown!r}",
                hint="give each word a label; what is not of a kind usually has O",
            )
    return cleaned, tuple(str(label) for label in known)


def join_words(words: Sequence[str]) -> str:
    """The text that a model reads."""
    return " ".join(words)


def label_places(labels: Sequence[str], of_model: Sequence[str]) -> tuple[int, ...] | None:
    """Where each of ``labels`` stands among the model's: by name, or as the number that it is; else ``None``.

    >>> label_places(["I-PER", "O"], ["O", "B-PER", "I-PER"]), label_places(["0", "2"], ["O", "B-PER", "I-PER"])
    ((2, 0), (0, 2))
    """
    names = {name: place for place, name in enumerate(of_model)}
    if all(label in names for label in labels):
        return tuple(names[label] for label in labels)
    if all(label.isascii() and label.isdigit() and int(label) < len(of_model) for label in labels):
        return tuple(int(label) for label in labels)
    return None


AnyLabelledSet = TypeVar("AnyLabelledSet", LabelledSet, TaggedSet)


def in_labels_of(data: AnyLabelledSet, of_model: Sequence[str]) -> AnyLabelledSet:
    """``data`` with the model's labels, in its order; :class:`RecipeError` naming those that it does not have."""
    places = label_places(data.labels, of_model)
    if places is None:
        unknown = [label for label in data.labels if label not in of_model]
        raise RecipeError(
            f"[[data.task]] {data.name} has the labels {', '.join(unknown[:8])}, which the model does not know",
            hint=f"it knows {', '.join(of_model[:20])}; name them so, or number them from 0 in this order",
        )

    def number(label: Any) -> Any:
        return places[label] if isinstance(label, int) else tuple(places[one] for one in label)

    moved: dict[str, Any] = {
        split: tuple((text, number(label)) for text, label in rows)
        for split, rows in (("train", data.train), ("test", data.test))
    }
    return dataclasses.replace(data, labels=tuple(of_model), **moved)


def tag_tokens(tokenizer: Any, sentences: Sequence[Words], max_length: int, prefix: str = "") -> list[tuple[int, ...]]:
    """A label for each token of each sentence, cut at ``max_length`` as a plain text is; :data:`NO_LABEL` for most.

    A word behind the cut, or one that the tokenizer drops, has no token, so its label is in no row. Raises
    :class:`BadInput` for a tokenizer that does not say where a token begins.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput("the tokenizer does not say where a token begins in its text", hint="it needs a tokenizer.json")
    found = []
    for begin in range(0, len(sentences), 1024):
        part = sentences[begin : begin + 1024]
        texts = [prefix + join_words(words) for words, _ in part]
        spans = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False)
        for (words, labels), offsets in zip(part, spans["offset_mapping"], strict=True):
            found.append(_of_tokens(words, labels, offsets, len(prefix)))
    return found


def _of_tokens(
    words: Sequence[str], labels: Sequence[int], offsets: Sequence[tuple[int, int]], start: int
) -> tuple[int, ...]:
    row, word, done = [], 0, False
    stop = start + len(words[0]) if words else start
    for begin, end in offsets:
        # A byte-level token holds the space before its word, so where it ends says which word it is of.
        while word < len(words) and end > stop:
            word, done = word + 1, False
            start = stop + 1
            stop = start + len(words[word]) if word < len(words) else stop
        if done or word == len(words) or begin == end or end <= start:
            row.append(NO_LABEL)
            continue
        row.append(labels[word])
        done = True
    return tuple(row)
