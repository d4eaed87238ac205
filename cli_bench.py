"""``edgestill bench``: measuring, and what is done with measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import Json, Threads, WithDefault, emit, listed, with_progress

if TYPE_CHECKING:
    from .stages import Observer

__all__ = ["benching"]


class _Bench(WithDefault):
    """``edgestill bench SUBJECT…`` is short for ``edgestill bench run SUBJECT…``."""

    default = "run"


benching = typer.Typer(
    cls=_Bench, no_args_is_help=True, help="Measure artifacts and model folders: edgestill bench ARTIFACT…"
)


@benching.callback()
def _bench() -> None:
    """Without it, a group of a single command would be that command."""


@benching.command("run")
def bench(
    subjects: Annotated[list[Path], typer.Argument(help="Artifact folders or model folders.")],
    target: Annotated[
        list[str], typer.Option(help="Where to measure: host, and what `edgestill devices list` names (commas).")
    ] = ["host"],  # noqa: B006 - typer copies it
    threads: Threads = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the timed input.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a timed generation.")] = 32,
    launches: Annotated[
        int | None, typer.Option(min=1, help="Fresh processes per subject; by default 5, up to 24 where it is noisy.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One launch: a first look, not a result.")] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Also percentiles, decode speed by depth, a minute of sustained work.")
    ] = False,
    depths: Annotated[
        list[int], typer.Option("--depth", min=0, help="Decode speed after so many tokens; may be given again.")
    ] = [],  # noqa: B006 - typer copies it
    sustained: Annotated[
        float | None, typer.Option(min=0, help="Seconds of work in one go: last quarter against first.")
    ] = None,
    resolution: Annotated[float, typer.Option(min=0.001, help="The smallest difference that matters.")] = 0.05,
    max_slowdown: Annotated[
        float | None,
        typer.Option(min=0, help="Exit 1 if a subject is slower than the first by more (0.05), 3 if noise hides it."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A teacher: how near to it (KL, agreement, Δp, Spearman …), on the artifact.")
    ] = None,
    student: Annotated[Path | None, typer.Option(help="The float student, to compare with as well.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on (jsonl, csv, parquet, txt).")] = None,
    tasks: Annotated[
        list[Path],
        typer.Option(help="A JSON-lines file: choices, cloze, labelled texts or scored pairs; may be given again."),
    ] = [],  # noqa: B006 - typer copies it
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that accuracy is taken on (text generation).")] = 2048,
    speed: Annotated[bool, typer.Option(help="Whether to measure speed, memory and size.")] = True,
    out: Annotated[
        list[Path],
        typer.Option(help="Also write x.jsonl, .csv, .md, .sqlite (appended), .junit.xml or .llama-bench.json."),
    ] = [],  # noqa: B006 - typer copies it
    form: Annotated[
        str | None, typer.Option("--format", help="The format of --out, where its name does not say it.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also the time by operator, and what of this machine's peaks is reached.")
    ] = False,
    profile_page: Annotated[Path | None, typer.Option(help="Write the profile, with its roofline, as HTML.")] = None,
    as_json: Json = False,
) -> int:
    """Measure speed, memory, energy and size, interleaved, each in fresh processes. The first subject is the baseline.

    With --against or --tasks also accuracy, on the artifact in its runtime. The word `run` may be left out.
    """

    def work(observer: Observer) -> Any:
        from .bench.formats.output import check_output, write_results
        from .benchmark import BenchRequest, Effort, bench_subjects
        from .errors import UsageError
        from .files import check_place

        for path in out:
            check_output(path, form)  # before minutes are spent
        if profile_page is not None:
            check_place(profile_page)
        if quick and thorough:
            raise UsageError("--quick and --thorough", hint="one of them")
        accuracy = None
        if against or student or text or tasks:
            from .accuracy import AccuracyRequest

            accuracy = AccuracyRequest(against, student, text, tuple(tasks), threads, tokens)
        effort: Effort = "quick" if quick else "thorough" if thorough else "normal"
        request = BenchRequest(
            tuple(subjects), listed(target), threads, length, new_tokens, effort, launches, tuple(depths) or None,
            sustained, resolution, max_slowdown, accuracy, speed, profile, profile_page,
        )  # fmt: skip
        measured = bench_subjects(request, observer)
        for path in out:
            write_results(measured, path, form)
        return measured

    result = with_progress(work)
    emit(result, as_json)
    return int(result.exit_code)


@benching.command("import")
def import_results(
    files: Annotated[
        list[Path],
        typer.Argument(help="Of llama-bench (json), AI Hub (profile), onnxruntime_perf_test, Xcode (a note)."),
    ],
    device: Annotated[str | None, typer.Option(help="The device, where the file does not say it.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="The artifact folder that was measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Add the rows to this measurements file (JSON lines).")] = None,
    as_json: Json = False,
) -> None:
    """Read results of other tools into the same records, marked with their origin: an iPhone's way in."""
    from .bench_import import ImportRequest
    from .bench_import import import_results as read

    emit(read(ImportRequest(tuple(files), device, artifact, out)), as_json)


@benching.command("export")
def export_results(
    source: Annotated[Path, typer.Argument(help="A run folder, or measurements (JSON lines).")],
    out: Annotated[
        list[Path], typer.Option(help="x.jsonl, .csv, .md, .sqlite (appended), .junit.xml or .llama-bench.json.")
    ],
    form: Annotated[
        str | None, typer.Option("--format", help="The format of --out, where its name does not say it.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The subject that others are compared with; by default the first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what was measured before in other formats; nothing is run."""
    from .bench_export import BenchExportRequest
    from .bench_export import export_results as export

    emit(export(BenchExportRequest(source, tuple(out), form, baseline)), as_json)


@benching.command("parity")
def parity(
    artifact: Annotated[Path, typer.Argument(help="An ONNX artifact folder.")],
    limit: Annotated[
        float | None, typer.Option(help="Most that machines may differ: rms of the difference over rms, e.g. 0.01.")
    ] = None,
    core: Annotated[str, typer.Option(help="The Arm core that is emulated.")] = "cortex-a76",
    examples: Annotated[int, typer.Option(min=1, help="Sentences.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a sentence (an emulator is slow).")] = 24,
    strict: Annotated[bool, typer.Option("--strict", help="A machine that can't be tried here fails too.")] = False,
    as_json: Json = False,
) -> int:
    """Run the same inputs on x86, x86 without VNNI, Arm and WASM, and say who differs. Exit code 1 when one does."""

    def work(observer: Observer) -> Any:
        from .parity import ParityRequest, check_parity

        return check_parity(ParityRequest(artifact, limit, core, examples, length, strict), observer)

    result = with_progress(work)
    emit(result, as_json)
    return int(result.exit_code)
