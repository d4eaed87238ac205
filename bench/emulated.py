"""Instruction counts of artifacts on an emulated core: what an emulator can say of speed, instead of a time.

A count does not depend on how busy the machine is. Those of dot products, matrix products and multiply-adds repeat
exactly; loads, stores and the rest to about 1 %, since Python waits and collects between two calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..artifact import open_artifact
from ..errors import BadInput, EdgestillError, MissingDependency, Unsupported, WorkerError
from ..progress import Progress, silent
from ..runtimes.session import SessionInfo, SessionOptions
from .environment import device_label
from .measure import Subject
from .metrics import METRICS
from .records import Measurement
from .statistics import summarise

__all__ = ["CLASS_METRICS", "EXACT", "NOISE", "Counter", "EmulatedTarget", "measure_instructions"]

Ints = npt.NDArray[np.int64]

CLASS_METRICS = {
    "dot": "instructions_dot", "mmla": "instructions_mmla", "fmla": "instructions_fmla",
    "load": "instructions_load", "store": "instructions_store", "other": "instructions_other",
}  # fmt: skip
_DECODE = "decode_instructions"
EXACT = frozenset({"instructions_dot", "instructions_mmla", "instructions_fmla"})
"""The same number every time; the others vary with what Python does between two calls."""
NOISE = 0.01
"""How much the others may vary before a difference counts."""
_TIMES = ("latency_ms", "load_ms", "decode_tokens_per_s", "peak_memory_bytes")
_PROMPT = 8


class Counter(Protocol):
    """What is needed of a worker, e.g. :class:`edgestill.runtimes.transports.qemu.CountingWorker`."""

    def info(self) -> SessionInfo:
        """Who runs."""
        ...

    def count_forward(self, ids: Ints, mask: Ints, *, windows: int, repeats: int) -> list[dict[str, float]]:
        """Instructions of a forward pass by class, once a window."""
        ...

    def count_decode(self, prompt_ids: Sequence[int], *, windows: int, repeats: int) -> list[dict[str, float]]:
        """Instructions of a decoded token by class, once a window."""
        ...


class EmulatedTarget(Protocol):
    """A target that counts, e.g. :class:`edgestill.runtimes.transports.qemu.QemuTarget`."""

    name: str

    def open_counter(self, folder: Path, options: SessionOptions) -> AbstractContextManager[Counter]:
        """Start a worker whose instructions are counted."""
        ...

    def facts(self) -> Mapping[str, Any] | None:
        """The emulated machine."""
        ...


def measure_instructions(
    subjects: Sequence[Subject],
    target: EmulatedTarget,
    *,
    ids: Ints,
    task: str,
    launches: int = 2,
    windows: int = 3,
    repeats: int = 4,
    progress: Progress = silent,
) -> list[Measurement]:
    """Instructions of one forward pass over ``ids [batch, length]`` by class, and (text generation) of one decoded
    token after the first tokens of its first row, of every subject, each launch a fresh process with one thread.

    Times and memory are rows without a value, with the reason. What can't run on the core costs its subject the
    numbers; the others go on. Raises :class:`MissingDependency` where nothing can be emulated at all.
    """
    facts = dict(target.facts() or {})
    rows: list[Measurement] = []
    for index, subject in enumerate(subjects):
        samples: dict[str, list[tuple[float, ...]]] = {}
        info, reason = None, None
        for launch in range(launches):
            progress(f"counting {subject.name} on {target.name}", (index + launch / launches) / len(subjects))
            try:
                with target.open_counter(subject.folder, SessionOptions(threads=1)) as worker:
                    info = worker.info()
                    for metric, values in _take(worker, info, ids, task, windows, repeats).items():
                        samples.setdefault(metric, []).append(values)
            except MissingDependency:
                raise
            except (WorkerError, Unsupported, BadInput) as error:
                reason = _line(error)
                break
        rows += _rows(subject, target, facts, info, samples, reason, ids, task, (launches, windows, repeats))
    progress("counted", 1.0)
    return rows


def _take(
    worker: Counter, info: SessionInfo, ids: Ints, task: str, windows: int, repeats: int
) -> dict[str, tuple[float, ...]]:
    need = max(ids.shape[1], _PROMPT + repeats + 1 if task == "text-generation" else 0)
    if need > info.max_length:
        raise Unsupported(f"takes at most {info.max_length} tokens, the counted run needs {need}")
    counted = worker.count_forward(ids, np.ones_like(ids), windows=windows, repeats=repeats)
    found = {metric: tuple(window[name] for window in counted) for name, metric in CLASS_METRICS.items()}
    found["instructions"] = tuple(sum(window.values()) for window in counted)
    if "decode" in info.capabilities:
        prompt = [int(token) for token in ids[0, :_PROMPT]]
        tokens = worker.count_decode(prompt, windows=windows, repeats=repeats)
        found[_DECODE] = tuple(sum(window.values()) for window in tokens)
    return found


def _rows(
    subject: Subject,
    target: EmulatedTarget,
    facts: Mapping[str, Any],
    info: SessionInfo | None,
    samples: Mapping[str, list[tuple[float, ...]]],
    failure: str | None,
    ids: Ints,
    task: str,
    counts: tuple[int, int, int],
) -> list[Measurement]:
    launches, windows, repeats = counts
    protocol = {
        "how": "executed AArch64 instructions of the worker's first thread, by a plugin of the emulator",
        "per_inference": "(count of 1 + repeats passes - count of 1 pass) / repeats, after one warm-up pass",
        "launches": launches, "windows": windows, "repeats": repeats,
        "batch_size": int(ids.shape[0]), "length": int(ids.shape[1]), "prompt_tokens": _PROMPT,
    }  # fmt: skip
    identity = subject.subject_id or open_artifact(subject.folder, check=False).manifest.artifact_id
    metrics = ["instructions", *CLASS_METRICS.values(), *([_DECODE] if task == "text-generation" else []), *_TIMES]
    rows = []
    for metric in metrics:
        taken = tuple(samples.get(metric, ())) if failure is None else ()
        reason = failure
        if metric in _TIMES:
            reason = f"{target.name} is emulated: its times and its memory say nothing about a device"
        elif reason is None and not taken:
            reason = "the artifact has no cache to decode with"
        rows.append(
            Measurement(
                subject=subject.name, metric=metric, unit=METRICS[metric].unit, source="emulated",
                summary=summarise(taken, "median") if taken else None, samples=taken, artifact_id=identity,
                runtime=info.runtime if info else "", runtime_version=info.version if info else "",
                backend=info.backend if info else "", device=device_label(facts), threads=1,
                protocol={**protocol, "noise_floor": 0.0 if metric in EXACT else NOISE}, environment=facts,
                context=int(ids.shape[1]), placement=dict(info.placement) if info else {},
                reason=None if taken else reason, target=target.name,
            )
        )  # fmt: skip
    return rows


def _line(error: EdgestillError) -> str:
    return error.message.strip().splitlines()[0] if error.message.strip() else type(error).__name__
