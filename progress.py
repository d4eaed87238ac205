"""How long work tells the outside how far it is, without printing.

Every public function that can take seconds has a parameter ``progress: Progress = silent``. ``cli.py`` hands in one
that draws; tests and libraries leave it out.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called with a short present-tense text and the fraction done (0–1), or ``None`` when that is not known."""

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """Tell it."""


def silent(message: str, fraction: float | None = None) -> None:
    """Ignore it."""
