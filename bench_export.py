"""``edgestill bench export``: what was measured before, in the formats that other tools read; nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bench.compare import Comparison, compare
from .bench.formats.output import check_output, write_results
from .bench.formats.results import Results
from .bench.gates import judge
from .bench.records import Measurement, read_measurements
from .errors import BadInput, UsageError
from .judging import read_all_measurements, read_verdicts
from .recipe import load_recipe
from .stages import find_run

__all__ = ["BenchExportRequest", "BenchExportResult", "WrittenFile", "export_results"]


@dataclass(frozen=True)
class BenchExportRequest:
    """Write what ``source`` holds (a run folder, or measurements in JSON lines) to ``out``; the name of each says its
    format, or ``form`` does. ``baseline``: the subject that others are compared with (default: the first one)."""

    source: Path
    out: tuple[Path, ...]
    form: str | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class WrittenFile:
    """One file and its format."""

    path: Path
    format: str


@dataclass(frozen=True)
class BenchExportResult:
    """What was written, from how many ``measurements``, ``verdicts`` and ``gates``."""

    source: Path
    files: tuple[WrittenFile, ...]
    measurements: int
    comparisons: int
    verdicts: int
    gates: int
    schema_version: int = 1


def export_results(request: BenchExportRequest) -> BenchExportResult:
    """Read the source whole, then write each file, as ``edgestill bench --out`` would have.

    A run folder gives its verdicts and the gates of its recipe as well, judged anew on the same numbers; one whose run
    stopped early gives what is there. Raises :class:`BadInput` for a source that can't be read or holds nothing, and
    what :func:`edgestill.bench.formats.output.write_results` raises.
    """
    if not request.out:
        raise UsageError("nowhere to write to", hint="--out results.csv")
    forms = [check_output(path, request.form) for path in request.out]
    results = _read(request.source, request.baseline)
    for path in request.out:
        write_results(results, path, request.form)
    return BenchExportResult(
        request.source, tuple(WrittenFile(path, form) for path, form in zip(request.out, forms, strict=True)),
        len(results.measurements), len(results.comparisons), len(results.verdicts), len(results.gates),
    )  # fmt: skip


def _read(source: Path, baseline: str | None) -> Results:
    if source.is_dir():
        find_run(source)
        recipe = load_recipe(source / "recipe.toml")
        rows = read_all_measurements(source, recipe)
        verdicts = tuple(read_verdicts(source, recipe))
        gates = tuple(judge(rows, recipe.gates)) if rows else ()
    elif source.is_file():
        rows, verdicts, gates = read_measurements(source), (), ()
    else:
        raise BadInput(f"there is no {source}", hint="pass a run folder, or a file of `edgestill bench --out x.jsonl`")
    if not rows and not verdicts:
        raise BadInput(f"{source} holds no measurement", hint="run the recipe again, it goes on")
    return Results(tuple(rows), tuple(_compared(rows, baseline)), verdicts, gates)


def _compared(rows: list[Measurement], baseline: str | None) -> list[Comparison]:
    taken = [row for row in rows if row.source != "predicted"]  # predictions have intervals of their own kind
    if not taken and baseline is None:
        return []
    return compare(taken, baseline if baseline is not None else taken[0].subject)
