"""Take speed, memory and size of artifacts and model folders, each in fresh worker processes.

Accuracy is taken elsewhere (:mod:`edgestill.bench.fidelity`), in launches of its own. A worker that dies costs its
subject the numbers, with the reason; the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..artifact import ARTIFACT_FILE, open_artifact
from ..errors import BadInput, EdgestillError, MissingDependency, Unsupported, WorkerError
from ..files import hash_tree, list_files
from ..progress import Progress, silent
from ..recipe import BenchConfig
from ..runtimes.session import SessionInfo, SessionOptions
from .environment import LoadProbe, describe_environment, device_label
from .metrics import METRICS
from .plan import Launch, plan_launches
from .records import Measurement, Summary
from .statistics import noise_floor, summarise

__all__ = ["WARMUP", "Subject", "measure_size", "measure_speed", "timed_input"]

WARMUP = 3  # untimed inferences before the timed ones, after the first inference
_MEMORY_INFERENCES = 3

Ints = npt.NDArray[np.int64]
Statistic = Literal["median", "max"]

_SPEED = ("load_ms", "first_inference_ms", "latency_ms")
_GENERATION = ("time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
_MEMORY = ("peak_memory_bytes", "peak_anonymous_bytes", "peak_file_backed_bytes", "baseline_bytes")
_RUNTIMES = {"onnx": "onnxruntime", "gguf": "llama.cpp", "coreml": "coreml", "torch": "torch"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a sealed ``artifact`` folder or a ``model`` folder (run by torch), and how reports call it.

    ``parameters`` is the number of weights, for bits per weight; by default it is counted from the artifact's
    histogram. ``subject_id`` is the artifact or model id; by default it is read or hashed.
    """

    name: str
    folder: Path
    kind: Literal["artifact", "model"] = "artifact"
    parameters: int | None = None
    subject_id: str | None = None


class Worker(Protocol):
    """What is needed of a worker, e.g. :class:`edgestill.runtimes.transports.local.LocalWorker`."""

    load_seconds: float
    cold_load_seconds: float | None
    cold_reason: str | None

    def info(self) -> SessionInfo: ...
    def time_forward(self, ids: Ints, mask: Ints, *, repeats: int, warmup: int, max_seconds: float) -> list[float]: ...
    def time_decode(
        self, prompt_ids: Sequence[int], new_tokens: int, *, repeats: int, warmup: int, max_seconds: float
    ) -> list[dict[str, Any]]: ...
    def memory(self) -> dict[str, Any]: ...


class OpenWorker(Protocol):
    """Starts a worker; ``cold``: with the model's files evicted from the page cache first."""

    def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> AbstractContextManager[Worker]:
        """Start it."""
        ...


@dataclass
class _Record:
    """What has been taken of one subject so far: samples per launch by metric, and why something is missing."""

    subject: Subject
    identity: str
    runtime: str
    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    control: list[list[float]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    info: SessionInfo | None = None
    loads: list[dict[str, Any]] = field(default_factory=list)

    def add(self, metric: str, values: list[float]) -> None:
        self.samples.setdefault(metric, []).append(values)


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
    progress: Progress = silent,
) -> list[Measurement]:
    """Load time, first inference, latency, tokens per second and memory of every subject.

    ``ids [batch, length]`` is the timed input (see :func:`timed_input`); text generation decodes
    ``config.new_tokens`` after its first row. ``open_worker`` starts a worker (default: a process on this machine).
    The launches follow :mod:`edgestill.bench.plan`; one subject that can be timed (the first artifact, else the first
    model) is measured twice, and the difference is written into every measurement's protocol as ``noise_floor``.
    """
    if open_worker is None:
        from ..runtimes.transports.local import LocalWorker

        open_worker = LocalWorker
    records = {subject.name: _record(subject) for subject in subjects}
    if len(records) != len(subjects):
        raise ValueError("two subjects have the same name")
    generation = task == "text-generation"
    control = _control(list(records.values()))
    plan = plan_launches(list(records), config.launches, control=control, seed=config.seed)
    for index, launch in enumerate(plan):
        record = records[launch.subject]
        progress(f"measuring {launch.subject} ({launch.kind})", index / len(plan))
        if record.failure is None:
            _launch(record, launch, config, ids, generation, open_worker)
    progress("measured", 1.0)
    facts = dict(environment) if environment is not None else describe_environment()
    protocol = _protocol(config, ids, control, records)
    metrics = [*_SPEED, "load_cold_ms", *(_GENERATION if generation else ()), *_MEMORY]
    return [_measurement(record, metric, facts, protocol, config) for record in records.values() for metric in metrics]


def measure_size(subjects: Sequence[Subject], *, environment: Mapping[str, Any] | None = None) -> list[Measurement]:
    """``size_bytes``, ``model_bytes``, ``bits_per_weight`` and, of artifacts, ``download_bytes``, from the files."""
    facts = dict(environment) if environment is not None else describe_environment()
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
        values: dict[str, float] = {"size_bytes": size, "model_bytes": model}
        if download:
            values["download_bytes"] = download
        if parameters:
            values["bits_per_weight"] = model * 8 / parameters
        else:
            record.missing["bits_per_weight"] = "the number of parameters is not known"
        for metric in ("size_bytes", "model_bytes", "bits_per_weight", *(["download_bytes"] if download else [])):
            if metric in values:
                record.add(metric, [float(values[metric])])
            rows.append(_measurement(record, metric, facts, {"how": "file sizes"}, None))
    return rows


def _record(subject: Subject) -> _Record:
    if subject.kind == "artifact" or (subject.folder / ARTIFACT_FILE).exists():
        manifest = open_artifact(subject.folder, check=False).manifest
        return _Record(subject, subject.subject_id or manifest.artifact_id, _RUNTIMES[manifest.format])
    return _Record(subject, subject.subject_id or hash_tree(subject.folder), "torch")


def _control(records: Sequence[_Record]) -> str | None:
    """The A/A subject: an artifact starts in a tenth of the time that torch takes, and is what gets compared."""
    timed = [record for record in records if record.runtime != "coreml"]
    first = next((record for record in timed if record.runtime != "torch"), timed[0] if timed else None)
    return first.subject.name if first else None


def _launch(
    record: _Record, launch: Launch, config: BenchConfig, ids: Ints, generation: bool, open_worker: OpenWorker
) -> None:
    """One fresh process; what goes wrong with the artifact is written down, not raised."""
    try:
        options = SessionOptions(threads=config.threads)
        cold = launch.kind == "cold"
        with LoadProbe() as probe, open_worker(record.subject.folder, options, cold=cold) as worker:
            record.info = info = worker.info()
            _refuse(info, config, ids, generation)
            if cold and worker.cold_load_seconds is None:
                record.missing["load_cold_ms"] = f"not cold: {worker.cold_reason}"
            elif cold:
                record.add("load_cold_ms", [worker.load_seconds * 1e3])
            elif launch.kind == "memory":
                _take_memory(record, worker, config, ids, generation)
            else:
                _take_speed(record, launch, worker, config, ids, generation)
        record.loads.append(probe.result)
    except (WorkerError, MissingDependency, Unsupported, BadInput) as error:
        record.failure = _why(error)


def _refuse(info: SessionInfo, config: BenchConfig, ids: Ints, generation: bool) -> None:
    """Raise :class:`Unsupported` for what can't be timed here, so that no number is made up for it."""
    if "latency" not in info.capabilities:
        raise Unsupported(f"only interpreted here ({info.backend}): speed and memory would say nothing about a device")
    need = ids.shape[1] + (config.new_tokens if generation else 0)
    if need > info.max_length:
        raise Unsupported(f"takes at most {info.max_length} tokens, the timed run needs {need}")


def _take_speed(
    record: _Record, launch: Launch, worker: Worker, config: BenchConfig, ids: Ints, generation: bool
) -> None:
    mask = np.ones_like(ids)
    budget = config.max_seconds / (2 if generation else 1)
    first = worker.time_forward(ids, mask, repeats=1, warmup=0, max_seconds=budget)
    times = worker.time_forward(ids, mask, repeats=config.repeats, warmup=WARMUP, max_seconds=budget)
    if launch.control:
        record.control.append([seconds * 1e3 for seconds in times])
        return
    record.add("load_ms", [worker.load_seconds * 1e3])
    record.add("first_inference_ms", [first[0] * 1e3])
    record.add("latency_ms", [seconds * 1e3 for seconds in times])
    if generation:
        prompt = [int(token) for token in ids[0]]
        runs = worker.time_decode(prompt, config.new_tokens, repeats=config.repeats, warmup=1, max_seconds=budget)
        record.add("time_to_first_token_ms", [run["first_s"] * 1e3 for run in runs])
        record.add("prefill_tokens_per_s", [len(prompt) / run["first_s"] for run in runs])
        if config.new_tokens > 1:
            record.add("decode_tokens_per_s", [len(run["tokens_s"]) / sum(run["tokens_s"]) for run in runs])
        else:
            record.missing["decode_tokens_per_s"] = "needs new_tokens of at least 2"


def _take_memory(record: _Record, worker: Worker, config: BenchConfig, ids: Ints, generation: bool) -> None:
    worker.time_forward(ids, np.ones_like(ids), repeats=_MEMORY_INFERENCES, warmup=0, max_seconds=config.max_seconds)
    if generation:
        prompt = [int(token) for token in ids[0]]
        worker.time_decode(prompt, config.new_tokens, repeats=1, warmup=0, max_seconds=config.max_seconds)
    found = worker.memory()
    if any(found.get(key) is None for key in ("baseline_anonymous", "peak_anonymous", "peak_file_backed")):
        record.missing |= dict.fromkeys(_MEMORY, "this system does not tell anonymous from file-backed memory")
        return
    anonymous = max(0, found["peak_anonymous"] - found["baseline_anonymous"])
    files = max(0, found["peak_file_backed"] - found.get("baseline_file_backed", 0))
    record.add("peak_anonymous_bytes", [float(anonymous)])
    record.add("peak_file_backed_bytes", [float(files)])
    record.add("peak_memory_bytes", [float(anonymous + files)])
    record.add("baseline_bytes", [float(found["baseline_anonymous"])])


def _why(error: EdgestillError) -> str:
    return error.message.strip().splitlines()[0] if error.message.strip() else type(error).__name__


def _protocol(config: BenchConfig, ids: Ints, control: str | None, records: Mapping[str, _Record]) -> dict[str, Any]:
    """How it was measured, with the A/A noise floor."""
    floor, reason = None, None
    if control is None:
        reason = "no subject can be timed on this machine"
    elif records[control].failure is not None:
        reason = f"{control} could not be measured: {records[control].failure}"
    else:
        floor = noise_floor(records[control].samples["latency_ms"], records[control].control, seed=config.seed)
    return {
        "order": "interleaved ABBA",
        "seed": config.seed,
        "launches": config.launches,
        "repeats": config.repeats,
        "warmup": WARMUP,
        "max_seconds": config.max_seconds,
        "batch_size": int(ids.shape[0]),
        "length": int(ids.shape[1]),
        "new_tokens": config.new_tokens,
        "noise_floor": floor,
        "noise_floor_subject": control,
        "noise_floor_reason": reason,
        "memory": "in a launch of its own",
        "cold_load": "model files evicted from the page cache; the runtime's libraries stay cached",
    }


def _measurement(
    record: _Record,
    metric: str,
    environment: Mapping[str, Any],
    protocol: Mapping[str, Any],
    config: BenchConfig | None,
) -> Measurement:
    samples = tuple(tuple(launch) for launch in record.samples.get(metric, []))
    reason = record.failure or record.missing.get(metric)
    summary: Summary | None = None
    if reason is None and samples:
        if config is None:
            summary = summarise(samples, "exact")
        else:
            statistic: Statistic = "max" if METRICS[metric].kind == "memory" else "median"
            summary = summarise(samples, statistic, seed=config.seed)
    elif reason is None:
        reason = "not taken"
    info = record.info
    load = {"machine_load": record.loads, "busy": any(load["busy"] for load in record.loads)} if config else {}
    return Measurement(
        subject=record.subject.name,
        metric=metric,
        unit=METRICS[metric].unit,
        source="measured",
        summary=summary,
        samples=samples,
        artifact_id=record.identity,
        runtime=info.runtime if info else record.runtime,
        runtime_version=info.version if info else "",
        backend=info.backend if info else "",
        device=device_label(environment),
        threads=config.threads if config else 0,
        protocol=protocol,
        environment={**environment, **load},
        context=int(protocol["length"]) if "length" in protocol else None,
        placement=info.placement if info else {},
        reason=reason,
    )
