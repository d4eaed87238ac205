"""``edgestill bench --profile``: where the time of an artifact goes, by operator, and how near it is to its roof.

A profile is taken in a worker of its own, from the runtime's own profiler, and is never a speed: it says how much
slower its passes were than the same ones without it. The roof is measured on this machine, so only for a run on it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..artifact import ARTIFACT_FILE, Artifact, open_artifact
from ..errors import EdgestillError
from ..runtimes.profiling import Phase, Row
from ..runtimes.session import SessionOptions
from .environment import LoadProbe
from .measure import OpenWorker
from .peaks import Peaks
from .roofline import Attained, attain, pass_cost
from .traffic import Traffic, count_traffic

__all__ = ["Operator", "Profiled", "ProfiledPhase", "profile_artifact"]

Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", int, float)
_SLOWEST = 10
# An interpreter needs seconds a token, and the cost of the second one is that of the third.
_COUNTED_TOKENS = 3


@dataclass(frozen=True)
class Operator:
    """All nodes of one kind (``name`` ``""``), or one node. ``calls``, ``ms``, ``flops`` and ``size_bytes`` are of a
    mean pass; ``share`` of the profiled time, or of the operations where nothing was timed. ``None``: not known."""

    op: str
    name: str
    backend: str
    calls: float
    ms: float | None
    share: float | None
    flops: float | None
    size_bytes: float | None


@dataclass(frozen=True)
class ProfiledPhase:
    """``forward``, ``prefill`` or ``decode``. ``plain_ms`` and ``profiled_ms``: the median pass without and with
    profiling; ``cost``: how much slower profiling made it (``0.1``: a tenth); ``explained``: the operators' share of
    the profiled time. ``operators`` by kind and ``nodes`` (the ten largest), largest first."""

    name: str
    tokens: int
    past: int
    passes: int
    plain_ms: float | None
    profiled_ms: float | None
    cost: float | None
    explained: float | None
    operators: tuple[Operator, ...]
    nodes: tuple[Operator, ...]
    roofline: Attained | None = None
    roofline_reason: str | None = None


@dataclass(frozen=True)
class Profiled:
    """The profile of one subject. ``source``: ``measured``, ``emulated``, or ``predicted`` where costs were only
    counted. ``engine``: the runtime's own timings. ``note``: how it was taken; ``reason``: why there are no
    operators."""

    subject: str
    artifact_id: str
    source: Literal["measured", "emulated", "predicted"]
    target: str
    runtime: str
    runtime_version: str
    backend: str
    threads: int
    phases: tuple[ProfiledPhase, ...]
    engine: dict[str, Any]
    note: str
    reason: str | None
    traffic: Traffic | None
    traffic_reason: str | None
    peaks: Peaks | None
    busy: bool


def profile_artifact(
    folder: Path,
    *,
    subject: str,
    open_worker: OpenWorker,
    ids: Ints,
    new_tokens: int = 32,
    threads: int = 2,
    repeats: int = 5,
    target: str = "host",
    source: Literal["measured", "emulated"] = "measured",
    peaks: Peaks | None = None,
) -> Profiled:
    """Profile an artifact or model folder in a worker of its own: generations of ``new_tokens`` after ``ids[0]`` where
    it generates, else forward passes over ``ids [batch, length]``.

    ``peaks``: those of the machine that the worker runs on, else there is no roofline. What is wrong with the artifact
    or the worker is a ``reason`` in the result, and so is all that this runtime does not tell.
    """
    artifact = open_artifact(folder, check=False) if (folder / ARTIFACT_FILE).exists() else None
    counted = artifact is not None and artifact.manifest.format == "coreml"
    traffic, why = _traffic(artifact)
    options = SessionOptions(threads=threads, backend="mil-interpreter" if counted else None)
    identity = artifact.manifest.artifact_id if artifact else ""
    where: dict[str, Any] = {"subject": subject, "artifact_id": identity, "target": target, "threads": threads}
    where |= {"traffic": traffic, "traffic_reason": why, "peaks": peaks}
    try:
        with LoadProbe() as load, open_worker(folder, options) as worker:
            info = worker.info()
            client: Any = worker
            if info.task == "text-generation":
                new = min(new_tokens, _COUNTED_TOKENS) if counted else new_tokens
                found = client.profile(prompt_ids=[int(token) for token in ids[0]], new_tokens=new, repeats=repeats)
            else:
                found = client.profile(ids, np.ones_like(ids), repeats=repeats)
    except EdgestillError as error:
        empty: dict[str, Any] = {"phases": (), "engine": {}, "note": "", "busy": False}
        return Profiled(
            source=source, runtime="", runtime_version="", backend="", reason=error.message, **where, **empty
        )  # fmt: skip
    last_only = info.runtime == "llama.cpp"
    phases = tuple(_phase(phase, traffic, why, peaks, last_only) for phase in found.phases)
    return Profiled(
        source="predicted" if found.source == "predicted" else source, runtime=info.runtime,
        runtime_version=info.version, backend=info.backend, phases=phases, engine=found.engine, note=found.note,
        reason=found.reason, busy=bool(load.result["busy"]), **where,
    )  # fmt: skip


def _traffic(artifact: Artifact | None) -> tuple[Traffic | None, str | None]:
    if artifact is None:
        return None, "what a model folder reads is not counted: profile its artifact"
    try:
        return count_traffic(artifact), None
    except EdgestillError as error:
        return None, error.message


def _phase(
    phase: Phase, traffic: Traffic | None, why: str | None, peaks: Peaks | None, last_only: bool
) -> ProfiledPhase:
    plain = statistics.median(phase.plain_seconds) if phase.plain_seconds else None
    profiled = statistics.median(phase.profiled_seconds) if phase.profiled_seconds else None
    passes = len(phase.profiled_seconds) or phase.passes_a_run
    timed = [row.seconds for row in phase.rows if row.seconds is not None]
    explained = sum(timed) / sum(phase.profiled_seconds) if timed and phase.profiled_seconds else None
    roof, reason = _roof(phase, plain, traffic, why, peaks, last_only)
    return ProfiledPhase(
        phase.name, phase.tokens, phase.past, passes, _ms(plain), _ms(profiled),
        profiled / plain - 1 if plain and profiled else None, explained,
        _ranked(_by_kind(phase.rows), passes), _ranked(phase.rows, passes)[:_SLOWEST], roof, reason,
    )  # fmt: skip


def _roof(
    phase: Phase, seconds: float | None, traffic: Traffic | None, why: str | None, peaks: Peaks | None, last_only: bool
) -> tuple[Attained | None, str | None]:
    if seconds is None:
        return None, "nothing was timed: the program is only interpreted here"
    if traffic is None:
        return None, why
    if peaks is None:
        return None, "the peaks of that machine are not measured: only this machine's are"
    bandwidth, peak = peaks.bandwidth, peaks.arithmetic(traffic.arithmetic)
    if bandwidth is None or peak is None or not bandwidth.rate or not peak.rate:
        missing = next((p.reason for p in peaks.peaks.values() if p.reason), "no probe gave a number")
        return None, f"this machine's peaks could not be measured: {missing}"
    size, flops = pass_cost(traffic, phase, last_only=last_only)
    if not size or not flops:
        return None, "the artifact holds no matrix that could be counted"
    return attain(phase.name, seconds=seconds, size=size, flops=flops, bandwidth=bandwidth.rate, peak=peak.rate), None


def _by_kind(rows: Sequence[Row]) -> list[Row]:
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        total = found.get((row.op, row.backend))
        if total is None:
            found[row.op, row.backend] = Row("", row.op, row.backend, row.calls, row.seconds, row.flops, row.bytes)
            continue
        total.calls += row.calls
        total.seconds = _sum(total.seconds, row.seconds)
        total.flops, total.bytes = _sum(total.flops, row.flops), _sum(total.bytes, row.bytes)
    return list(found.values())


def _ranked(rows: Sequence[Row], passes: int) -> tuple[Operator, ...]:
    """Means of a pass, by time where there is one, else by operations and then bytes."""
    whole = sum(row.seconds or 0.0 for row in rows)
    work = sum(row.flops or 0 for row in rows)
    found = []
    for row in sorted(rows, key=lambda r: (-(r.seconds or 0.0), -(r.flops or 0), -(r.bytes or 0), r.op, r.name)):
        share = row.seconds / whole if row.seconds is not None and whole else None
        if row.seconds is None and row.flops is not None and work:
            share = row.flops / work
        found.append(
            Operator(
                row.op, row.name, row.backend, row.calls / passes,
                None if row.seconds is None else row.seconds * 1e3 / passes, share,
                None if row.flops is None else row.flops / passes, None if row.bytes is None else row.bytes / passes,
            )
        )  # fmt: skip
    return tuple(found)


def _sum(a: Number | None, b: Number | None) -> Number | None:
    return None if a is None or b is None else a + b


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
