"""How much memory a worker will take, and whether a device has it: the bytes of the artifact, the cache of keys and
values, and what the runtime adds, from measurements of ours (``devices/memory.csv``).

llama.cpp maps its file (pages that the system may drop and read again) and adds buffers of its own; ONNX Runtime
copies weights, some of them in a second layout, into memory that can't be dropped. What a process can't give back is
what gets it killed. Above the runtime's baseline in all figures, as in measured ones.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from .predict_efficiency import LEVEL, Spread
from .predict_work import Work

__all__ = ["MemoryModel", "MemoryPoint", "fit_memory", "leave_one_out", "load_memory_points"]


@dataclass(frozen=True)
class MemoryPoint:
    """One measurement: memory above the baseline of a worker that had opened ``model_bytes`` and run it."""

    runtime: str
    artifact: str
    model_bytes: float
    kv_bytes: float
    anonymous_bytes: float
    file_backed_bytes: float


@dataclass(frozen=True)
class MemoryModel:
    """``grows``: anonymous memory is a multiple of the model's size, else a constant; both in logs with a spread."""

    grows: bool
    mean: float
    variance: float
    points: int
    file_factor: float
    file_extra_bytes: float

    def anonymous(self, work: Work, kv_bytes: float) -> Spread:
        """Peak anonymous memory in bytes."""
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, self.points - 1)) * math.sqrt(self.variance * (1 + 1 / self.points))
        scale = work.model_bytes if self.grows else 1.0
        low, value, high = (scale * math.exp(x) + kv_bytes for x in (self.mean - half, self.mean, self.mean + half))
        return Spread(value, low, high, LEVEL, True, self.points, 1)

    def file_backed(self, work: Work) -> float:
        """Peak file-backed memory in bytes."""
        return self.file_factor * work.model_bytes + self.file_extra_bytes


@cache
def load_memory_points() -> tuple[MemoryPoint, ...]:
    """What was measured, see ``devices/memory.csv``."""
    text = (resources.files("edgestill.bench") / "devices" / "memory.csv").read_text(encoding="utf-8")
    return tuple(
        MemoryPoint(
            row["runtime"], row["artifact"], float(row["model_bytes"]), float(row["kv_bytes"]),
            float(row["anonymous_bytes"]), float(row["file_backed_bytes"]),
        )
        for row in csv.DictReader(io.StringIO(text))
    )  # fmt: skip


def fit_memory(points: Sequence[MemoryPoint]) -> Mapping[str, MemoryModel]:
    """A model for each runtime that at least three measurements are known of."""
    found = {}
    for runtime in sorted({point.runtime for point in points}):
        rows = [point for point in points if point.runtime == runtime]
        if len(rows) < 3:
            continue
        maps = runtime == "llama.cpp"
        own = np.array([math.log((p.anonymous_bytes - p.kv_bytes) / (1 if maps else p.model_bytes)) for p in rows])
        extra = np.array([p.file_backed_bytes - (p.model_bytes if maps else 0) for p in rows])
        found[runtime] = MemoryModel(
            not maps, float(own.mean()), float(own.var(ddof=1)), len(rows), float(maps), float(extra.mean())
        )
    return found


def leave_one_out(points: Sequence[MemoryPoint]) -> list[float]:
    """Signed relative errors of the anonymous memory of each point, predicted by the others."""
    errors = []
    for point in points:
        model = fit_memory([p for p in points if p is not point]).get(point.runtime)
        if model is not None:
            scale = point.model_bytes if model.grows else 1.0
            errors.append((scale * math.exp(model.mean) + point.kv_bytes) / point.anonymous_bytes - 1)
    return errors
