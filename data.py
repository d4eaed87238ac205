"""Data sets of a recipe: text and labelled text, split so that no text is on two sides.

The order of a file does not matter: duplicates (by normalised text) are removed, documents are ordered by a hash of
their text and the seed. Tests are dealt first, then dev, calibration and train, over all sets together; so a test is
the same however much is trained on, and no split holds a text of another one, of whichever set. Sentences follow their
document: test sentences come from documents that training never sees.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .data_files import as_label, read_rows
from .errors import BadInput
from .fetch import fetch
from .files import hash_json
from .progress import Progress, silent
from .recipe import DataConfig, TaskConfig, TextConfig

__all__ = ["DataSets", "LabelledSet", "Split", "TextSet", "load_data", "normalise", "split_sentences"]

Split = Literal["train", "calibration", "dev", "test"]
_HELD_OUT: tuple[Split, ...] = ("test", "dev", "calibration")  # in the order in which they are dealt
_SHORTEST, _LONGEST = 20, 300

_BREAK = re.compile(r"<\s*(?:br|/p|/div|/li|/h[1-6])\b[^<>]{0,300}>|\n[ \t\r]*\n", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--.{0,5000}?-->", re.DOTALL)
# Where a sentence may end, in text whose white space is collapsed; "\0" stands for a paragraph's end.
_ENDS = re.compile("[.!?…][\"'”’)\\]]?(?= )|[。！？]|\0")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|etc|e\.g|i\.e|[A-Z])\.$")


@dataclass(frozen=True)
class TextSet:
    """Plain text in four disjoint splits; ``sha256`` covers their content and order."""

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class LabelledSet:
    """Labelled text: pairs of a text and the index of its label in ``labels`` (sorted)."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    sha256: str


@dataclass(frozen=True)
class DataSets:
    """All data of a recipe."""

    text: tuple[TextSet, ...]
    tasks: tuple[LabelledSet, ...]

    @property
    def sha256(self) -> str:
        """sha256 over the names and hashes of all sets."""
        pairs = [[part.name, part.sha256] for part in self.text] + [[part.name, part.sha256] for part in self.tasks]
        return hash_json(pairs)

    def split(self, name: Split) -> list[str]:
        """One split over all texts, set after set."""
        return [text for part in self.text for text in getattr(part, name)]


@dataclass
class _Document:
    """One document with its pieces (itself, or its sentences): pairs of normalised key and text."""

    key: str
    pieces: list[tuple[str, str]]
    used: str = ""  # by which split


def load_data(config: DataConfig, *, base: Path, cache: Path | None = None, progress: Progress = silent) -> DataSets:
    """Fetch, read and split all sets of a recipe; ``base`` is the recipe's folder.

    Raises :class:`BadInput` for unreadable or empty files and when a set holds too few examples for its splits.
    """
    seed = str(config.seed)
    pools: list[list[_Document]] = []
    labelled: list[dict[str, tuple[str, str]]] = []
    parts = len(config.text) + len(config.task)
    for task in config.task:
        progress(f"reading {task.name}", len(labelled) / parts)
        labelled.append(_read_labelled(task, base, cache, progress))
    for text in config.text:
        progress(f"reading {text.name}", (len(labelled) + len(pools)) / parts)
        pools.append(_read_documents(text, base, cache, seed, progress))
    taken: set[str] = set()  # keys of texts, over all sets, that no further split may hold
    tasks = _deal_tasks(config.task, labelled, seed, taken)
    dealt: list[dict[Split, list[str]]] = [{} for _ in config.text]
    for split in _HELD_OUT:
        for text, pool, result in zip(config.text, pools, dealt, strict=True):
            result[split] = _deal_held_out(text, pool, split, seed, taken)
    for text, pool, result in zip(config.text, pools, dealt, strict=True):
        result["train"] = _deal_train(text, pool, seed, taken)
    sets = []
    for text, result in zip(config.text, dealt, strict=True):
        splits = {name: tuple(texts) for name, texts in result.items()}
        sets.append(TextSet(name=text.name, sha256=_digest(splits), **splits))
    progress("data ready", 1.0)
    return DataSets(tuple(sets), tuple(tasks))


def normalise(text: str) -> str:
    """The form by which texts are compared: NFKC, case folded, white space collapsed.

    >>> normalise("  The\\u00a0FILM\\n was ﬁne ")
    'the film was fine'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def split_sentences(document: str) -> list[str]:
    """Sentences of 20–300 characters, HTML tags stripped, entities resolved, white space collapsed.

    >>> split_sentences("<p>Mr. Smith saw a <b>very</b> good film.<br />He liked it so much that he went again!")
    ['Mr. Smith saw a very good film.', 'He liked it so much that he went again!']
    """
    if "<" in document or "\n" in document:
        document = _TAG.sub(" ", _BREAK.sub("\0", document))
    if "&" in document:
        document = html.unescape(document)
    document = " ".join(document.split())
    pieces = []
    start = 0
    for end in _ENDS.finditer(document):
        stop = end.end()
        if document[end.start()] == "." and _ABBREVIATION.search(document, max(start, stop - 7), stop):
            continue
        pieces.append(document[start:stop])
        start = stop
    pieces.append(document[start:])
    stripped = (piece.strip(" \0") for piece in pieces)
    return [piece for piece in stripped if _SHORTEST <= len(piece) <= _LONGEST]


def _clean(value: object, path: Path, name: str) -> str:
    """A cell as text without lone surrogates (which JSON can carry and no encoder takes); "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{path}: field {name!r} holds {type(value).__name__}, not text", hint="choose another field")
    if not value.isascii():
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.replace("\0", " ").strip()


def _read_documents(
    config: TextConfig, base: Path, cache: Path | None, seed: str, progress: Progress
) -> list[_Document]:
    """Documents of a set, each once, in the order of their hash."""
    path = fetch(config.source, sha256=config.sha256, base=base, cache=cache, progress=progress).path
    column = "text" if (config.format or path.suffix.lower().lstrip(".")) == "txt" else config.field
    unique: dict[str, str] = {}
    for row in read_rows(path, fields=[column], format=config.format, encoding=config.encoding):
        text = _clean(row[column], path, column)
        key = normalise(text)
        if key and (key not in unique or text < unique[key]):  # the least, so that the order does not matter
            unique[key] = text
    if not unique:
        raise BadInput(f"{config.name}: {path} holds no text", hint=f"is `field = {column!r}` right?")
    documents = []
    for key in sorted(unique, key=lambda key: _rank(seed, key)):
        pieces = split_sentences(unique[key]) if config.unit == "sentence" else [unique[key]]
        keyed = [(normalise(piece), piece) for piece in pieces] if config.unit == "sentence" else [(key, unique[key])]
        documents.append(_Document(key, keyed))
    return documents


def _rank(seed: str, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=12, key=seed.encode()[:64]).digest()


def _deal_held_out(
    config: TextConfig, pool: Sequence[_Document], split: Split, seed: str, taken: set[str]
) -> list[str]:
    """``test``, ``dev`` or ``calibration``: few pieces from each of many documents, which are then used up."""
    asked: int = getattr(config, split)
    held_out = config.test + config.dev + config.calibration
    share = len(pool) / 4 if config.train else len(pool)
    found: list[str] = []
    per_document = max(1, -(-held_out // max(1, int(share))))
    while len(found) < asked:
        before = len(found)
        for document in pool:
            if document.used != split and (document.used or document.key in taken):
                continue
            picked = 0
            for key, text in sorted(document.pieces, key=lambda piece: _rank(seed, piece[0])):
                if picked < per_document and len(found) < asked and key not in taken:
                    taken.add(key)
                    found.append(text)
                    picked += 1
            if picked:
                document.used = split
                taken.add(document.key)  # so that another set made of the same documents leaves it alone too
        if len(found) == before:
            raise _too_few(config, pool, split, len(found))
        per_document *= 2  # documents held fewer pieces than hoped for: go round again and take more from each
    return found


def _deal_train(config: TextConfig, pool: Iterable[_Document], seed: str, taken: set[str]) -> list[str]:
    """``train``: pieces of the documents that are left, in the order of their own hash."""
    if not config.train:
        return []
    left: dict[str, str] = {}
    for document in pool:
        if document.used or document.key in taken:
            continue
        for key, text in document.pieces:
            if key not in taken and (key not in left or text < left[key]):
                left[key] = text
    if len(left) < config.train:
        raise _too_few(config, pool, "train", len(left))
    chosen = sorted(left, key=lambda key: _rank(seed, key))[: config.train]
    taken.update(chosen)
    return [left[key] for key in chosen]


def _too_few(config: TextConfig, pool: Iterable[_Document], split: str, found: int) -> BadInput:
    unit = "sentences" if config.unit == "sentence" else "documents"
    total = len({key for document in pool for key, _ in document.pieces})
    asked = ", ".join(f"{name} {getattr(config, name)}" for name in ("train", "calibration", "dev", "test"))
    return BadInput(
        f"{config.name}: {found} {unit} left for {split}; the set holds {total} different ones, asked for {asked}",
        hint="ask for fewer, or give a larger text",
    )


def _read_labelled(
    config: TaskConfig, base: Path, cache: Path | None, progress: Progress
) -> dict[str, tuple[str, str]]:
    """Normalised text -> (text, label); a text with two different labels is left out."""
    path = fetch(config.source, sha256=config.sha256, base=base, cache=cache, progress=progress).path
    found: dict[str, tuple[str, str]] = {}
    contradicting = set()
    fields = [config.text, config.label, *config.where]
    for row in read_rows(path, fields=fields, format=config.format, encoding=config.encoding):
        if any(as_label(row[name]) != value for name, value in config.where.items()):
            continue
        text, label = _clean(row[config.text], path, config.text), as_label(row[config.label])
        key = normalise(text)
        if not key or label is None:
            continue
        if key in found and found[key][1] != label:
            contradicting.add(key)
        if key not in found or text < found[key][0]:
            found[key] = (text, label)
    if not found:
        filters = f" with {config.where}" if config.where else ""
        raise BadInput(f"{config.name}: {path} holds no labelled text{filters}", hint="check `text`, `label`, `where`")
    return {key: pair for key, pair in found.items() if key not in contradicting}


def _deal_tasks(
    configs: Sequence[TaskConfig], pools: Sequence[dict[str, tuple[str, str]]], seed: str, taken: set[str]
) -> list[LabelledSet]:
    """Test and train of every task; the tests' texts, and the sentences in them, are kept from all other splits."""
    tests: list[list[str]] = []
    for config, pool in zip(configs, pools, strict=True):
        ranked = [key for key in sorted(pool, key=lambda key: _rank(seed, key)) if key not in taken]
        chosen = ranked[: config.test]
        if len(ranked) < config.test + config.train:
            raise BadInput(
                f"{config.name}: {len(ranked)} labelled texts, asked for test {config.test} and train {config.train}",
                hint="ask for fewer, or give a larger file",
            )
        tests.append(chosen)
        taken.update(chosen)
    sets = []
    for config, pool, test in zip(configs, pools, tests, strict=True):
        labels = tuple(sorted({label for _, label in pool.values()}, key=_label_order))
        if len(labels) < 2:
            raise BadInput(f"{config.name}: only the label {', '.join(labels)}", hint="accuracy needs two labels")
        ranked = [key for key in sorted(pool, key=lambda key: _rank(seed, key)) if key not in taken]
        if len(ranked) < config.train:
            raise BadInput(
                f"{config.name}: {len(ranked)} labelled texts left for train, asked for {config.train}",
                hint="ask for fewer, or give a larger file",
            )
        index = {label: number for number, label in enumerate(labels)}
        rows = {
            "train": tuple((pool[key][0], index[pool[key][1]]) for key in ranked[: config.train]),
            "test": tuple((pool[key][0], index[pool[key][1]]) for key in test),
        }
        sha256 = hash_json([list(labels), rows])
        sets.append(LabelledSet(config.name, labels, rows["train"], rows["test"], sha256))
    for pool, test in zip(pools, tests, strict=True):
        for key in test:
            taken.update(normalise(sentence) for sentence in split_sentences(pool[key][0]))
    return sets


def _label_order(label: str) -> tuple[int, int, str]:
    """Whole numbers by value, before words by alphabet."""
    return (0, int(label), label) if re.fullmatch(r"-?\d{1,18}", label) else (1, 0, label)


def _digest(splits: dict[Split, tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}\n".encode())
        for text in splits[name]:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
