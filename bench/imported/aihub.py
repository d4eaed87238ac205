"""Qualcomm AI Hub: the JSON that ``ProfileJob.download_profile`` of the ``qai-hub`` client writes (0.56). Times are
in microseconds, memory in bytes; -1 and ``null`` stand for what was not taken. The file does not name the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..records import Measurement
from .rows import Origin, Row, model_name, numbers

__all__ = ["is_ours", "rows"]

_MOST_LAYERS = 1_000_000
_WHOLE = "not subtracted: memory is of the whole process"


def is_ours(document: Any) -> bool:
    """Whether a JSON document has the shape."""
    return isinstance(document, dict) and isinstance(document.get("execution_summary"), dict)


def rows(document: Any, origin: Origin) -> list[Measurement]:
    """Latency, first and warm load time, peak memory, and on which units the layers ran."""
    summary: dict[str, Any] = document["execution_summary"]
    layers = document.get("execution_detail") or []
    if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
        raise ValueError("execution_detail is no list")
    units = Counter(
        str(layer["compute_unit"]) for layer in layers if isinstance(layer, dict) and "compute_unit" in layer
    )
    row = Row(
        origin, "ai-hub", model_name(origin.path.name, "model"), origin.device_of(None), "ai-hub", "",
        "+".join(sorted(units)) or "", 0, {"batch_size": 1}, placement=dict(units),
    )  # fmt: skip
    found = []
    for metric, samples, single in (
        ("latency_ms", "all_inference_times", "estimated_inference_time"),
        ("load_ms", "all_warm_load_times", "warm_load_time"),
        ("load_cold_ms", "all_first_load_times", "first_load_time"),
    ):
        if summary.get(samples):
            found.append(row(metric, numbers(summary[samples], divide=1e3, what=samples)))
        elif _taken(summary.get(single)):
            value = numbers([summary[single]], divide=1e3, what=single)[0]
            found.append(row.reported(metric, value, "derived", field=single))
    for key in ("inference_memory_peak_range", "estimated_inference_peak_memory"):
        told = summary.get(key)
        ends = told if isinstance(told, list) else [told]
        if ends and all(_taken(end) for end in ends):
            found.append(row("peak_memory_bytes", [max(numbers(ends, what=key))], "max", baseline=_WHOLE, field=key))
            break
    return found


def _taken(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
