"""A task of one's own: a file of JSON lines, one example a line, one kind a file; what all kinds have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import BadInput, MissingDependency
from ..progress import Progress, silent
from .fidelity import Estimate

__all__ = ["TaskFile", "checked", "first_fields", "load_tokenizer_file", "read_examples"]

_MOST_BYTES = 256 << 20
Example = TypeVar("Example")


class TaskFile(Protocol):
    """A file of examples: :class:`edgestill.bench.completions.CompletionSet`,
    :class:`edgestill.bench.labelled.LabelledTexts` or :class:`edgestill.bench.labelled.ScoredPairs`."""

    @property
    def name(self) -> str:
        """Of the file, without its ending."""

    @property
    def headline(self) -> str:
        """The metric that stands for all where there is no answer."""

    def ask(self, worker: Any, folder: Path, *, batch_size: int = 8, progress: Progress = silent) -> Any:
        """What the model of ``folder`` answers, through its ``worker``; :class:`BadInput` for a model of another
        task."""

    def estimates(self, answers: Any, *, teacher: Any | None = None, seed: int = 0) -> list[Estimate]:
        """What these answers are worth; with a teacher's, also compared with those."""


def read_examples(path: Path, parse: Callable[[Any], Example], hint: str) -> tuple[list[Example], str]:
    """Every line of ``path`` as ``parse`` reads its JSON value, and the sha256 of the file.

    A :class:`ValueError` of ``parse`` becomes a :class:`BadInput` that names the line, with ``hint``; so does a file
    that is missing, too large, no UTF-8, or holds nothing.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist", hint="pass a JSON-lines file: see docs/accuracy.md")
    if path.stat().st_size > _MOST_BYTES:
        raise BadInput(f"{path} has {path.stat().st_size} bytes", hint="a file of examples has at most 256 MB")
    data = path.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")  # and not where a string holds U+2028
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8", hint="save it as UTF-8") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(parse(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{number}: {error}", hint=hint) from None
    if not examples:
        raise BadInput(f"{path} has no example", hint="a line of JSON for each example: see docs/accuracy.md")
    return examples, hashlib.sha256(data).hexdigest()


def first_fields(path: Path) -> frozenset[str]:
    """The fields of the first example: they tell of which kind a file is. Empty where they can't be told; then
    whoever reads the file says why."""
    try:
        with path.open(encoding="utf-8") as stream:
            line = next((line for line in stream if line.strip()), "")
        raw = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return frozenset()
    return frozenset(raw) if isinstance(raw, dict) else frozenset()


def checked(raw: Any, known: Sequence[str]) -> dict[str, Any]:
    """``raw``, if it is an object with no other fields than the ``known``."""
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    if unknown := set(raw) - set(known):
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    return raw


def load_tokenizer_file(folder: Path) -> Any:
    """The ``tokenizer.json`` that lies in an artifact or model folder."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingDependency.package("tokenizers", "distill") from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no tokenizer.json", hint="pass an artifact folder or a prepared model folder")
    return Tokenizer.from_file(str(path))
