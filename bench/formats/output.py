"""Write results to a file in the format that its name, or the caller, says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import BadInput, ResourceExhausted, UsageError, nearest
from ...files import atomic_write, check_place
from ..compare import Comparison
from ..records import Measurement
from .csv_table import to_csv
from .json_lines import to_json_lines
from .junit import to_junit
from .llama_bench import to_llama_bench
from .markdown import to_markdown
from .results import Results
from .sqlite import append_sqlite

__all__ = ["FORMATS", "Format", "HasResults", "Results", "check_output", "write_results"]


class HasResults(Protocol):
    """What is written, e.g. :class:`edgestill.benchmark.BenchResult`. ``verdicts``, ``gates``, ``decisions`` (like
    gates) and ``problems`` (target -> reason) are taken along where there are any."""

    @property
    def measurements(self) -> Sequence[Measurement]:
        """What was measured."""

    @property
    def comparisons(self) -> Sequence[Comparison]:
        """Each subject against the baseline."""


@dataclass(frozen=True)
class Format:
    """One format: endings of file names, and a function that gives the text of a new file, or (``append``) adds to a
    file."""

    endings: tuple[str, ...]
    text: Callable[[Results], str] | None = None
    append: Callable[[Results, Path], None] | None = None


FORMATS: Mapping[str, Format] = {
    "jsonl": Format((".jsonl", ".ndjson"), to_json_lines),
    "csv": Format((".csv",), to_csv),
    "markdown": Format((".md", ".markdown"), to_markdown),
    "sqlite": Format((".sqlite", ".sqlite3", ".db"), append=append_sqlite),
    "junit": Format((".junit.xml", ".xml"), to_junit),
    "llama-bench": Format((".llama-bench.json",), to_llama_bench),
}


def check_output(path: Path, form: str | None = None) -> str:
    """The format of ``path`` (by its ending, or ``form``), before anything is measured for it.

    Raises :class:`UsageError` for an unknown format and :class:`BadInput` for a place where no file can be.
    """
    if form is None:
        name = path.name.lower()
        endings = {ending: key for key, one in FORMATS.items() for ending in one.endings}
        form = next((key for ending, key in endings.items() if name.endswith(ending)), None)
        if form is None:
            raise UsageError(
                f"{path.name}: no format has such a name",
                hint=f"end it in {', '.join(endings)}, or say --format; for one JSON document use --json",
            )
    elif form not in FORMATS:
        raise UsageError(f"unknown format {form!r}", hint=nearest(form, list(FORMATS)))
    check_place(path)
    return form


def write_results(result: HasResults, path: Path, form: str | None = None) -> None:
    """Write ``result`` to ``path``. A file that is there is replaced, whole or not at all; an SQLite database gets one
    more run. Raises as :func:`check_output`, and :class:`ResourceExhausted` on a full disk."""
    chosen = FORMATS[check_output(path, form)]
    everything = Results(
        tuple(result.measurements), tuple(result.comparisons), tuple(getattr(result, "verdicts", ())),
        tuple(getattr(result, "gates", ())), tuple(getattr(result, "decisions", ())),
        tuple(dict(getattr(result, "problems", {})).items()),
    )  # fmt: skip
    try:
        if chosen.append is not None:
            chosen.append(everything, path)
        elif chosen.text is not None:
            atomic_write(path, chosen.text(everything))
    except ResourceExhausted:
        raise
    except OSError as error:
        raise BadInput(f"{path} can't be written: {error.strerror}", hint="choose another place") from None
