"""Measurements made of what was taken: one row a metric, each with how it was measured and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..recipe import BenchConfig
from .environment import device_label
from .metrics import METRICS
from .paired import half_width, noise_floor, paired_ratio
from .percentiles import CONFIDENCE, early_stopping_bound, needed_samples
from .records import Measurement, Summary
from .statistics import summarise
from .taking import WARMUP, Record

__all__ = ["Place", "exact_row", "floors", "protocol_of", "rows_of", "settled"]

_SPEED = ("load_ms", "import_ms", "first_inference_ms", "latency_ms", "load_cold_ms")
_GENERATION = ("time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "token_latency_ms")
_MEMORY = ("peak_memory_bytes", "peak_anonymous_bytes", "peak_file_backed_bytes", "baseline_bytes",
           "load_memory_bytes", "run_memory_bytes", "peak_rss_bytes")  # fmt: skip
_SENSORS = ("energy_per_run_j", "temperature_c", "frequency_mhz", "throttling_events")
_DECIDING = ("latency_ms", "decode_tokens_per_s")


@dataclass(frozen=True)
class Place:
    """Where numbers were taken: the target as typed, what its numbers are, and its machine."""

    environment: Mapping[str, Any]
    target: str = "host"
    source: Literal["measured", "emulated", "predicted"] = "measured"


def settled(records: Sequence[Record], control: Record | None, resolution: float) -> bool:
    """Whether every subject's ratio to the first one is known to half of ``resolution``, and the A/A ratio too."""
    alive = [record for record in records if record.failure is None]
    sides = alive[1:] + ([control] if control is not None and control.failure is None else [])
    for other in sides:
        base = next((r for r in alive if other is control and r.identity == other.identity), alive[0])
        for metric in _DECIDING:
            a, b = other.samples.get(metric), base.samples.get(metric)
            if not a or not b:
                continue
            if min(len(a), len(b)) < 2:
                return False
            if half_width(paired_ratio(a, b, better=METRICS[metric].better)) > resolution / 2:
                return False
    return True


def floors(record: Record | None, control: Record | None) -> dict[str, float]:
    """The A/A floor of each metric that two launches or more were taken of."""
    if record is None or control is None or record.failure or control.failure:
        return {}
    found = {}
    for metric, samples in record.samples.items():
        again = control.samples.get(metric, [])
        if METRICS[metric].kind == "speed" and min(len(samples), len(again)) >= 2:
            found[metric] = noise_floor(samples, again, better=METRICS[metric].better)
    return found


def protocol_of(
    config: BenchConfig, shape: tuple[int, int], record: Record | None, control: Record | None, *, together: bool,
    launches: int,
) -> dict[str, Any]:  # fmt: skip
    """How it was measured. ``noise_floor`` is that of latency; each row has its own metric's."""
    found, reason = floors(record, control), None
    if record is None:
        reason = "no subject can be timed on this machine"
    elif failure := record.failure or (control.failure if control else None):
        reason = f"{record.subject.name} could not be measured: {failure}"
    elif not found:
        reason = "a single launch has no noise floor"
    return {
        "order": "interleaved ABBA" + (", side by side in turns" if together else ", one process after the other"),
        "seed": config.seed,
        "launches": launches,
        "repeats": config.repeats,
        "warmup": WARMUP,
        "max_seconds": config.max_seconds,
        "batch_size": shape[0],
        "length": shape[1],
        "new_tokens": config.new_tokens,
        "resolution": config.resolution,
        "noise_floor": found.get("latency_ms"),
        "noise_floors": found,
        "noise_floor_subject": record.subject.name if record else None,
        "noise_floor_reason": reason,
        "memory": "in a launch of its own",
        "cold_load": "model files evicted from the page cache; the runtime's libraries stay cached",
    }


def rows_of(
    record: Record, config: BenchConfig, protocol: Mapping[str, Any], place: Place, *, generation: bool
) -> list[Measurement]:  # fmt: skip
    """All rows of one subject."""
    names = [*_SPEED, *(_GENERATION if generation else ()), *_MEMORY, *_SENSORS]
    names += ["energy_per_token_j"] if generation else []
    rows = [_row(record, name, config, protocol, place) for name in names]
    rows += [_percentile(record, percentile, config, protocol, place) for percentile in config.percentiles]
    if config.sustained_seconds:
        rows += _sustained(record, config, protocol, place)
    if generation:
        rows += [_depth(record, depth, config, protocol, place) for depth in config.depths]
    return rows


def exact_row(record: Record, metric: str, value: float | None, place: Place) -> Measurement:
    """A size: known, not measured."""
    samples = ((float(value),),) if value is not None else ()
    summary = summarise(samples, "exact") if samples else None
    return _measurement(record, metric, summary, samples, None, {"how": "file sizes"}, place)


def _row(
    record: Record, metric: str, config: BenchConfig, protocol: Mapping[str, Any], place: Place
) -> Measurement:  # fmt: skip
    samples = tuple(tuple(launch) for launch in record.samples.get(metric, []))
    summary = None
    if samples and record.failure is None and metric not in record.missing:
        statistic: Literal["median", "max"] = "max" if METRICS[metric].kind == "memory" else "median"
        summary = summarise(samples, statistic)
    return _measurement(record, metric, summary, samples, config, protocol, place)


def _percentile(
    record: Record, percentile: int, config: BenchConfig, protocol: Mapping[str, Any], place: Place
) -> Measurement:  # fmt: skip
    """The percentile of all latencies, with LoadGen's bound as the upper end; too few samples are no percentile."""
    name = f"latency_p{percentile}_ms"
    values = [value for launch in record.samples.get("latency_ms", []) for value in launch]
    bound = early_stopping_bound(values, percentile)
    summary = None
    if bound is None:
        need = needed_samples(percentile)
        record.missing[name] = f"{len(values)} samples: the {percentile}th percentile needs {need}"
    elif record.failure is None:
        value = float(np.quantile(values, percentile / 100, method="higher"))
        summary = Summary(value, "derived", len(values), None, max(value, bound), CONFIDENCE)
    how = {**protocol, "of": "latency_ms", "bound": "early stopping of MLPerf LoadGen, one-sided"}
    return _measurement(record, name, summary, (), config, how, place)


def _sustained(
    record: Record, config: BenchConfig, protocol: Mapping[str, Any], place: Place
) -> list[Measurement]:  # fmt: skip
    """The long run's times, and its last quarter's speed over its first quarter's."""
    times = _row(record, "sustained_latency_ms", config, protocol, place)
    values = np.array([value for launch in times.samples for value in launch])
    summary = None
    if len(values) < 8:
        record.missing["sustained_speed_ratio"] = f"{len(values)} inferences in {config.sustained_seconds:g} s: too few"
    elif record.failure is None:
        ends = np.cumsum(values) / values.sum()
        first, last = values[ends <= 0.25], values[ends > 0.75]
        if len(first) and len(last):
            summary = Summary(float(first.mean() / last.mean()), "derived", len(values))
        else:
            record.missing["sustained_speed_ratio"] = "one inference lasts longer than a quarter of the time"
    how = {**protocol, "of": "sustained_latency_ms", "seconds": config.sustained_seconds}
    return [times, _measurement(record, "sustained_speed_ratio", summary, (), config, how, place)]


def _depth(
    record: Record, depth: int, config: BenchConfig, protocol: Mapping[str, Any], place: Place
) -> Measurement:  # fmt: skip
    name = "decode_at_depth_tokens_per_s"
    samples = (tuple(record.depths[depth]),) if depth in record.depths else ()
    summary = summarise(samples, "median") if samples and record.failure is None else None
    reason = record.missing.get(f"depth {depth}")
    how = {**protocol, "depth": depth}
    return _measurement(record, name, summary, samples, config, how, place, context=depth, reason=reason)


def _measurement(
    record: Record, metric: str, summary: Summary | None, samples: tuple[tuple[float, ...], ...],
    config: BenchConfig | None, protocol: Mapping[str, Any], place: Place, *, context: int | None = None,
    reason: str | None = None,
) -> Measurement:  # fmt: skip
    info, environment = record.info, dict(place.environment)
    if summary is None:
        reason = record.failure or reason or record.missing.get(metric) or "not taken"
    if config is not None:
        environment["machine_load"] = record.loads
        environment["busy"] = any(load["busy"] for load in record.loads)
        environment["unsteady_warmups"] = record.unsteady
        if record.cut:
            environment["launches_cut"] = record.cut
        if record.sensors:
            environment["sensors"] = [record.sensors[0], record.sensors[-1]]
        protocol = {**protocol, "noise_floor": protocol["noise_floors"].get(metric, protocol["noise_floor"])}
    if context is None and "length" in protocol:
        context = int(protocol["length"])
    return Measurement(
        subject=record.subject.name, metric=metric, unit=METRICS[metric].unit, source=place.source, summary=summary,
        samples=samples, artifact_id=record.identity, runtime=info.runtime if info else record.runtime,
        runtime_version=info.version if info else "", backend=info.backend if info else "",
        device=device_label(place.environment), threads=config.threads if config else 0, protocol=protocol,
        environment=environment, context=context, placement=info.placement if info else {},
        reason=reason if summary is None else None, target=place.target,
    )  # fmt: skip
