"""Timings of a session: raw samples in seconds, taken with ``time.perf_counter_ns`` after a warm-up. No statistics."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from .session import Session

__all__ = ["Timed", "time_decode", "time_forward"]

_WINDOW = 5  # warm-up calls that must agree
_SPREAD = 0.1  # (max - min) / median of that window
_EXTRA = 5  # at most so many times the warm-up asked for, plus a window


@dataclass(frozen=True)
class Timed:
    """Raw ``samples`` of the timed calls, those of the ``warmup`` before, and whether the warm-up ended ``stable``
    (else it ran into its bound, and the samples tell of an unsteady machine)."""

    samples: tuple[Any, ...]
    warmup: tuple[float, ...]
    stable: bool


def time_forward(
    session: Session,
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    *,
    repeats: int,
    warmup: int = 3,
    max_seconds: float = 10.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Timed:
    """Seconds of each ``session.forward(ids, mask)``: ``repeats`` calls, fewer when ``max_seconds`` are over (but one).

    The warm-up makes at least ``warmup`` calls and goes on until the last five lie within 10 %, bounded by five times
    that number and by ``max_seconds``. ``clock`` gives nanoseconds.
    """

    def call() -> float:
        start = clock()
        session.forward(ids, mask)
        return (clock() - start) / 1e9

    return _time(call, lambda seconds: seconds, repeats, warmup, max_seconds)


def time_decode(
    session: Session,
    prompt_ids: Sequence[int],
    new_tokens: int,
    *,
    repeats: int,
    warmup: int = 1,
    max_seconds: float = 10.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Timed:
    """``{"first_s": time to the first token (prompt included), "tokens_s": seconds of each further one}`` a generation.

    ``new_tokens`` tokens are decoded, so ``tokens_s`` has ``new_tokens - 1`` entries. Bounds as in
    :func:`time_forward`; the times are taken around the session's iterator, with one clock for all runtimes.
    """

    def call() -> dict[str, Any]:
        marks = [clock()]
        for _ in session.decode(prompt_ids, new_tokens):
            marks.append(clock())  # noqa: PERF401 (a comprehension would time its own building)
        steps = [(late - early) / 1e9 for early, late in itertools.pairwise(marks)]
        if len(steps) != new_tokens:
            raise BadInput(f"decoded {len(steps)} tokens instead of {new_tokens}", hint="ask for at least 1")
        return {"first_s": steps[0], "tokens_s": steps[1:]}

    return _time(call, lambda run: float(run["first_s"] + sum(run["tokens_s"])), repeats, warmup, max_seconds)


def _time(
    call: Callable[[], Any], seconds: Callable[[Any], float], repeats: int, warmup: int, max_seconds: float
) -> Timed:
    if repeats < 1 or warmup < 0 or not max_seconds > 0:
        raise BadInput(f"can't time {repeats} repeats, {warmup} warm-up calls in {max_seconds} s", hint="repeats >= 1")
    before: list[float] = []
    stable = warmup == 0
    while not stable and sum(before) < max_seconds and len(before) < warmup * _EXTRA + _WINDOW:
        before.append(seconds(call()))
        stable = len(before) >= max(warmup, _WINDOW) and _steady(before[-_WINDOW:])
    samples: list[Any] = []
    spent = 0.0
    with _no_collection():
        while len(samples) < repeats and (not samples or spent < max_seconds):
            samples.append(call())
            spent += seconds(samples[-1])
    return Timed(tuple(samples), tuple(before), stable)


def _steady(window: Sequence[float]) -> bool:
    return max(window) - min(window) <= _SPREAD * sorted(window)[len(window) // 2]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cyclic garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
