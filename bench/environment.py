"""The machine that a number was taken on, and how busy it was meanwhile. No host, user or network names.

What a machine doesn't tell (a frequency governor inside a virtual machine) is ``None`` beside a reason.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..runtimes.machine import machine_facts, usable_threads

__all__ = ["BUSY_FRACTION", "LoadProbe", "describe_environment", "device_label", "package_versions", "usable_threads"]

# Share of all cores that other processes (or the hypervisor) may use before timings are flagged.
BUSY_FRACTION = 0.10

_PACKAGES = (
    "edgestill", "numpy", "scipy", "torch", "transformers", "accelerate", "tokenizers", "optimum", "onnx",
    "onnxruntime", "onnxscript", "coremltools", "gguf", "llama-cpp-python",
)  # fmt: skip


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of those packages that decide results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_environment(*, root: Path = Path("/"), versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The machine as plain JSON: system, processor, cores, memory, governor, versions.

    ``root`` is where ``proc`` and ``sys`` are looked for (a test or a board's copy). Sizes are in bytes.
    """
    import psutil

    facts = machine_facts(root=root)
    if facts["cores_physical"] is None:
        facts["cores_physical"] = psutil.cpu_count(logical=False)
    return {**facts, "versions": dict(versions) if versions is not None else package_versions()}


def device_label(environment: Mapping[str, Any]) -> str:
    """One line for a human: ``"Intel(R) Xeon(R) … (Linux x86_64, 2 cores)"``, with the browser where one ran it."""
    cpu = environment.get("cpu") or "unknown processor"
    label = f"{cpu} ({environment['system']} {environment['machine']}, {environment['cores_usable']} cores)"
    return f"{label}, {environment['browser']}" if environment.get("browser") else label


class LoadProbe:
    """How much of the machine *other* processes used while a block ran.

    The load average can't tell: it counts our own worker. Here the processor time of this process and of the children
    that it has waited for is subtracted from that of the whole machine. ``result`` holds ``load_1m_before``,
    ``load_1m_after``, ``others_fraction`` and ``steal_fraction`` (of all cores, 0–1) and ``busy``.
    """

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}

    def __enter__(self) -> LoadProbe:
        self._load = _load_average()
        self._start = (time.perf_counter(), *_machine_seconds(), _own_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, steal = time.perf_counter(), *_machine_seconds()
        cores = os.cpu_count() or 1
        room = max(wall - self._start[0], 1e-9) * cores
        ours = _own_seconds() - self._start[3]
        # Kernel ticks are 10 ms: blocks shorter than a few of them would show noise, not neighbours.
        others = max(0.0, busy - self._start[1] - ours) / room
        stolen = max(0.0, steal - self._start[2]) / room
        self.result = {
            "load_1m_before": self._load,
            "load_1m_after": _load_average(),
            "others_fraction": round(min(others, 1.0), 4),
            "steal_fraction": round(min(stolen, 1.0), 4),
            "busy": others > BUSY_FRACTION or stolen > BUSY_FRACTION,
        }


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _machine_seconds() -> tuple[float, float]:
    """Seconds that all cores together have been busy, and that a hypervisor has taken away."""
    import psutil

    times = psutil.cpu_times()
    steal = float(getattr(times, "steal", 0.0))
    busy = float(times.user + times.system + getattr(times, "nice", 0.0))
    return busy + float(getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)), steal


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
