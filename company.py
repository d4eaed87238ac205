"""A command that several processes were started with: the first does everything, the others help it to train.

`torchrun --nproc-per-node 2 -m edgestill distill RECIPE` and `accelerate launch -m edgestill distill RECIPE` start them
and number them in ``RANK``. The others wait for a training and take part in it. On several machines the run folder must
be on a shared disk. In a single process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from .errors import EdgestillError

__all__ = ["company", "follow", "follows", "together"]

P = ParamSpec("P")
R = TypeVar("R")


def follows() -> bool:
    """Whether this process is one of the others."""
    return _several() and int(os.environ.get("RANK", "0")) > 0


def follow() -> int:
    """Take part in whatever the first process trains, until it says that it has ended; returns the exit code."""
    from .distill import distill

    while (job := _tell(None)) is not None:
        arguments, named = job
        try:
            distill(*arguments, **named)
        except EdgestillError as error:
            return error.exit_code  # the first process says it
        except KeyboardInterrupt:
            return 130
    return 0


def together(distill: Callable[P, R]) -> Callable[P, R]:
    """``distill``, called in the other processes too, with the same arguments (but ``progress``)."""

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if not _several():
            return distill(*arguments, **named)
        _tell((arguments, {name: value for name, value in named.items() if name != "progress"}))
        try:
            return distill(*arguments, **named)
        except BaseException:
            _gone.append(True)  # the others met the same error, or will be ended by who started them
            raise

    return call


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Send the others home when the block ends."""
    try:
        yield
    finally:
        if _several() and not _gone:
            _tell(None)


_gone: list[bool] = []


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _tell(job: Any) -> Any:
    """The first process's ``job``, in all of them."""
    from .distill.ranks import from_first, start

    start()
    return from_first(lambda: job)
