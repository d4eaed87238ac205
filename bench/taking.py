"""What is taken of a subject in one launch: a fresh process that loads, warms up, and runs in turns with others.

In a round the workers of all subjects live side by side and work in turns, there and back (A B C, C B A), so that a
slow phase of the machine hits all of them alike; only one works at a time. A worker that fails costs its subject the
numbers, with the reason; the others go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, EdgestillError, LinkLost, MissingDependency, ResourceExhausted, Unsupported, WorkerError
from ..recipe import BenchConfig
from ..runtimes.session import SessionInfo, SessionOptions
from .environment import LoadProbe
from .percentiles import needed_samples
from .relaunch import load_of, relaunching

__all__ = ["WARMUP", "OpenWorker", "Record", "Subject", "Work", "Worker", "after_first", "refuse", "take_round"]

WARMUP = 3  # untimed inferences before the timed ones, at least
_TURNS = 6  # of each subject in a round
_TURN_SECONDS = 0.05  # quick inferences are repeated: what a neighbour left in the caches must not be what is measured

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """What is measured: a sealed ``artifact`` folder or a ``model`` folder (run by torch), and how reports call it.

    ``parameters`` is the number of weights, for bits per weight; by default it is counted from the artifact's
    histogram. ``subject_id`` is the artifact or model id; by default it is read or hashed.
    """

    name: str
    folder: Path
    kind: Literal["artifact", "model"] = "artifact"
    parameters: int | None = None
    subject_id: str | None = None


class Worker(Protocol):
    """What is needed of a worker, e.g. :class:`edgestill.runtimes.transports.local.LocalWorker`."""

    load_seconds: float
    prepare_seconds: float
    cold_load_seconds: float | None
    cold_reason: str | None
    stable: bool

    def info(self) -> SessionInfo:
        """Who runs this."""
        ...

    def time_forward(self, ids: Ints, mask: Ints, *, repeats: int, warmup: int, max_seconds: float) -> list[float]:
        """Seconds of each forward pass."""
        ...

    def time_decode(
        self, prompt_ids: Sequence[int], new_tokens: int, *, repeats: int, warmup: int, max_seconds: float
    ) -> list[dict[str, Any]]:
        """``first_s`` and ``tokens_s`` of each generation."""
        ...

    def memory(self) -> dict[str, Any]:
        """Bytes in parts, see docs/worker-protocol.md."""
        ...

    def sensors(self) -> dict[str, Any] | None:
        """One reading, ``None`` from a worker without the operation."""
        ...


class OpenWorker(Protocol):
    """Starts a worker; ``cold``: with the model's files evicted from the page cache first."""

    def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> AbstractContextManager[Worker]:
        """Start it."""
        ...


@dataclass
class Record:
    """What has been taken of one subject so far: samples per launch by metric, and why something is missing.

    ``depths``: decode speeds by the number of tokens that stood before. ``cut``: launches that a broken link ended,
    which were taken again.
    """

    subject: Subject
    identity: str
    runtime: str
    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    depths: dict[int, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    info: SessionInfo | None = None
    loads: list[dict[str, Any]] = field(default_factory=list)
    sensors: list[dict[str, Any]] = field(default_factory=list)
    unsteady: int = 0
    cut: int = 0

    def add(self, metric: str, values: list[float]) -> None:
        """One more launch of ``metric``."""
        self.samples.setdefault(metric, []).append(values)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """What goes wrong with the artifact or its worker is written down, not raised; a link that broke is raised,
        since the launch is taken again."""
        try:
            yield
        except LinkLost:
            raise
        except (WorkerError, MissingDependency, Unsupported, BadInput, ResourceExhausted) as error:
            self.failure = _why(error)


@dataclass(frozen=True)
class Work:
    """What is timed: ``ids [batch, length]``, and ``config.new_tokens`` after the first row with ``generation``."""

    config: BenchConfig
    ids: Ints
    generation: bool
    open_worker: OpenWorker

    @property
    def mask(self) -> Ints:
        """All ones: every token is real."""
        return np.ones_like(self.ids)

    @property
    def calls(self) -> int:
        """Timed inferences a launch: as many as asked for, and as the percentiles need in all launches together."""
        needed = max([needed_samples(percentile) for percentile in self.config.percentiles], default=0)
        return max(self.config.repeats, -(-needed // self.config.launches))

    @property
    def prompt(self) -> list[int]:
        """The first row."""
        return [int(token) for token in self.ids[0]]

    def open(self, record: Record, *, cold: bool = False) -> AbstractContextManager[Worker]:
        """A fresh worker of a subject."""
        return self.open_worker(record.subject.folder, SessionOptions(threads=self.config.threads), cold=cold)


def take_round(records: Sequence[Record], work: Work) -> None:
    """One launch of each of ``records``, in this order: load, first inference, warm-up, then timings in turns."""
    relaunching(records, lambda: _round(records, work))


def _round(records: Sequence[Record], work: Work) -> None:
    alive: list[tuple[Record, Worker]] = []
    taken: list[Record] = [record for record in records if record.failure is None]
    with LoadProbe() as probe, contextlib.ExitStack() as stack:
        for record in taken:
            with record.catching():
                worker = stack.enter_context(work.open(record))
                record.info = info = worker.info()
                refuse(info, work)
                record.add("import_ms", [worker.prepare_seconds * 1e3])
                record.add("load_ms", [worker.load_seconds * 1e3])
                first = worker.time_forward(work.ids, work.mask, repeats=1, warmup=0, max_seconds=_budget(work))
                record.add("first_inference_ms", [first[0] * 1e3])
                alive.append((record, worker))
        _turns(alive, work)
    workers = {id(record): worker for record, worker in alive}
    for record in taken:
        record.loads.append(load_of(workers.get(id(record)), probe.result))


def _turns(alive: Sequence[tuple[Record, Worker]], work: Work) -> None:
    """The timed inferences. Alone, a subject takes them in one go; side by side, in turns there and back."""
    config, budget = work.config, _budget(work)
    together = len(alive) > 1
    turns = max(2, min(_TURNS, work.calls // 2)) if together else 1
    turns += turns % 2 if together else 0
    calls, runs = -(-work.calls // turns), -(-config.repeats // turns)
    planned: dict[int, int] = {}
    forward: dict[int, list[float]] = {index: [] for index in range(len(alive))}
    decode: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(alive))}
    for index, (record, worker) in enumerate(alive):
        if together:
            with record.catching():
                last = worker.time_forward(work.ids, work.mask, repeats=1, warmup=WARMUP, max_seconds=budget)[-1]
                record.unsteady += not worker.stable
                planned[index] = max(calls, min(10 * calls, int(_TURN_SECONDS / max(last, 1e-6))))
    for turn in range(turns):
        order = range(len(alive)) if turn % 2 == 0 else range(len(alive) - 1, -1, -1)
        for index in order:
            record, worker = alive[index]
            if record.failure is not None:
                continue
            with record.catching():
                count = planned[index] + 1 if together else calls
                warmup = 0 if together else WARMUP
                forward[index] += after_first(
                    worker.time_forward(
                        work.ids, work.mask, repeats=count, warmup=warmup, max_seconds=budget / turns
                    ),
                    together,
                )  # fmt: skip
                record.unsteady += not (together or worker.stable)
                if work.generation:
                    done = worker.time_decode(
                        work.prompt, config.new_tokens, repeats=runs + together, warmup=0 if together else 1,
                        max_seconds=budget / turns,
                    )  # fmt: skip
                    decode[index] += after_first(done, together)
    for index, (record, _) in enumerate(alive):
        if record.failure is None:
            record.add("latency_ms", [seconds * 1e3 for seconds in forward[index]])
            if work.generation:
                _add_generation(record, decode[index], work)


def after_first(samples: list[Any], together: bool) -> list[Any]:
    """The first call of a turn pays for what the one before left in the processor's caches: it is not counted, unless
    time allowed no other."""
    return samples[1:] if together and len(samples) > 1 else samples


def _add_generation(record: Record, runs: Sequence[dict[str, Any]], work: Work) -> None:
    record.add("time_to_first_token_ms", [run["first_s"] * 1e3 for run in runs])
    record.add("prefill_tokens_per_s", [len(work.prompt) / run["first_s"] for run in runs])
    if work.config.new_tokens > 1:
        record.add("decode_tokens_per_s", [len(run["tokens_s"]) / sum(run["tokens_s"]) for run in runs])
        record.add("token_latency_ms", [seconds * 1e3 for run in runs for seconds in run["tokens_s"]])
    else:
        reason = "needs new_tokens of at least 2"
        record.missing |= dict.fromkeys(("decode_tokens_per_s", "token_latency_ms"), reason)


def refuse(info: SessionInfo, work: Work) -> None:
    """Raise :class:`Unsupported` for what can't be timed here, so that no number is made up for it."""
    if "latency" not in info.capabilities:
        raise Unsupported(f"only interpreted here ({info.backend}): speed and memory would say nothing about a device")
    need = work.ids.shape[1] + (work.config.new_tokens if work.generation else 0)
    if need > info.max_length:
        raise Unsupported(f"takes at most {info.max_length} tokens, the timed run needs {need}")


def _budget(work: Work) -> float:
    return work.config.max_seconds / (2 if work.generation else 1)


def _why(error: EdgestillError) -> str:
    return error.message.strip().splitlines()[0] if error.message.strip() else type(error).__name__
