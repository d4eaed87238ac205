"""What this machine's memory and arithmetic can do, measured here: the roof of a roofline.

Each probe (:mod:`edgestill.bench.peak_probe`) runs in fresh processes, all kinds interleaved in seeded order, and the
best repetition of all counts: a peak. Results are kept in the cache folder for the machine and the number of threads,
with their date; what a busy machine gave is used and marked, but measured again the next time.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WorkerError
from ..fetch import cache_folder
from ..files import atomic_write, canonical_json, hash_json
from ..progress import Progress, silent
from ..runtimes.worker import thread_environment
from .environment import LoadProbe, describe_environment
from .peak_probe import PROBES
from .traffic import Arithmetic

__all__ = ["MEMORY", "Peak", "Peaks", "measure_peaks"]

VERSION = 1
MEMORY = ("read", "copy", "triad")
_FLOATS = ("float_blas", "float_onnxruntime")
_WHOLE = ("int8_onnxruntime",)
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Peak:
    """One kind of probe: the best ``rate`` (bytes or operations a second) of all processes, the best of the slowest
    one (``lowest``), and how it was taken; ``None`` with a ``reason``."""

    kind: str
    rate: float | None
    lowest: float | None = None
    launches: int = 0
    how: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Peaks:
    """All probes of a machine at a number of threads; ``date`` is in UTC, ``busy`` whether others used the machine."""

    threads: int
    date: str
    busy: bool
    peaks: Mapping[str, Peak]
    machine: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def bandwidth(self) -> Peak | None:
        """The fastest way to move memory: bytes/s."""
        return self._best(MEMORY)

    def arithmetic(self, kind: Arithmetic) -> Peak | None:
        """The fastest product of matrices of ``float`` or ``int8``: operations/s; of floats where int8 is slower."""
        return self._best(_FLOATS if kind == "float" else (*_FLOATS, *_WHOLE))

    def _best(self, kinds: Sequence[str]) -> Peak | None:
        known = [peak for kind in kinds if (peak := self.peaks.get(kind)) is not None and peak.rate is not None]
        return max(known, key=lambda peak: peak.rate or 0.0) if known else None


def measure_peaks(
    threads: int,
    *,
    rounds: int = 3,
    seconds: float = 0.5,
    cache: Path | None = None,
    refresh: bool = False,
    progress: Progress = silent,
    size_bytes: int = 0,
    seed: int = 0,
) -> Peaks:
    """The machine's peaks at ``threads`` threads, from the cache where a quiet measurement of it lies there.

    ``rounds``: processes of each kind, ``seconds`` each. ``cache``: folder (default: that of the package).
    """
    facts = describe_environment()
    machine = {
        name: facts[name] for name in ("system", "machine", "cpu", "cpu_flags", "cores_usable", "memory_bytes")
    } | {"versions": {name: facts["versions"].get(name) for name in ("numpy", "onnxruntime")}}  # fmt: skip
    key = hash_json([VERSION, threads, size_bytes, machine])[:16]
    path = (cache or cache_folder()) / "peaks" / f"{key}.json"
    known = None if refresh else _read(path)
    if known is not None and not known.busy:
        return known
    rates: dict[str, list[list[float]]] = {kind: [] for kind in PROBES}
    said: dict[str, str] = {}
    missing: dict[str, str] = {}
    order = random.Random(seed)
    with LoadProbe() as load:
        for turn in range(rounds):
            for index, kind in enumerate(order.sample(PROBES, len(PROBES))):
                if kind in missing:
                    continue
                progress(f"what this machine can do: {kind}", (turn * len(PROBES) + index) / (rounds * len(PROBES)))
                try:
                    found = _launch(kind, threads, seconds, size_bytes)
                except WorkerError as error:
                    missing[kind] = error.message
                    continue
                if "rates" in found:
                    rates[kind].append([float(rate) for rate in found["rates"]])
                    said[kind] = str(found["how"])
                else:
                    missing[kind] = str(found.get("reason", "no answer"))
    peaks = {kind: _peak(kind, rates[kind], said.get(kind, ""), missing.get(kind)) for kind in PROBES}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = Peaks(threads, now, bool(load.result["busy"]), peaks, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, canonical_json(dataclasses.asdict(result)) + "\n")
    return result


def _peak(kind: str, launches: list[list[float]], how: str, reason: str | None) -> Peak:
    if not launches:
        return Peak(kind, None, reason=reason or "not measured")
    best = [max(launch) for launch in launches]
    return Peak(kind, max(best), min(best), len(launches), how)


def _launch(kind: str, threads: int, seconds: float, size_bytes: int) -> dict[str, Any]:
    """One probe in a process of its own; :class:`WorkerError` when it dies."""
    # The memory probes start threads themselves.
    inner = 1 if kind in MEMORY else threads
    command = [sys.executable, "-P", "-m", "edgestill.bench.peak_probe", kind, "--threads", str(threads)]
    command += ["--seconds", str(seconds), "--size-bytes", str(size_bytes)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False,
            env={**os.environ, **thread_environment(inner)},
        )  # fmt: skip
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise WorkerError(f"the probe {kind} gave no answer: {type(error).__name__}", hint="is memory short?") from None


def _read(path: Path) -> Peaks | None:
    """What was kept; nothing where it is missing, damaged or of another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            return None
        return Peaks(**{**raw, "peaks": {kind: Peak(**peak) for kind, peak in raw["peaks"].items()}})
    except (OSError, ValueError, TypeError, KeyError):
        return None
