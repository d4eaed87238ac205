"""How other runtimes compare with llama.cpp, measured here: the bridge from published speeds to ONNX Runtime.

Nearly all published speeds are llama.cpp's. Measured side by side on one machine, the same model in two runtimes gives
the ratio of the bandwidth (decoding) or arithmetic (prompts) that they reach; neither the machine's bandwidth nor its
clock enters. That ratio is carried to other devices with the doubt that it deserves: as much as devices of one kind
differ among themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, UsageError
from ..fetch import cache_folder
from ..files import atomic_write, read_json
from .points import load_points
from .predict_compute import compute_points, fit_compute
from .predict_efficiency import fit_efficiency
from .predict_work import Work
from .records import Measurement

__all__ = ["Calibration", "Ratio", "calibrate", "calibration_file", "load_calibration", "save_calibration"]

_VERSION = 1


@dataclass(frozen=True)
class Ratio:
    """Log of one runtime's speed over llama.cpp's at equal bytes or operations, its variance, and the subjects."""

    engine: str
    what: str
    log_ratio: float
    variance: float
    subjects: int


@dataclass(frozen=True)
class Calibration:
    """Ratios measured on one ``machine`` (``device_label``), ``busy`` when others used it meanwhile."""

    machine: str
    busy: bool
    ratios: tuple[Ratio, ...]
    schema_version: int = _VERSION

    def ratio(self, engine: str, what: str) -> tuple[float, float] | None:
        """The factor on speed and the variance of its log, with what it costs to carry it to another device."""
        found = next((r for r in self.ratios if (r.engine, r.what) == (engine, what)), None)
        if found is None:
            return None
        carried = fit_efficiency(load_points()).kinds["cpu"].device_variance
        return math.exp(found.log_ratio), found.variance + carried


def calibration_file() -> Path:
    """Where the calibration of this machine lies."""
    return cache_folder() / "calibration.json"


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write it, whole or not at all."""
    path = path or calibration_file()
    atomic_write(path, json.dumps(dataclasses.asdict(calibration), indent=2, allow_nan=False) + "\n")
    return path


def load_calibration(path: Path | None = None) -> Calibration | None:
    """The calibration of this machine, ``None`` when there is none; :class:`BadInput` for a damaged file."""
    path = path or calibration_file()
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        if raw["schema_version"] != _VERSION:
            raise ValueError(f"version {raw['schema_version']!r}")
        ratios = tuple(Ratio(**row) for row in raw["ratios"])
        if not all(math.isfinite(r.log_ratio) and r.variance >= 0 for r in ratios):
            raise ValueError("a ratio is no number")
        return Calibration(str(raw["machine"]), bool(raw["busy"]), ratios)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no calibration: {error}", hint="edgestill devices calibrate") from None


def calibrate(works: Mapping[str, Work], rows: Sequence[Measurement], *, machine: str) -> Calibration:
    """Ratios from measured ``rows`` of subjects whose ``works`` are known; :class:`UsageError` without a llama.cpp
    subject and one of another runtime that were measured together."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    slope = fit_efficiency(load_points()).slope
    size_slope = fit_compute(compute_points()).slope
    busy = False
    for row in rows:
        work = works.get(row.subject)
        if work is None or row.summary is None or row.source != "measured":
            continue
        logs, what = _logs(row, work, slope, size_slope)
        if logs:
            found.setdefault((work.engine, what), {}).setdefault(row.subject, []).extend(logs)
            busy = busy or bool(row.environment.get("busy"))
    ratios = []
    for (engine, what), subjects in sorted(found.items()):
        base = found.get(("llama.cpp", what))
        if engine == "llama.cpp" or not base:
            continue
        mine, theirs = _level(subjects), _level(base)
        ratios.append(Ratio(engine, what, mine[0] - theirs[0], mine[1] + theirs[1], len(subjects)))
    if not ratios:
        raise UsageError(
            "nothing to compare: no artifact of llama.cpp and of another runtime were measured together",
            hint="edgestill devices calibrate GGUF-ARTIFACT ONNX-ARTIFACT, of one model",
        )
    return Calibration(machine, busy, tuple(ratios))


def _logs(row: Measurement, work: Work, slope: float, size_slope: float) -> tuple[list[float], str]:
    """Log speed of each launch per byte or operation, as if at 8 bits a weight (or at equal size)."""
    medians = [float(np.median(launch)) for launch in row.samples if launch]
    protocol: Mapping[str, Any] = row.protocol
    length = int(protocol.get("length", 0) or 0)
    if row.metric == "decode_tokens_per_s":
        per_token = work.bytes_per_token(length + int(protocol.get("new_tokens", 0) or 0) / 2)
        offset = math.log(per_token) - slope * math.log2(work.bits / 8)
        return [math.log(value) + offset for value in medians if value > 0], "decode"
    per_token = 2 * work.weights
    offset = math.log(per_token) - size_slope * math.log(work.weights)
    if row.metric == "prefill_tokens_per_s":
        return [math.log(value) + offset for value in medians if value > 0], "prefill"
    if row.metric == "latency_ms" and work.task != "text-generation" and length:
        return [math.log(length / value * 1e3) + offset for value in medians if value > 0], "prefill"
    return [], ""


def _level(subjects: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Mean over subjects and the variance of that mean; of one subject its launches' variance."""
    means = [float(np.mean(logs)) for logs in subjects.values()]
    if len(means) > 1:
        return float(np.mean(means)), float(np.var(means, ddof=1) / len(means))
    (logs,) = subjects.values()
    return means[0], float(np.var(logs, ddof=1) / len(logs)) if len(logs) > 1 else 0.0
