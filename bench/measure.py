"""Take speed, memory and size of artifacts and model folders, each in fresh worker processes.

Accuracy is taken elsewhere (:mod:`edgestill.bench.fidelity`), in launches of its own. A worker that dies costs its
subject the numbers, with the reason; the others go on. :mod:`.plan` says what is launched when, :mod:`.taking` and
:mod:`.alone` what is taken in a launch, :mod:`.rows` makes measurements of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact import ARTIFACT_FILE, open_artifact
from ..errors import BadInput
from ..files import hash_tree, list_files
from ..progress import Progress, silent
from ..recipe import BenchConfig
from .alone import take_alone
from .environment import describe_environment
from .plan import Kind, Launch, plan_launches
from .records import Measurement
from .rows import Place, exact_row, protocol_of, rows_of, settled
from .taking import WARMUP, Ints, OpenWorker, Record, Subject, Work, Worker, take_round

__all__ = ["WARMUP", "OpenWorker", "Place", "Subject", "Worker", "measure_size", "measure_speed", "timed_input"]

_RUNTIMES = {"onnx": "onnxruntime", "gguf": "llama.cpp", "coreml": "coreml", "torch": "torch"}
# What a worker is thought to need, to see whether all fit side by side: weights twice, and its runtime.
_WORKER_BYTES, _TORCH_BYTES = 200 << 20, 800 << 20


def timed_input(examples: Sequence[Sequence[int]], batch_size: int, length: int) -> Ints:
    """Token ids ``[batch_size, length]`` for timings, from real text: held-out examples one after the other,
    repeated when they are too short. Every token is real, nothing is padding."""
    stream = [token for example in examples for token in example]
    if not stream:
        raise BadInput("no token to time with", hint="give the recipe a [[data.text]] with `test` examples")
    need = batch_size * length
    return np.resize(np.asarray(stream[:need], dtype=np.int64), need).reshape(batch_size, length)


def measure_speed(
    subjects: Sequence[Subject],
    config: BenchConfig,
    *,
    ids: Ints,
    task: str,
    open_worker: OpenWorker | None = None,
    environment: Mapping[str, Any] | None = None,
    place: Place | None = None,
    together: bool | None = None,
    kinds: Sequence[Kind] | None = None,
    progress: Progress = silent,
) -> list[Measurement]:
    """Load time, first inference, latency, tokens per second, memory and energy of every subject.

    ``ids [batch, length]`` is the timed input (see :func:`timed_input`); text generation decodes
    ``config.new_tokens`` after its first row. ``open_worker`` starts a worker (default: a process on this machine),
    ``place`` says where that is (``environment`` alone: this machine, so described). The launches follow
    :mod:`edgestill.bench.plan`; ``together`` lets the workers of a round live side by side and work in turns (default:
    where memory holds all of them). One subject that can be timed (the first artifact, else the first model) is
    measured twice: the difference is written into every row's protocol as ``noise_floor``. There are
    ``config.launches`` rounds, and up to ``config.most_launches`` while the noise is larger than the resolution.
    ``kinds``: only these launches (default: all that ``config`` asks for); the other rows say that they were not taken.
    """
    if open_worker is None:
        from ..runtimes.transports.local import LocalWorker

        open_worker = LocalWorker
    if len({subject.name for subject in subjects}) != len(subjects):
        raise ValueError("two subjects have the same name")
    place = place or Place(dict(environment) if environment is not None else describe_environment())
    records = {subject.name: _record(subject) for subject in subjects}
    chosen = _chosen(list(records.values()))
    several = max(config.launches, config.most_launches or 0) > 1  # one launch has no noise floor
    control = _record(chosen.subject) if chosen is not None and several else None
    generation = task == "text-generation"
    work = Work(config, ids, generation, open_worker)
    together = _fits([r.subject for r in records.values()], chosen, place) if together is None else together
    launches = _run(records, control, work, together, kinds or _kinds(work), progress)
    protocol = protocol_of(
        config, (int(ids.shape[0]), int(ids.shape[1])), chosen, control, together=together, launches=launches
    )
    return [
        row
        for record in records.values()
        for row in rows_of(record, config, protocol, place, generation=generation)
    ]  # fmt: skip


def _kinds(work: Work) -> list[Kind]:
    kinds: list[Kind] = ["speed", "cold", "memory"]
    kinds += ["depth"] if work.config.depths and work.generation else []
    kinds += ["sustained"] if work.config.sustained_seconds else []
    return kinds


def _run(
    records: Mapping[str, Record], control: Record | None, work: Work, together: bool, kinds: Sequence[Kind],
    progress: Progress,
) -> int:  # fmt: skip
    """Launch everything in the planned order; how many rounds there were."""
    config = work.config
    most = max(config.launches, config.most_launches or 0)
    name = control.subject.name if control is not None else None
    plan = plan_launches(list(records), most, control=name, kinds=kinds, seed=config.seed)

    def record_of(launch: Launch) -> Record:
        return control if launch.control and control is not None else records[launch.subject]

    done = rounds = 0
    for (kind, index), group in itertools.groupby(plan, key=lambda launch: (launch.kind, launch.round)):
        batch = list(group)
        if kind == "speed" and index >= config.launches and settled(list(records.values()), control, config.resolution):
            done += len(batch)
            continue
        if kind == "speed":
            rounds += 1
            side = [record_of(launch) for launch in batch]
            for one in [side] if together else [[record] for record in side]:
                label = "all" if together else one[0].subject.name
                progress(f"measuring {label} ({kind}, round {rounds})", done / len(plan))
                take_round(one, work)
                done += len(one)
        else:
            for launch in batch:
                progress(f"measuring {launch.subject} ({kind})", done / len(plan))
                take_alone(records[launch.subject], kind, work)
                done += 1
    progress("measured", 1.0)
    return rounds


def measure_size(
    subjects: Sequence[Subject], *, environment: Mapping[str, Any] | None = None
) -> list[Measurement]:  # fmt: skip
    """``size_bytes``, ``model_bytes``, ``bits_per_weight`` and, of artifacts, ``download_bytes``, from the files."""
    place = Place(dict(environment) if environment is not None else describe_environment())
    rows = []
    for subject in subjects:
        record = _record(subject)
        if subject.kind == "artifact":
            artifact = open_artifact(subject.folder, check=False)
            size, model = artifact.size_bytes, artifact.model_bytes
            download = artifact.download_bytes()
            counted = sum(row.parameters for row in artifact.manifest.dtype_histogram.values())
        else:
            sizes = {path: (subject.folder / path).stat().st_size for path in list_files(subject.folder)}
            size, model = sum(sizes.values()), sum(s for p, s in sizes.items() if p.suffix == ".safetensors")
            counted, download = 0, 0
        parameters = subject.parameters or counted
        values: dict[str, float | None] = {"size_bytes": size, "model_bytes": model}
        values["bits_per_weight"] = model * 8 / parameters if parameters else None
        record.missing["bits_per_weight"] = "the number of parameters is not known"
        if download:
            values["download_bytes"] = download
        rows += [exact_row(record, metric, value, place) for metric, value in values.items()]
    return rows


def _record(subject: Subject) -> Record:
    if subject.kind == "artifact" or (subject.folder / ARTIFACT_FILE).exists():
        manifest = open_artifact(subject.folder, check=False).manifest
        return Record(subject, subject.subject_id or manifest.artifact_id, _RUNTIMES[manifest.format])
    return Record(subject, subject.subject_id or hash_tree(subject.folder), "torch")


def _chosen(records: Sequence[Record]) -> Record | None:
    """The A/A subject: an artifact starts in a tenth of the time that torch takes, and is what gets compared."""
    timed = [record for record in records if record.runtime != "coreml"]
    return next((record for record in timed if record.runtime != "torch"), timed[0] if timed else None)


def _fits(subjects: Sequence[Subject], chosen: Record | None, place: Place) -> bool:
    """Whether the workers of a round fit side by side into half of the memory that is free (elsewhere: that is)."""
    need = 0
    for subject in [*subjects, *([chosen.subject] if chosen else [])]:
        weights = sum((subject.folder / path).stat().st_size for path in list_files(subject.folder))
        need += 2 * weights + (_TORCH_BYTES if subject.kind == "model" else _WORKER_BYTES)
    if place.target == "host":
        import psutil

        return need < psutil.virtual_memory().available / 2
    return need < (place.environment.get("memory_bytes") or 0) / 2
