"""The result file of ``onnxruntime_perf_test MODEL RESULT_FILE``: a line an inference, ``model,seconds,peak working set
in bytes,average CPU usage in per cent,number of the run``, with ``-s`` a few lines of percentiles behind them.
Format: ``PerformanceResult::DumpToFile`` in ONNX Runtime's ``onnxruntime/test/perftest/performance_runner.h``."""

from __future__ import annotations

from ..records import Measurement
from .rows import Origin, Row, model_name, numbers

__all__ = ["is_ours", "rows"]

_COLUMNS = 5


def is_ours(text: str) -> bool:
    """Whether the first line has the columns."""
    return _split(text.lstrip().partition("\n")[0]) is not None


def rows(text: str, origin: Origin) -> list[Measurement]:
    """Latency of every inference, and peak memory of the process. Runs appended to one file are launches apart."""
    runs: list[list[float]] = []
    peaks: list[float] = []
    name, usage = "", ""
    for line in text.splitlines():
        found = _split(line)
        if found is None:
            if line.strip() and "Latency is" not in line:
                raise ValueError(f"a line that is no inference: {line[:60]!r}")
            continue
        model, seconds, peak, cpu, number = found
        if number == 0:
            runs.append([])
        if not runs:
            raise ValueError("the first run is missing")
        name, usage = name or model, cpu
        runs[-1].append(seconds)
        peaks.append(peak)
    row = Row(
        origin, "onnxruntime_perf_test", model_name(name, "model"), origin.device_of(None), "onnxruntime", "", "",
        0, {"average_cpu_percent": usage, "baseline": "not subtracted: memory is of the whole process"},
    )  # fmt: skip
    samples = [numbers(run, scale=1e3, what="seconds") for run in runs]
    latency = row("latency_ms", [value for run in samples for value in run])
    found_rows = [_launches(latency, samples)]
    if max(peaks) > 0:
        found_rows.append(row("peak_memory_bytes", [max(peaks)], "max"))
    return found_rows


def _launches(row: Measurement, samples: list[list[float]]) -> Measurement:
    """The same row with its samples a list a launch, so that the interval is over launches."""
    from dataclasses import replace

    from ..statistics import summarise

    return replace(row, samples=tuple(tuple(run) for run in samples), summary=summarise(samples, "median"))


def _split(line: str) -> tuple[str, float, float, str, int] | None:
    parts = line.strip().rsplit(",", _COLUMNS - 1)
    if len(parts) != _COLUMNS:
        return None
    try:
        return parts[0], float(parts[1]), float(int(parts[2])), parts[3], int(parts[4])
    except ValueError:
        return None
