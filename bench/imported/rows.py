"""From numbers in a foreign file to a row of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ...errors import UsageError
from ..metrics import METRICS
from ..records import Measurement, Summary
from ..statistics import summarise

__all__ = ["Origin", "Row", "model_name", "numbers"]

_MOST_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Origin:
    """Where rows come from: the file, and what the user says of them."""

    path: Path
    device: str | None
    subject: str | None
    artifact_id: str

    def device_of(self, told: str | None) -> str:
        """The device: as the user says, else as the file does; :class:`UsageError` when neither does."""
        found = (self.device or told or "").strip()
        if not found:
            raise UsageError(f"{self.path} does not say which device it is from", hint="--device 'Galaxy S24 (family)'")
        return found


@dataclass(frozen=True)
class Row:
    """What all rows of one file (or of one test in it) share."""

    origin: Origin
    tool: str
    subject: str
    device: str
    runtime: str
    version: str
    backend: str
    threads: int
    protocol: Mapping[str, Any]
    placement: Mapping[str, int] | None = None
    context: int | None = None
    kv_dtype: str | None = None

    def __call__(
        self, metric: str, samples: Sequence[float], statistic: Literal["median", "max", "exact"] = "median",
        **protocol: Any,
    ) -> Measurement:  # fmt: skip
        """A measured row of ``samples`` in the metric's unit."""
        return self._make(metric, summarise([samples], statistic), (tuple(samples),), protocol)

    def reported(
        self, metric: str, value: float, statistic: Literal["median", "derived"], **protocol: Any
    ) -> Measurement:
        """A measured row of which the tool keeps the ``statistic`` alone, and no sample."""
        return self._make(metric, Summary(value, statistic, 1), (), {**protocol, "samples": "not kept by the tool"})

    def _make(
        self, metric: str, summary: Summary, samples: tuple[tuple[float, ...], ...], protocol: Mapping[str, Any]
    ) -> Measurement:
        return Measurement(
            subject=self.origin.subject or self.subject, metric=metric, unit=METRICS[metric].unit, source="measured",
            summary=summary, samples=samples, artifact_id=self.origin.artifact_id, runtime=self.runtime,
            runtime_version=self.version, backend=self.backend, device=self.device, threads=self.threads,
            protocol={**self.protocol, **protocol, "file": self.origin.path.name}, environment={},
            placement=dict(self.placement or {}), context=self.context, kv_dtype=self.kv_dtype,
            target=f"import:{self.tool}", origin=self.tool,
        )  # fmt: skip


def numbers(values: Any, *, scale: float = 1.0, divide: float = 1.0, what: str) -> list[float]:
    """``values`` as finite positive numbers times ``scale`` over ``divide``; ``ValueError`` for anything else."""
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_SAMPLES:
        raise ValueError(f"{what} is no list of samples")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not (v > 0 and math.isfinite(v)) for v in values):
        raise ValueError(f"{what} holds something else than positive numbers")
    return [float(v) * scale / divide for v in values]


def model_name(path: str, fallback: str) -> str:
    """The name of a model file without folders and extension, whatever system it was written on."""
    name = PurePosixPath(path.replace("\\", "/")).name
    stem = name.rsplit(".", 1)[0] if "." in name[1:] else name
    shown = "".join(c if c.isprintable() else "�" for c in stem).strip()
    return (shown or fallback)[:200]
