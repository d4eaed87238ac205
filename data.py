"""Data sets of a recipe: text and labelled text, split so that no text is on two sides.

The order of a file does not matter: duplicates (by normalised text) are removed, documents are ordered by a hash of
their text and the seed. Tests are dealt first, then dev, calibration and train, over all sets together; so a test is
the same however much is trained on, and no split holds a text of another one, of whichever set. Sentences follow their
document: test sentences come from documents that training never sees.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .data_files import as_label, clean_text, read_rows
from .data_labels import LabelledSet, TaggedSet, join_words, read_words
from .data_stream import Document, StreamedFile, TextStream
from .errors import BadInput
from .fetch import fetch
from .files import hash_json
from .progress import Progress, silent
from .recipe import DataConfig, TaskConfig, TextConfig

__all__ = ["DataSets", "LabelledSet", "Split", "TaggedSet", "TextSet", "load_data", "normalise", "split_sentences"]

_Labelled = dict[str, tuple[Any, Any]]  # normalised text -> (text or its words, label or those of the words)
Split = Literal["train", "calibration", "dev", "test"]
_HELD_OUT: tuple[Split, ...] = ("test", "dev", "calibration")  # in the order in which they are dealt
_SHORTEST, _LONGEST = 20, 300
_RESERVE = 8  # documents of a streamed file that are held for each held-out example, so that some may hold nothing

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
class DataSets:
    """All data of a recipe."""

    text: tuple[TextSet, ...]
    tasks: tuple[LabelledSet, ...]
    tagged: tuple[TaggedSet, ...] = ()
    stream: TextStream | None = None
    """The training text, where it is read while it is learnt from; then no ``text`` holds any."""

    @property
    def sha256(self) -> str:
        """sha256 over the names and hashes of all sets."""
        streamed = [] if self.stream is None else [["", self.stream.sha256]]
        return hash_json([[part.name, part.sha256] for part in (*self.text, *self.labelled)] + streamed)

    @property
    def labelled(self) -> tuple[LabelledSet | TaggedSet, ...]:
        """All that has labels, of texts or of words."""
        return (*self.tasks, *self.tagged)

    def split(self, name: Split) -> list[str]:
        """One split over all texts, set after set."""
        return [text for part in self.text for text in getattr(part, name)]


@dataclass
class _Pool:
    """Documents of a file in the order of their hash: all of the ``total``, or the first of them."""

    path: Path
    documents: list[_Document]
    total: int
    read: Callable[[], Iterator[Document]]
    stamp: tuple[int, int]


@dataclass
class _Document:
    """One document with its pieces (itself, or its sentences): pairs of normalised key and text."""

    key: str
    pieces: list[tuple[str, str]]
    used: str = ""  # by which split


def load_data(
    config: DataConfig,
    *,
    base: Path,
    cache: Path | None = None,
    progress: Progress = silent,
    stream: bool = False,
) -> DataSets:
    """Fetch, read and split all sets of a recipe; ``base`` is the recipe's folder.

    With ``stream`` the training text is not held in memory (:mod:`edgestill.data_stream`): each file is read once here,
    of which only the documents that the other splits may take are kept. These splits are the same either way, but
    where so many documents are empty or taken that a whole file would have to be searched, and where a file of
    sentences holds many texts twice (how much is taken from a document follows their number).

    Raises :class:`BadInput` for unreadable or empty files and when a set holds too few examples for its splits.
    """
    seed = str(config.seed)
    pools: list[_Pool] = []
    digests: list[str] = []
    labelled: list[_Labelled] = []
    parts = len(config.text) + len(config.task)
    for task in config.task:
        progress(f"reading {task.name}", len(labelled) / parts)
        labelled.append((_read_tagged if task.tagged else _read_labelled)(task, base, cache, progress))
    for text in config.text:
        progress(f"reading {text.name}", (len(labelled) + len(pools)) / parts)
        pool, digest = _read_documents(text, base, cache, seed, progress, few=stream)
        pools.append(pool)
        digests.append(digest)
    taken: set[str] = set()  # keys of texts, over all sets, that no further split may hold
    tasks = _deal_tasks(config.task, labelled, seed, taken)
    tagged = tuple(task for task in tasks if isinstance(task, TaggedSet))
    of_texts = tuple(task for task in tasks if isinstance(task, LabelledSet))
    dealt: list[dict[Split, list[str]]] = [{} for _ in config.text]
    for split in _HELD_OUT:
        for text, pool, result in zip(config.text, pools, dealt, strict=True):
            result[split] = _deal_held_out(text, pool, split, seed, taken)
    for text, pool, result in zip(config.text, pools, dealt, strict=True):
        result["train"] = [] if stream else _deal_train(text, pool, seed, taken)
    sets = []
    for text, result in zip(config.text, dealt, strict=True):
        splits = {name: tuple(texts) for name, texts in result.items()}
        sets.append(TextSet(name=text.name, sha256=_digest(splits), **splits))
    progress("data ready", 1.0)
    streamed = _stream(config, pools, digests, taken) if stream else None
    return DataSets(tuple(sets), of_texts, tagged, streamed)


def _stream(config: DataConfig, pools: Sequence[_Pool], digests: Sequence[str], taken: set[str]) -> TextStream | None:
    files, count = [], 0
    for text, pool in zip(config.text, pools, strict=True):
        if text.train:
            if text.unit == "document":  # of sentences nobody knows how many there are
                left = pool.total - sum(1 for document in pool.documents if document.used)
                if left < text.train:
                    raise _too_few(text, pool, "train", left)
            files.append(StreamedFile(pool.path, pool.read, text.train, pool.stamp))
            count += text.train
    facts = [text.model_dump(mode="json", exclude={"source", "sha256"}) for text in config.text]
    sha256 = hash_json([facts, list(digests), sorted(taken), config.seed])
    return TextStream(tuple(files), frozenset(taken), config.seed, count, sha256) if files else None


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


def _read_documents(
    config: TextConfig, base: Path, cache: Path | None, seed: str, progress: Progress, *, few: bool
) -> tuple[_Pool, str]:
    """Documents of a set, each once, in the order of their hash; and, with ``few``, a hash of the whole file.

    ``few``: no more of them are held than the splits which are not streamed may need.
    """
    path = fetch(config.source, sha256=config.sha256, base=base, cache=cache, progress=progress).path
    column = "text" if (config.format or path.suffix.lower().lstrip(".")) == "txt" else config.field

    def texts() -> Iterator[tuple[str, str]]:
        for row in read_rows(path, fields=[column], format=config.format, encoding=config.encoding):
            text = clean_text(row[column], path, column)
            if key := normalise(text):
                yield key, text

    def pieces(key: str, text: str) -> list[tuple[str, str]]:
        if config.unit == "document":
            return [(key, text)]
        return [(normalise(piece), piece) for piece in split_sentences(text)]

    stamp = StreamedFile.stamp_of(path) if path.is_file() else (0, 0)
    digest, total = hashlib.sha256(), 0
    unique: dict[str, str] = {}
    room = _RESERVE * (config.test + config.dev + config.calibration) + _RESERVE if few else None
    last: bytes | None = None  # what ranks behind this is not among the first ones
    for key, text in texts():
        total += 1
        if room is not None:
            digest.update(hash_json(text).encode())
            if last is not None and key not in unique and _rank(seed, key) >= last:
                continue
        if key not in unique or text < unique[key]:  # the least, so that the order does not matter
            unique[key] = text
        if room is not None and len(unique) >= 2 * room:
            first = sorted(unique, key=lambda key: _rank(seed, key))[:room]
            unique, last = {key: unique[key] for key in first}, _rank(seed, first[-1])
    if not unique:
        raise BadInput(f"{config.name}: {path} holds no text", hint=f"is `field = {column!r}` right?")
    documents = [
        _Document(key, pieces(key, unique[key])) for key in sorted(unique, key=lambda key: _rank(seed, key))[:room]
    ]

    def read() -> Iterator[Document]:
        return ((key, pieces(key, text)) for key, text in texts())

    total = total if few else len(documents)
    return _Pool(path, documents, total, read, stamp), digest.hexdigest()


def _rank(seed: str, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=12, key=seed.encode()[:64]).digest()


def _deal_held_out(config: TextConfig, pool: _Pool, split: Split, seed: str, taken: set[str]) -> list[str]:
    """``test``, ``dev`` or ``calibration``: few pieces from each of many documents, which are then used up."""
    asked: int = getattr(config, split)
    held_out = config.test + config.dev + config.calibration
    share = pool.total / 4 if config.train else pool.total
    found: list[str] = []
    per_document = max(1, -(-held_out // max(1, int(share))))
    while len(found) < asked:
        before = len(found)
        for document in pool.documents:
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


def _deal_train(config: TextConfig, pool: _Pool, seed: str, taken: set[str]) -> list[str]:
    """``train``: pieces of the documents that are left, in the order of their own hash."""
    if not config.train:
        return []
    left: dict[str, str] = {}
    for document in pool.documents:
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


def _too_few(config: TextConfig, pool: _Pool, split: str, found: int) -> BadInput:
    unit = "sentences" if config.unit == "sentence" else "documents"
    total = len({key for document in pool.documents for key, _ in document.pieces})
    if pool.total > len(pool.documents):  # only some were kept
        unit, total = "documents", pool.total
    asked = ", ".join(f"{name} {getattr(config, name)}" for name in ("train", "calibration", "dev", "test"))
    return BadInput(
        f"{config.name}: {found} {unit} left for {split}; the set holds {total} different ones, asked for {asked}",
        hint="ask for fewer, or give a larger text",
    )


def _read_labelled(config: TaskConfig, base: Path, cache: Path | None, progress: Progress) -> _Labelled:
    """Normalised text -> (text, label); a text with two different labels is left out."""
    path = fetch(config.source, sha256=config.sha256, base=base, cache=cache, progress=progress).path
    fields = [config.text, config.label, *config.where]

    def pairs() -> Iterator[tuple[str, str, str]]:
        for row in _rows(config, path, fields):
            text, label = clean_text(row[config.text], path, config.text), as_label(row[config.label])
            if label is not None:
                yield normalise(text), text, label

    return _once(config, path, pairs())


def _read_tagged(config: TaskConfig, base: Path, cache: Path | None, progress: Progress) -> _Labelled:
    """Normalised text -> (words, their labels); a sentence that is labelled in two ways is left out."""
    path = fetch(config.source, sha256=config.sha256, base=base, cache=cache, progress=progress).path
    text, tags = config.columns

    def pairs() -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        for row in _rows(config, path, [text, tags, *config.where]):
            words, labels = read_words(row, text, tags, path)
            yield normalise(join_words(words)), words, labels

    return _once(config, path, pairs())


def _rows(config: TaskConfig, path: Path, fields: list[str]) -> Iterator[Mapping[str, Any]]:
    for row in read_rows(path, fields=fields, format=config.format, encoding=config.encoding):
        if all(as_label(row[name]) == value for name, value in config.where.items()):
            yield row


def _once(config: TaskConfig, path: Path, rows: Iterable[tuple[str, Any, Any]]) -> _Labelled:
    """Each text once, without those that have two labels; of equal keys the least, so that no order matters."""
    found: _Labelled = {}
    contradicting = set()
    for key, text, label in rows:
        if not key:
            continue
        if key in found and found[key][1] != label:
            contradicting.add(key)
        if key not in found or text < found[key][0]:
            found[key] = (text, label)
    if not found:
        filters = f" with {config.where}" if config.where else ""
        fields = "`text`, `tags`" if config.tagged else "`text`, `label`"
        raise BadInput(f"{config.name}: {path} holds no labelled text{filters}", hint=f"check {fields}, `where`")
    return {key: pair for key, pair in found.items() if key not in contradicting}


def _deal_tasks(
    configs: Sequence[TaskConfig], pools: Sequence[_Labelled], seed: str, taken: set[str]
) -> list[LabelledSet | TaggedSet]:
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
    sets: list[LabelledSet | TaggedSet] = []
    for config, pool, test in zip(configs, pools, tests, strict=True):
        there = [label for _, label in pool.values()]
        labels = tuple(sorted(set(itertools.chain(*there) if config.tagged else there), key=_label_order))
        if len(labels) < 2:
            raise BadInput(f"{config.name}: only the label {', '.join(labels)}", hint="accuracy needs two labels")
        ranked = [key for key in sorted(pool, key=lambda key: _rank(seed, key)) if key not in taken]
        if len(ranked) < config.train:
            raise BadInput(
                f"{config.name}: {len(ranked)} labelled texts left for train, asked for {config.train}",
                hint="ask for fewer, or give a larger file",
            )
        index = {label: number for number, label in enumerate(labels)}

        def number(label: Any, index: Mapping[str, int] = index, each: bool = config.tagged) -> Any:
            return tuple(index[one] for one in label) if each else index[label]

        rows: dict[str, tuple[Any, ...]] = {
            name: tuple((pool[key][0], number(pool[key][1])) for key in keys)
            for name, keys in (("train", ranked[: config.train]), ("test", test))
        }
        kind = TaggedSet if config.tagged else LabelledSet
        sets.append(kind(config.name, labels, rows["train"], rows["test"], hash_json([list(labels), rows])))
    for config, pool, test in zip(configs, pools, tests, strict=True):
        for key in test:
            text = join_words(pool[key][0]) if config.tagged else pool[key][0]
            taken.update(normalise(sentence) for sentence in split_sentences(text))
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
