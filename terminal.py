"""What a person sees: progress, tables and errors, all on stderr. Only ``cli.py`` uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import EdgestillError
from .stages import Observer

__all__ = ["TerminalObserver", "print_error", "print_table", "stderr"]

stderr = Console(stderr=True, highlight=False)


class TerminalObserver(Observer):
    """Draws a line a stage: a live bar on a terminal, plain lines in a log."""

    def __init__(self, console: Console = stderr) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""

    def started(self, name: str, title: str) -> None:
        """Open the bar of a stage."""
        self._title = title
        if not self.console.is_terminal:
            self.console.print(f"  … {title}", markup=False)
            return
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=16),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(_fit(title, 28), total=None, note="")

    def advanced(self, message: str, fraction: float | None = None) -> None:
        """Move it."""
        if self._bar is None or self._task is None:
            return
        note = _fit(message, 24)
        if fraction is None:
            self._bar.update(self._task, note=note)
        else:
            self._bar.update(self._task, total=1.0, completed=min(max(fraction, 0.0), 1.0), note=note)

    def asks(self, message: str) -> None:
        """Say it in full, on a line that stays and can be copied."""
        self.console.print(f" [bold]?[/]  {_escape(message)}", soft_wrap=True)

    def finished(self, name: str, seconds: float, note: str) -> None:
        """Close it with the result."""
        self.close()
        self._line("[green]✔[/]", self._title, note, f"{seconds:.1f} s")

    def unchanged(self, name: str, title: str, note: str) -> None:
        """Say that nothing was to do."""
        self._line("[cyan]=[/]", title, note, "unchanged")

    def failed(self, name: str, reason: str) -> None:
        """Say in red what failed."""
        self.close()
        self._line("[red]✘[/]", name, reason, "failed")

    def close(self) -> None:
        """Take the bar away (also after an error)."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _line(self, mark: str, title: str, note: str, right: str) -> None:
        grid = Table.grid(padding=(0, 1), expand=self.console.is_terminal)
        grid.add_column(width=2)
        grid.add_column(width=28, no_wrap=True, overflow="ellipsis")
        grid.add_column(ratio=1, overflow="fold")
        grid.add_column(width=10, justify="right", no_wrap=True)
        grid.add_row(f" {mark}", _escape(title), f"[dim]{_escape(note)}[/]", f"[dim]{right}[/]")
        self.console.print(grid)


def print_error(error: BaseException, console: Console = stderr) -> None:
    """One line what failed, one line what to do."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    if not isinstance(error, EdgestillError):
        message = f"{type(error).__name__}: {message}"
    console.print(f"[bold red]error:[/] {_escape(' '.join(message.split()))}", soft_wrap=True)
    if hint := getattr(error, "hint", ""):
        console.print(f"[bold]hint:[/]  {_escape(hint)}", soft_wrap=True)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, text: int = 1, console: Console = stderr
) -> None:
    """A table: the first ``text`` columns are text, on the left; the others are numbers, to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), header_style="dim")
    for index, column in enumerate(columns):
        left = index < text
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=index == 0 and text == 1)
    for row in rows:
        table.add_row(*[_escape("—" if cell is None else str(cell)) for cell in row])
    console.print(table)


def _fit(text: str, width: int) -> str:
    text = " ".join(text.split())
    return _escape(text if len(text) <= width else text[: width - 1] + "…").ljust(width)


def _escape(text: str) -> str:
    """Text from files is never markup, and carries no control characters to the terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))
