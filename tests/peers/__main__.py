"""``python -m tests.peers [NAME…]``: measure edgestill side by side with other tools.

A table of figures against their limits on stderr; with ``--json`` one line a figure on stdout. Exit codes as those of
edgestill: 0 all hold, 1 one does not, 2 usage, 3 undecided (noise), 4 a peer or a model is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.padding import Padding

from edgestill.bench.environment import usable_threads
from edgestill.errors import EdgestillError
from edgestill.terminal import print_error, stderr

from .context import Context
from .registry import Row, Subject, Taken, Unavailable, judge, load_groups, select

__all__ = ["exit_code", "main", "measure"]

_SIGNS = {"at_most": "<=", "at_least": ">="}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    load_groups()
    try:
        subjects = select(options.names, slow=options.slow)
        if options.list:
            _list(subjects)
            return 0
        return _measure_all(subjects, options)
    except EdgestillError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        stderr.print("interrupted")
        return 130


def _measure_all(subjects: Sequence[Subject], options: argparse.Namespace) -> int:
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgestill-peers-") as scratch, stderr.status("") as status:
        context = Context(
            Path(scratch), tiny=options.tiny, repeats=options.repeats, threads=options.threads,
            progress=lambda message, fraction=None: status.update(message),
        )  # fmt: skip
        for subject in subjects:
            rows.append(measure(subject, context))
            if options.json:
                print(json.dumps(rows[-1].document(), ensure_ascii=False, allow_nan=False), flush=True)
            else:
                _show(rows[-1], max(len(subject.name) for subject in subjects))
    return exit_code(rows)


def measure(subject: Subject, context: Context) -> Row:
    """One row. What can't be had here or goes wrong is a row, too: the other figures are still taken."""
    one = subject.figure
    if subject.left_out:
        how = f"left out: it takes {one.slow}; name it, or pass --slow"
        return Row(subject.name, None, one.unit, one.limit, None, how, one.sense, "left out")
    try:
        taken: Taken = one.measure(context, subject.variant)
    except Unavailable as reason:
        how = f"not measured: {reason}"
        return Row(subject.name, None, one.unit, one.limit, None, how, one.sense, "unavailable")
    except EdgestillError as error:
        return Row(subject.name, None, one.unit, one.limit, False, f"failed: {error}", one.sense, "failed")
    return judge(subject, taken)


def exit_code(rows: Sequence[Row]) -> int:
    """1 when a figure does not hold, else 4 when something is missing, else 3 when noise left one undecided."""
    if any(row.holds is False for row in rows):
        return 1
    found = {row.status for row in rows}
    return 4 if "unavailable" in found else 3 if "undecided" in found else 0


def _show(row: Row, width: int) -> None:
    """The figure on one line, under it how it was taken."""
    mark = {True: "[green]✔[/]", False: "[red]✘[/]", None: "[yellow]?[/]" if row.status != "measured" else " "}
    unit = "" if row.unit == "ratio" else f" {row.unit}"
    value = "—" if row.value is None else _number(row.value) + unit
    limit = "" if row.limit is None else f"{_SIGNS[row.sense]} {row.limit:g}{unit}"
    stderr.print(f" {mark[row.holds]} {escape(row.figure.ljust(width))}  {value:>18}  {limit}", soft_wrap=True)
    stderr.print(Padding(f"[dim]{escape(row.how)}[/]", (0, 0, 0, 5)))


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _list(subjects: Sequence[Subject]) -> None:
    figures = list(dict.fromkeys(subject.figure for subject in subjects))
    width = max(len(one.id) for one in figures)
    for one in figures:
        limit = "" if one.limit is None else f"{_SIGNS[one.sense]} {one.limit:g} {one.unit}"
        stderr.print(f"{one.group:8} {one.id.ljust(width)}  {limit}", markup=False, soft_wrap=True)
        variants = f"; variants: {' '.join(one.variants)}" if one.variants else ""
        slow = f"; takes {one.slow}: --slow" if one.slow else ""
        stderr.print(Padding(f"[dim]{escape(f'{one.title}; beside: {one.peer}{variants}{slow}')}[/]", (0, 0, 0, 9)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peers", description="edgestill side by side with other tools"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a group, a figure or figure[variant]; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON line a figure on stdout instead of the table")
    parser.add_argument("--list", action="store_true", help="list the figures and measure nothing")
    parser.add_argument("--slow", action="store_true", help="take the figures that train real models, too (hours)")
    parser.add_argument("--tiny", action="store_true", help="tiny random models: tries the way, not the speed")
    parser.add_argument("--repeats", type=_positive, default=3, help="fresh processes behind each figure (default 3)")
    threads = min(2, usable_threads())
    parser.add_argument("--threads", type=_positive, default=threads, help=f"CPU threads (default {threads})")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
