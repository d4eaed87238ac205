"""The errors of edgestill: one tree, each with a hint and an exit code.

::

    EdgestillError                     5  anything that went wrong and has no better name
    +-- UsageError                     2  the caller asked for something that can't be
    |   +-- RecipeError                   a recipe (or a flag) is wrong: key, type, value; names file and line
    |   +-- BadInput                      a model, data or artifact file is missing, damaged or hostile
    |   +-- Unsupported                   valid, but not something that this code can do
    +-- CheckFailed                    1  a gate or a verification failed
    +-- Inconclusive                   3  the noise is larger than the limit
    +-- MissingDependency              4  a Python package, runtime or tool is not installed
    +-- WorkerError                    5  a worker process died, hung up or timed out
    |   +-- LinkLost                      the link to a device broke: what was cut is done again
    +-- ResourceExhausted              5  disk or memory ran out

Whoever raises one says what failed, on which value, and (``hint``) what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BadInput",
    "CheckFailed",
    "EdgestillError",
    "Inconclusive",
    "LinkLost",
    "MissingDependency",
    "RecipeError",
    "ResourceExhausted",
    "Unsupported",
    "UsageError",
    "WorkerError",
]


class EdgestillError(Exception):
    """The root of the tree.

    ``message`` is one line, what failed and on which value; ``hint`` is one line, what to do next (may be empty).
    """

    exit_code = 5

    def __init__(self, message: str, *, hint: str = "") -> None:
        message = _one_line(message)
        super().__init__(message)
        self.message = message
        self.hint = _one_line(hint)

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class UsageError(EdgestillError):
    """The caller asked for something that can't be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is wrong; the message names file and line."""


class BadInput(UsageError):
    """A model, data or artifact file is missing, damaged or hostile."""


class Unsupported(UsageError):
    """Valid, but not something that edgestill can do (an architecture, a task, a format)."""


class CheckFailed(EdgestillError):
    """A gate or a verification failed."""

    exit_code = 1


class Inconclusive(EdgestillError):
    """A comparison could not be decided: the noise is larger than the limit."""

    exit_code = 3


class MissingDependency(EdgestillError):
    """A package, runtime or tool is not installed; the hint is the exact line that installs it."""

    exit_code = 4

    @classmethod
    def package(cls, module: str, extra: str) -> MissingDependency:
        """The error for a Python ``module`` that the optional ``extra`` of edgestill brings."""
        return cls(f"{module} is not installed", hint=f"pip install 'edgestill[{extra}]'")


class WorkerError(EdgestillError):
    """A worker process died, broke the protocol or timed out."""


class LinkLost(WorkerError):
    """The link to a device broke in the middle. What was cut gave no number; it can be done again."""


class ResourceExhausted(EdgestillError):
    """Disk or memory ran out; nothing half-written was left."""


def _one_line(text: str) -> str:
    """What came out of a file may have line breaks, or be a page long: neither gets into a message.

    >>> _one_line("a\\n  b")
    'a b'
    """
    if any(not (character.isprintable() or character in "\n\r\t") for character in text):
        text = "".join(c if c.isprintable() or c in "\n\r\t" else f"\\x{ord(c):02x}" for c in text)
    if "\n" in text or "\r" in text:
        text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


_LONGEST = 900


def nearest(word: str, known: Sequence[str]) -> str:
    """``"did you mean 'x'?"`` for a mistyped ``word``, or the list of ``known`` ones.

    >>> nearest("tempature", ["temperature", "epochs"])
    "did you mean 'temperature'?"
    """
    import difflib

    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else "known: " + ", ".join(sorted(known))
