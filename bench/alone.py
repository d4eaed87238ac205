"""What is taken of a subject in a launch of its own, nothing beside it: cold load, memory, energy, depth, long runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..runtimes.sensors import energy_between
from .environment import LoadProbe
from .plan import Kind
from .relaunch import load_of, relaunching
from .taking import Record, Work, Worker, after_first, refuse

__all__ = ["take_alone"]

_MEMORY_INFERENCES = 3
_DEPTH_RUNS = 3
_ENERGY_SECONDS = 2.0


def take_alone(record: Record, kind: Kind, work: Work) -> None:
    """One launch of a subject that nothing else lives beside."""
    if record.failure is None:
        relaunching([record], lambda: _alone(record, kind, work))


def _alone(record: Record, kind: Kind, work: Work) -> None:
    take: dict[str, Callable[[Record, Worker, Work], None]] = {
        "cold": _take_cold, "memory": _take_memory, "depth": _take_depths, "sustained": _take_sustained,
    }  # fmt: skip
    with record.catching():
        with LoadProbe() as probe, work.open(record, cold=kind == "cold") as worker:
            record.info = info = worker.info()
            refuse(info, work)
            take[kind](record, worker, work)
        record.loads.append(load_of(worker, probe.result))


def _take_cold(record: Record, worker: Worker, work: Work) -> None:
    if worker.cold_load_seconds is None:
        record.missing["load_cold_ms"] = f"not cold: {worker.cold_reason}"
    else:
        record.add("load_cold_ms", [worker.load_seconds * 1e3])


def _take_memory(record: Record, worker: Worker, work: Work) -> None:
    limit = work.config.max_seconds
    worker.time_forward(work.ids, work.mask, repeats=_MEMORY_INFERENCES, warmup=0, max_seconds=limit)
    if work.generation:
        worker.time_decode(work.prompt, work.config.new_tokens, repeats=1, warmup=0, max_seconds=limit)
    found = worker.memory()
    _add_memory(record, found)
    _take_energy(record, worker, work)


def _add_memory(record: Record, found: dict[str, Any]) -> None:
    """Peaks, minus what the runtime has without a model, and the parts that loading and running have in them."""
    names = ("baseline_bytes", "load_memory_bytes", "run_memory_bytes", "peak_anonymous_bytes", "peak_memory_bytes",
             "peak_file_backed_bytes")  # fmt: skip
    if found.get("peak_rss") is not None:
        record.add("peak_rss_bytes", [float(found["peak_rss"])])
    else:
        record.missing["peak_rss_bytes"] = "this system does not tell the peak of resident memory"
    if any(found.get(key) is None for key in ("baseline_anonymous", "peak_anonymous", "peak_file_backed")):
        record.missing |= dict.fromkeys(names, "this system does not tell anonymous from file-backed memory")
        return
    baseline = found["baseline_anonymous"]
    anonymous = max(0, found["peak_anonymous"] - baseline)
    files = max(0, found["peak_file_backed"] - (found.get("baseline_file_backed") or 0))
    record.add("baseline_bytes", [float(baseline)])
    record.add("peak_anonymous_bytes", [float(anonymous)])
    record.add("peak_file_backed_bytes", [float(files)])
    record.add("peak_memory_bytes", [float(anonymous + files)])
    for phase in ("load", "run"):
        value = found.get(f"{phase}_anonymous")
        if value is None:
            record.missing[f"{phase}_memory_bytes"] = f"the worker does not tell the peak of its {phase} phase"
        else:
            record.add(f"{phase}_memory_bytes", [float(max(0, value - baseline))])


def _take_energy(record: Record, worker: Worker, work: Work) -> None:
    """Joules of what the memory launch goes on doing, and what the other sensors say at its start and end."""
    names = ("energy_per_run_j", *(("energy_per_token_j",) if work.generation else ()))
    before = worker.sensors()
    if before is None:
        reason = "the worker has no sensors operation"
        record.missing |= dict.fromkeys((*names, "temperature_c", "frequency_mhz", "throttling_events"), reason)
        return
    record.sensors.append(before)
    repeats = work.config.repeats
    if not before.get("energy_j"):
        after, reason = before, str(before.get("reasons", {}).get("energy_j", "no energy sensor"))
        record.missing |= dict.fromkeys(names, reason)
    else:
        runs = worker.time_forward(work.ids, work.mask, repeats=repeats, warmup=0, max_seconds=_ENERGY_SECONDS)
        after = worker.sensors() or before
        _add_energy(record, "energy_per_run_j", before, after, len(runs))
        if work.generation:
            start = worker.sensors() or after
            done = worker.time_decode(
                work.prompt, work.config.new_tokens, repeats=repeats, warmup=0, max_seconds=_ENERGY_SECONDS
            )
            after = worker.sensors() or start
            _add_energy(record, "energy_per_token_j", start, after, len(done) * work.config.new_tokens)
        record.sensors.append(after)
    _add_sensors(record, before, after)


def _add_energy(record: Record, metric: str, before: dict[str, Any], after: dict[str, Any], count: int) -> None:
    joules, reason = energy_between(before, after)
    if joules is None:
        record.missing[metric] = str(reason)
    else:
        record.add(metric, [joules / count])


def _add_sensors(record: Record, before: dict[str, Any], after: dict[str, Any]) -> None:
    reasons = after.get("reasons", {})
    hot, clock = after.get("temperature_c"), after.get("frequency_mhz")
    if hot:
        record.add("temperature_c", [max(hot.values())])
    if clock:
        record.add("frequency_mhz", [sum(clock.values()) / len(clock)])
    counted = {name for name in after.get("throttling") or () if name.endswith("_count")}
    if counted:
        old = before.get("throttling") or {}
        record.add("throttling_events", [sum(after["throttling"][name] - old.get(name, 0) for name in counted)])
    for metric, name, found in (("temperature_c", "temperature_c", hot), ("frequency_mhz", "frequency_mhz", clock),
                                ("throttling_events", "throttling", counted)):  # fmt: skip
        if not found:
            record.missing[metric] = str(reasons.get(name, "no counter of throttling events"))


def _take_depths(record: Record, worker: Worker, work: Work) -> None:
    """Decode speed after so many tokens: the prompt is as long as the depth, and only what follows is counted."""
    assert record.info is not None
    new_tokens = max(2, work.config.new_tokens)
    for depth in work.config.depths:
        length = max(1, depth)
        if length + new_tokens > record.info.max_length:
            reason = f"takes at most {record.info.max_length} tokens, depth {depth} needs {length + new_tokens}"
            record.missing[f"depth {depth}"] = reason
            continue
        prompt = [int(token) for token in np.resize(work.ids.ravel(), length)]
        runs = worker.time_decode(
            prompt, new_tokens, repeats=_DEPTH_RUNS + 1, warmup=0, max_seconds=work.config.max_seconds
        )
        kept = after_first(runs, True)
        record.depths[depth] = [len(run["tokens_s"]) / sum(run["tokens_s"]) for run in kept]


def _take_sustained(record: Record, worker: Worker, work: Work) -> None:
    """The same work again and again for ``config.sustained_seconds``, sensors read at the start and at the end."""
    times: list[float] = []
    if (reading := worker.sensors()) is not None:
        record.sensors.append(reading)
    wanted, spent = work.config.sustained_seconds, 0.0
    while spent < wanted:
        left = wanted - spent
        if work.generation:
            runs = worker.time_decode(
                work.prompt, work.config.new_tokens, repeats=1000, warmup=0, max_seconds=min(5.0, left)
            )
            new = [float(run["first_s"] + sum(run["tokens_s"])) for run in runs]
        else:
            new = worker.time_forward(work.ids, work.mask, repeats=100_000, warmup=0, max_seconds=min(5.0, left))
        times += new
        spent += sum(new)
    if (reading := worker.sensors()) is not None:
        record.sensors.append(reading)
    record.add("sustained_latency_ms", [seconds * 1e3 for seconds in times])
