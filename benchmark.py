"""``edgestill bench``: size, speed and memory of artifacts and model folders, on one or several targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import ARTIFACT_FILE, open_artifact
from .bench.compare import Comparison, compare
from .bench.environment import describe_environment
from .bench.predicted import predicted_rows
from .bench.records import Measurement
from .bench.sample_text import SAMPLE_TEXT
from .errors import BadInput, UsageError
from .recipe import BenchConfig
from .runtimes.targets import parse_target
from .stages import Observer

if TYPE_CHECKING:
    from .bench.measure import Subject

__all__ = ["BenchRequest", "BenchResult", "bench_subjects", "sample_ids"]


@dataclass(frozen=True)
class BenchRequest:
    """Measure ``subjects`` (artifact or model folders); the first one is the baseline.

    ``target``: where, see :mod:`edgestill.runtimes.targets`.
    """

    subjects: tuple[Path, ...]
    target: tuple[str, ...] = ("host",)
    threads: int = 2
    length: int = 128
    new_tokens: int = 32
    launches: int = 3
    quick: bool = False


@dataclass(frozen=True)
class BenchResult:
    """What was measured, and each subject against the first."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    schema_version: int = 1


def bench_subjects(request: BenchRequest, observer: Observer) -> BenchResult:
    """Measure size, speed and memory of artifacts and model folders, interleaved, in fresh processes."""
    from .bench.measure import Subject, measure_size, measure_speed, timed_input

    subjects = []
    names: dict[str, int] = {}
    tasks: dict[str, str] = {}
    longest = [request.length]
    for path in request.subjects:
        names[path.name] = names.get(path.name, 0) + 1
        name = path.name if names[path.name] == 1 else f"{path.name}-{names[path.name]}"
        if (path / ARTIFACT_FILE).is_file():
            manifest = open_artifact(path).manifest
            subjects.append(Subject(name, path, "artifact", None, manifest.artifact_id))
            tasks[name] = manifest.task
            longest.append(manifest.max_length)
        else:
            from .checkpoints import open_model

            model = open_model(path)
            subjects.append(Subject(name, path, "model", model.parameters, model.model_id))
            tasks[name] = model.task
            longest.append(model.max_length)
    if len(set(tasks.values())) > 1:
        shown = ", ".join(f"{name} is {task}" for name, task in tasks.items())
        raise UsageError(f"subjects of different tasks: {shown}", hint="measure models of one task together")
    config = BenchConfig(
        threads=request.threads, length=request.length, new_tokens=request.new_tokens,
        launches=1 if request.quick else request.launches, repeats=5 if request.quick else 30,
        max_seconds=3.0 if request.quick else 10.0,
    )  # fmt: skip
    room = request.new_tokens if next(iter(tasks.values())) == "text-generation" else 0
    length = min(longest) if min(longest) == request.length else max(1, min(longest) - room)
    ids = timed_input(sample_ids(request.subjects[0]), 1, length)
    environment = describe_environment()
    observer.started("bench", "measure")
    rows = measure_size(subjects, environment=environment)
    for target in map(parse_target, request.target):
        if target.scheme == "profile":
            rows += predicted_rows(subjects, target.address, length=length, new_tokens=request.new_tokens)
        elif target.scheme == "qemu":
            rows += _counted(str(target), subjects, ids, next(iter(tasks.values())), request.quick, observer)
        else:
            rows += measure_speed(
                subjects, config, ids=ids, task=next(iter(tasks.values())), environment=environment,
                progress=observer.advanced,
            )  # fmt: skip
    return BenchResult(tuple(rows), tuple(compare(rows, subjects[0].name)))


def _counted(
    target: str, subjects: list[Subject], ids: Any, task: str, quick: bool, observer: Observer
) -> list[Measurement]:
    """Instructions instead of times, on an emulated core."""
    from .bench.emulated import measure_instructions
    from .runtimes.transports.qemu import QemuTarget

    with QemuTarget(parse_target(target).address) as place:
        return measure_instructions(
            subjects, place, ids=ids, task=task, launches=1 if quick else 2, progress=observer.advanced
        )


def sample_ids(folder: Path) -> list[list[int]]:
    """The built-in sample as token ids of the first subject's own tokenizer."""
    from .errors import MissingDependency

    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingDependency.package("tokenizers", "distill") from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no tokenizer.json", hint="pass an artifact folder or a prepared model folder")
    tokenizer: Any = Tokenizer.from_file(str(path))
    return [tokenizer.encode(text).ids for text in SAMPLE_TEXT]
