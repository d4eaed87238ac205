"""Reading rows of text from jsonl, csv, parquet, txt and CoNLL files, with errors that name the place."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BadInput, MissingDependency, nearest

__all__ = ["FORMATS", "as_label", "clean_text", "read_rows"]

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "txt",
           ".conll": "conll"}  # fmt: skip
_MOST_CELL_CHARACTERS = 1 << 28  # csv's own limit, 128 KiB, is less than a long document


def read_rows(
    path: Path, *, fields: Iterable[str], format: str | None = None, encoding: str = "utf-8"
) -> Iterator[Mapping[str, Any]]:
    """The rows of a file as ``{field: value}`` with at least ``fields``; a txt row is ``{"text": line}``.

    A CoNLL row is ``{"words": […], "tags": […]}``: the first and the last column of the lines up to an empty one
    (``-DOCSTART-`` lines are skipped).

    Blank lines are skipped. Raises :class:`BadInput` for a missing or damaged file, text in another encoding (naming
    the byte) and a missing field (naming those there are).
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadInput(f"{path} {what}", hint="name one file of text")
    kind = format or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise BadInput(f"{path}: unknown kind of file {path.suffix!r}", hint=f"set `format`: {_kinds()}")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise BadInput(f"unknown encoding {encoding!r} for {path}", hint='for example "utf-8" or "latin-1"') from None
    wanted = tuple(dict.fromkeys(fields))
    if kind == "parquet":
        yield from _parquet(path, wanted)
    elif kind == "txt":
        with _text(path, encoding) as lines:
            yield from ({"text": line.strip()} for line in lines if line.strip())
    else:
        read = {"jsonl": _jsonl, "csv": _csv, "conll": _conll}[kind]
        for number, row in read(path, encoding):
            for name in wanted:
                if name not in row:
                    raise _no_field(path, name, list(row), f" in line {number}")
            yield row


def as_label(value: Any) -> str | None:
    """A label or filter value as text: ``1``, ``1.0`` and ``"1"`` are the same; ``None`` for what can't be one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int | float) and str(value).strip() else None


def clean_text(value: object, path: Path, name: str) -> str:
    """A cell as text without lone surrogates (which JSON can carry and no encoder takes); "" for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{path}: field {name!r} holds {type(value).__name__}, not text", hint="choose another field")
    if not value.isascii():
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.replace("\0", " ").strip()


def _kinds() -> str:
    return ", ".join(sorted(set(FORMATS.values())))


def _no_field(path: Path, name: str, known: list[str], where: str = "") -> BadInput:
    return BadInput(
        f"{path}: no field {name!r}{where}; there are {', '.join(map(repr, known[:20])) or 'none'}",
        hint=nearest(name, known) if known else "the row is empty",
    )


@contextmanager
def _text(path: Path, encoding: str) -> Iterator[Any]:
    """The file opened as text; a byte that does not fit the encoding is named by its offset."""
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        with path.open(encoding=name, newline="") as stream:
            yield stream
    except UnicodeError:
        offset = _first_bad_byte(path, encoding)
        raise BadInput(
            f"{path} is not {encoding}: byte {offset} does not fit", hint='set `encoding`, for example "latin-1"'
        ) from None


def _first_bad_byte(path: Path, encoding: str) -> int:
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(1 << 20)
            waiting = decoder.getstate()[0]
            pending = len(waiting) if isinstance(waiting, bytes) else 0
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            except UnicodeError:
                return position
            if not chunk:
                return position
            position += len(chunk)


def _jsonl(path: Path, encoding: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _text(path, encoding) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadInput(f"{path}:{number}: not valid JSON: {error}", hint="one JSON object a line") from None
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number}: not a JSON object", hint="one JSON object a line")
            yield number, row


def _csv(path: Path, encoding: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    limit = csv.field_size_limit(_MOST_CELL_CHARACTERS)
    try:
        with _text(path, encoding) as stream:
            reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise BadInput(
                        f"{path}:{reader.line_num}: not as many columns as the header", hint="check the quoting"
                    )
                yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path}: not valid csv: {error}", hint="check quoting and `format`") from None
    finally:
        csv.field_size_limit(limit)


def _conll(path: Path, encoding: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows: list[list[str]] = []
    first = 1
    with _text(path, encoding) as lines:
        for number, line in enumerate(itertools.chain(lines, [""]), start=1):
            columns = line.split()
            if columns and columns[0] != "-DOCSTART-":
                if len(columns) < 2:
                    raise BadInput(f"{path}:{number}: a word without a label", hint="word first, label last")
                first = first if rows else number
                rows.append(columns)
            elif rows:
                yield first, {"words": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
                rows = []


def _parquet(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingDependency.package("pyarrow", "distill") from None
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        for name in fields:
            if name not in names:
                raise _no_field(path, name, names)
        for batch in file.iter_batches(columns=list(fields), batch_size=4096):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not valid parquet: {str(error).splitlines()[0]}", hint="fetch it again") from None
