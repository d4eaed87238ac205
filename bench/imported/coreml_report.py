"""A note of Xcode's Core ML performance report: what its window shows, written down as JSON by whoever reads it.

Xcode's own ``.mlperf`` files have no published format, so they are not read. The report shows the median of
predictions, of loading and of compiling; a list of times from the Instruments trace may stand in place of a median::

    {"tool": "xcode-coreml-performance-report", "model": "model.mlpackage", "device": "iPhone 15 Pro",
     "os": "iOS 18.5", "compute_units": "all", "prediction_ms": 2.31, "load_ms": 120.4, "compile_ms": 310.0,
     "operations": {"NeuralEngine": 412, "CPU": 3}}
"""

from __future__ import annotations

from typing import Any

from ...errors import nearest
from ..records import Measurement
from .rows import Origin, Row, model_name, numbers

__all__ = ["TOOL", "is_ours", "rows"]

TOOL = "xcode-coreml-performance-report"
_KEYS = ("tool", "model", "device", "os", "compute_units", "prediction_ms", "load_ms", "compile_ms", "operations")


def is_ours(document: Any) -> bool:
    """Whether a JSON document says that it is such a note."""
    return isinstance(document, dict) and document.get("tool") == TOOL


def rows(document: Any, origin: Origin) -> list[Measurement]:
    """Latency and load time."""
    for key in document:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}: {nearest(key, list(_KEYS))}")
    texts = {key: document.get(key, "") for key in ("model", "device", "os", "compute_units")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("model, device, os and compute_units are text")
    operations = document.get("operations", {})
    if not isinstance(operations, dict) or not all(isinstance(n, int) and n >= 0 for n in operations.values()):
        raise ValueError("operations are a number for each compute unit")
    row = Row(
        origin, "xcode", model_name(texts["model"], "model"), origin.device_of(texts["device"]), "coreml",
        texts["os"], texts["compute_units"], 0, {"compile_ms": document.get("compile_ms"), "batch_size": 1},
        placement={str(unit): count for unit, count in operations.items()},
    )  # fmt: skip
    found = []
    for metric, key in (("latency_ms", "prediction_ms"), ("load_ms", "load_ms")):
        value = document.get(key)
        if isinstance(value, list):
            found.append(row(metric, numbers(value, what=key)))
        elif value is not None:
            found.append(row.reported(metric, numbers([value], what=key)[0], "median"))
    return found
