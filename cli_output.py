"""What every command of the command line shares: its common options, progress, and the one place that prints.

People read stderr (progress, tables, errors); programs read stdout, where ``--json`` puts exactly one document.
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

from .errors import EdgestillError

if TYPE_CHECKING:
    from .stages import Observer

__all__ = ["Json", "Runs", "Threads", "WithDefault", "debug", "emit", "fail", "listed", "say", "with_progress"]

Json = Annotated[bool, typer.Option("--json", help="Put one JSON document on stdout.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds run folders.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each worker.")]

_debug = [False]


def debug(wanted: bool) -> None:
    """Whether :func:`fail` shows tracebacks."""
    _debug[0] = wanted


class WithDefault(TyperGroup):
    """A group of commands of which one may be left out: ``edgestill distill RECIPE`` for ``distill student RECIPE``.

    A subclass names it in ``default``.
    """

    default = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default first where no sub-command is named and something is."""
        word = next((arg for arg in args if not arg.startswith("-")), None)
        asks_for_help = bool({"-h", "--help"} & set(args))
        if args and word not in self.commands and (word or not asks_for_help):
            args = [self.default, *args]
        return list(super().parse_args(ctx, args))


def with_progress(work: Callable[[Observer], Any]) -> Any:
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


def emit(result: Any, as_json: bool) -> None:
    """One document on stdout, or a table on stderr."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False, default=str, allow_nan=False))
    else:
        from .show import show

        show(result)


def listed(values: list[str]) -> tuple[str, ...]:
    """``--to a,b --to c`` as ``("a", "b", "c")``: said twice, an option adds to what it said."""
    return tuple(part for value in values for part in value.split(",") if part)


def say(text: str) -> None:
    """A line on stderr, as it is."""
    from .terminal import stderr

    stderr.print(text, markup=False, soft_wrap=True)


def fail(error: BaseException) -> int:
    """Explain an error: on stderr for people; with ``--json`` also as the one document on stdout."""
    from .terminal import print_error

    if _debug[0]:
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
