"""Time by operator, taken from the runtime's own profiler: the worker's operation ``profile``. Numpy only.

Profiling costs time itself, so it is done in a worker of its own, and the same passes are timed without it first: what
it costs is part of the answer, and nothing here is ever a speed. A session that can be profiled has a method
``profiling()``, a context manager that gives a :class:`Recorder`; it may have ``keep_timings()``, which makes the
runtime count its own timings from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import WorkerError
from .session import Ints, Session

__all__ = ["Phase", "Profile", "Recorder", "Row", "RowTable", "profile_session"]

WARMUP = 2
_Step = tuple[str, Callable[[], Any]]


@dataclass
class Row:
    """One operation of the model in all passes of a phase.

    ``op`` is its kind (``MatMulNBits``, ``MUL_MAT``), ``name`` that of the node, ``backend`` who computed it.
    ``seconds`` over all ``calls``, ``None`` where only its cost is known: ``flops`` and ``bytes`` over all calls,
    ``None`` where they are not known.
    """

    name: str
    op: str
    backend: str = ""
    calls: int = 0
    seconds: float | None = None
    flops: int | None = None
    bytes: int | None = None


@dataclass
class Phase:
    """``forward``, ``prefill`` or ``decode``: passes over ``tokens`` new tokens of each of ``batch`` sequences,
    ``past`` cached ones before the first pass of a run, which has ``passes_a_run`` of them.

    ``plain_seconds``: each pass without profiling; ``profiled_seconds``: with it. ``rows``: the operations.
    """

    name: str
    tokens: int
    batch: int = 1
    past: int = 0
    passes_a_run: int = 1
    plain_seconds: list[float] = field(default_factory=list)
    profiled_seconds: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


@dataclass
class Profile:
    """What a worker answers. ``source`` is ``measured``, or ``predicted`` where the cost of operations is only counted
    (then no row has seconds). ``engine``: what the runtime says of itself. ``note``: how rows were taken; ``reason``:
    why there are none."""

    source: str
    phases: list[Phase]
    engine: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    reason: str | None = None


class Recorder(Protocol):
    """Collects what the runtime's profiler says. ``source`` and ``note`` are those of :class:`Profile`."""

    source: str
    note: str

    def begin(self, phase: str) -> None:
        """The next pass of the model belongs to ``phase``; ``""``: to none, it only warms up."""
        ...

    def end(self) -> None:
        """That pass is over."""
        ...

    def rows(self) -> dict[str, list[Row]]:
        """The operations by phase, asked after the profiling has ended."""
        ...

    def engine(self) -> dict[str, Any]:
        """What the runtime says of itself."""
        ...


class RowTable:
    """Adds calls up by phase and operation."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[tuple[str, str, str], Row]] = {}

    def add(
        self, phase: str, name: str, op: str, backend: str = "", *, seconds: float | None = None, calls: int = 1,
        flops: int | None = None, size: int | None = None,
    ) -> None:  # fmt: skip
        """``calls`` of an operation; a sum with an unknown part is unknown."""
        table = self._rows.setdefault(phase, {})
        row = table.get((name, op, backend))
        if row is None:
            table[name, op, backend] = Row(name, op, backend, calls, seconds, flops, size)
            return
        row.calls += calls
        row.seconds = None if row.seconds is None or seconds is None else row.seconds + seconds
        row.flops = None if row.flops is None or flops is None else row.flops + flops
        row.bytes = None if row.bytes is None or size is None else row.bytes + size

    def rows(self) -> dict[str, list[Row]]:
        """The rows of each phase, in the order in which they came."""
        return {phase: list(table.values()) for phase, table in self._rows.items() if phase}


def profile_session(
    session: Session,
    *,
    ids: Ints | None = None,
    mask: Ints | None = None,
    prompt_ids: Sequence[int] = (),
    new_tokens: int = 0,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Profile ``repeats`` forward passes over ``ids`` and ``mask``, or, without them, so many generations of
    ``new_tokens`` after ``prompt_ids``. ``clock`` is in seconds.

    A session without a profiler gives the plain times and the reason. One that only interprets is run once, and not
    timed.
    """
    phases = {phase.name: phase for phase in _phases(ids, prompt_ids, new_tokens)}
    interpreted = "latency" not in session.info().capabilities

    def run(begin: Callable[[str], None], end: Callable[[], None], into: str | None) -> None:
        for name, step in _steps(session, ids, mask, prompt_ids, new_tokens):
            begin(name if into else "")
            start = clock()
            step()
            seconds = clock() - start
            end()
            if into:
                getattr(phases[name], into).append(seconds)

    if not interpreted:
        keep_timings: Callable[[], None] = getattr(session, "keep_timings", _nothing)
        keep_timings()
        for _ in range(WARMUP):
            run(_nothing, _nothing, None)
        keep_timings()
        for _ in range(repeats):
            run(_nothing, _nothing, "plain_seconds")
    open_profiler = getattr(session, "profiling", None)
    if open_profiler is None:
        why = f"{session.info().runtime} ({session.info().backend}) tells no time by operation here"
        return Profile("measured", list(phases.values()), reason=why)
    with open_profiler() as recorder:
        for _ in range(0 if interpreted else WARMUP):
            run(recorder.begin, recorder.end, None)
        for _ in range(1 if interpreted else repeats):
            run(recorder.begin, recorder.end, "profiled_seconds")
    for name, rows in recorder.rows().items():
        phases[name].rows = rows
    if interpreted:
        for phase in phases.values():
            phase.profiled_seconds = []  # the interpreter's time says nothing about anything
    reason = None if any(phase.rows for phase in phases.values()) else "the profiler recorded no operation"
    return Profile(recorder.source, list(phases.values()), recorder.engine(), recorder.note, reason)


def _phases(ids: Ints | None, prompt_ids: Sequence[int], new_tokens: int) -> list[Phase]:
    if ids is not None:
        return [Phase("forward", int(ids.shape[1]), batch=int(ids.shape[0]))]
    prefill = Phase("prefill", len(prompt_ids))
    if new_tokens < 2:
        return [prefill]
    return [prefill, Phase("decode", 1, past=len(prompt_ids), passes_a_run=new_tokens - 1)]


def _steps(
    session: Session, ids: Ints | None, mask: Ints | None, prompt_ids: Sequence[int], new_tokens: int
) -> Iterator[_Step]:
    """The passes of one run, each with its phase; they must be called in this order."""
    if ids is not None and mask is not None:
        yield "forward", lambda: session.forward(ids, mask)
        return
    tokens = iter(session.decode(prompt_ids, new_tokens))
    for index in range(new_tokens):
        yield "decode" if index else "prefill", lambda: _next(tokens)
    if next(tokens, None) is not None:
        raise WorkerError(f"decoded more than {new_tokens} tokens", hint="the session breaks its contract")


def _next(tokens: Iterator[Any]) -> None:
    if next(tokens, None) is None:
        raise WorkerError("decoding ended too early", hint="the session breaks its contract")


def _nothing(*_: object) -> None:
    pass
