"""What the bench writes down: measurements and verdicts, a JSON object a line, nothing derived without its samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput
from ..files import atomic_write, canonical_json

__all__ = [
    "Check",
    "Measurement",
    "Summary",
    "Verdict",
    "read_measurements",
    "read_verdicts",
    "verdict_from_json",
    "write_measurements",
]

MEASUREMENT_VERSION = 1
VERDICT_VERSION = 1


@dataclass(frozen=True)
class Summary:
    """Of the samples: ``value`` (the headline, by ``statistic``), a confidence interval ``low``–``high`` at ``level``,
    ``n`` samples; ``percentiles`` holds only those that ``n`` supports (``{"p90": …}``).

    ``derived``: not a reduction of samples of its own but of all examples together (Spearman over pairs, a percentile
    of another metric's samples); ``protocol`` then says of what.
    """

    value: float
    statistic: Literal["median", "mean", "max", "sum", "exact", "geometric_mean", "derived"]
    n: int
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    percentiles: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One quantity of one subject (an artifact, or a model folder run by torch).

    ``subject`` is the variant's name (``"onnx-int4"``, ``"teacher"``); ``metric`` a name of
    :data:`edgestill.bench.metrics.METRICS`; ``summary`` is ``None`` together with a ``reason`` when it could not be
    taken. ``samples`` are raw, in ``unit``, one list per launch. ``against`` names what a comparison is made with
    (``"teacher"``, ``"student"``), ``data`` the text it was taken on.
    ``target`` is where the worker ran, as typed (:mod:`edgestill.runtimes.targets`); ``origin`` names the foreign tool
    that an imported row was measured by.
    """

    subject: str
    metric: str
    unit: str
    source: Literal["measured", "emulated", "predicted"]
    summary: Summary | None
    samples: tuple[tuple[float, ...], ...]
    artifact_id: str
    runtime: str
    runtime_version: str
    backend: str
    device: str
    threads: int
    protocol: Mapping[str, Any]
    environment: Mapping[str, Any]
    against: str | None = None
    data: str | None = None
    context: int | None = None
    kv_dtype: str | None = None
    placement: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    target: str = "host"
    origin: str | None = None
    schema_version: int = MEASUREMENT_VERSION


@dataclass(frozen=True)
class Check:
    """One question put to an artifact: ``value`` against ``limit`` (``at_most``/``at_least``), with an interval where
    there is one, the reason for the limit, the worst input and the first tensor that diverges.

    ``question`` is ``faithful`` (to the student dequantised by ``grids.py``: finds defects), ``loss`` (of that
    reference and of the artifact against float student and teacher: the price of quantisation) or ``integrity``
    (tokenizer, dtype histogram, weights on their grid, finite outputs).
    """

    name: str
    question: Literal["faithful", "loss", "integrity"]
    passed: bool
    value: float | None = None
    limit: float | None = None
    sense: Literal["at_most", "at_least"] = "at_most"
    unit: str = ""
    low: float | None = None
    high: float | None = None
    reason: str = ""
    worst_input: str | None = None
    first_tensor: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement of one artifact by one runtime on one device."""

    artifact_id: str
    subject: str
    level: Literal["device_verified", "program_verified", "failed"]
    checks: tuple[Check, ...]
    runtime: str
    runtime_version: str
    backend: str
    device: str
    note: str = ""
    schema_version: int = VERDICT_VERSION

    @property
    def passed(self) -> bool:
        """No check failed."""
        return self.level != "failed"

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)


def write_measurements(path: Path, rows: tuple[Measurement, ...] | list[Measurement]) -> None:
    """Write JSON lines, whole or not at all."""
    atomic_write(path, "".join(canonical_json(dataclasses.asdict(row)) + "\n" for row in rows))


def read_measurements(path: Path) -> list[Measurement]:
    """Read JSON lines written by :func:`write_measurements`; :class:`BadInput` names a bad line."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            raw = json.loads(line)
            summary = Summary(**raw["summary"]) if raw["summary"] else None
            samples = tuple(tuple(launch) for launch in raw["samples"])
            rows.append(Measurement(**{**raw, "summary": summary, "samples": samples}))
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path}:{number}: not a measurement: {error}", hint="measure again") from None
    return rows


def verdict_from_json(raw: Mapping[str, Any]) -> Verdict:
    """The inverse of :func:`dataclasses.asdict` for a verdict."""
    return Verdict(**{**raw, "checks": tuple(Check(**check) for check in raw["checks"])})


def read_verdicts(path: Path) -> list[Verdict]:
    """Read a ``verdicts.jsonl``, oldest first; :class:`BadInput` names a bad line."""
    verdicts = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            verdicts.append(verdict_from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path}:{number}: not a verdict: {error}", hint="verify the artifact again") from None
    return verdicts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}", hint="pass a file of JSON lines") from None
