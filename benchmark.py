"""``edgestill bench``: size, speed and memory of artifacts and model folders, on one or several targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .accuracy import AccuracyRequest, measure_accuracy
from .artifact import ARTIFACT_FILE, open_artifact
from .bench.compare import Comparison, Decision, compare, decide
from .bench.environment import describe_environment
from .bench.predicted import predicted_rows
from .bench.profile import Profiled
from .bench.records import Measurement
from .bench.sample_text import SAMPLE_TEXT
from .errors import EdgestillError, UsageError
from .recipe import BenchConfig
from .runtimes.targets import open_target, parse_target
from .stages import Observer

if TYPE_CHECKING:
    from .bench.measure import Subject

__all__ = ["BenchRequest", "BenchResult", "Effort", "bench_config", "bench_subjects", "sample_ids"]

Effort = Literal["quick", "normal", "thorough"]

_EFFORTS: Mapping[Effort, Mapping[str, Any]] = {
    "quick": {"launches": 1, "repeats": 5, "max_seconds": 2.0},
    "normal": {"launches": 5, "most_launches": 24, "repeats": 30, "max_seconds": 10.0},
    "thorough": {
        "launches": 8, "most_launches": 30, "repeats": 60, "max_seconds": 20.0, "percentiles": (90, 99),
        "depths": (0, 256, 1024), "sustained_seconds": 60.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class BenchRequest:
    """Measure ``subjects`` (artifact or model folders); the first one is the baseline.

    ``target``: where, see :mod:`edgestill.runtimes.targets`; one that fails costs its own rows. ``effort``: ``quick``
    is one launch, a first look without noise floor; ``normal`` goes on from five launches up to 24 while the noise
    is larger than half of ``resolution``; ``thorough`` adds percentiles, decode speed by depth and a minute of work in
    one go. ``launches``, ``depths`` and ``sustained_seconds`` replace what the effort says. ``max_slowdown``: decide
    whether a subject is slower than the first one by more than this fraction. ``accuracy``: also how right they are, on
    each target (:mod:`edgestill.accuracy`); ``speed=False``: only that. ``profile``: also say where the time
    goes, in launches of their own (on ``profile_page`` as an HTML page, too).
    """

    subjects: tuple[Path, ...]
    target: tuple[str, ...] = ("host",)
    threads: int = 2
    length: int = 128
    new_tokens: int = 32
    effort: Effort = "normal"
    launches: int | None = None
    depths: tuple[int, ...] | None = None
    sustained_seconds: float | None = None
    resolution: float = 0.05
    max_slowdown: float | None = None
    accuracy: AccuracyRequest | None = None
    speed: bool = True
    profile: bool = False
    profile_page: Path | None = None


@dataclass(frozen=True)
class BenchResult:
    """What was measured, and each subject against the first on each target. ``problems``: targets that failed.
    ``profiles``: time by operator, where it was asked for; never a speed.

    ``exit_code``: 1 when a subject is too slow, 3 when the noise hides whether it is, 0 otherwise.
    """

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    decisions: tuple[Decision, ...] = ()
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exit_code: int = 0
    profiles: tuple[Profiled, ...] = ()
    schema_version: int = 1


def bench_config(request: BenchRequest) -> BenchConfig:
    """The measurement that a request means."""
    values = {**_EFFORTS[request.effort], "threads": request.threads, "length": request.length,
              "new_tokens": request.new_tokens, "resolution": request.resolution}  # fmt: skip
    if request.launches is not None:  # said by the user: no more and no fewer
        values |= {"launches": request.launches, "most_launches": None}
    if request.depths is not None:
        values["depths"] = request.depths
    if request.sustained_seconds is not None:
        values["sustained_seconds"] = float(request.sustained_seconds)
    return BenchConfig(**values)


def bench_subjects(request: BenchRequest, observer: Observer) -> BenchResult:
    """Measure size, speed, memory and energy of artifacts and model folders, interleaved, in fresh processes.

    Raises :class:`UsageError` for subjects of different tasks and unknown targets, and what the only target raised.
    """
    from .bench.measure import measure_size, timed_input

    names = [parse_target(text) for text in request.target]
    if not names or len(set(names)) != len(names):
        raise UsageError("no target, or one twice", hint="--target host,qemu:cortex-a76")
    subjects, task, longest = _subjects(request)
    if request.accuracy is None and not request.speed:
        raise UsageError("nothing to measure", hint="--against TEACHER or --tasks FILE.jsonl, or without --no-speed")
    if not request.speed and (request.profile or request.profile_page):
        raise UsageError("--profile and --no-speed", hint="leave one of them out")
    right: list[Measurement] = []
    if request.accuracy is not None:
        right = measure_accuracy(subjects, request.accuracy, observer, targets=request.target)
    if not request.speed:
        return BenchResult(tuple(right), ())
    config = bench_config(request)
    room = request.new_tokens if task == "text-generation" else 0
    length = min(longest) if min(longest) == request.length else max(1, min(longest) - room)
    ids = timed_input(sample_ids(request.subjects[0]), 1, length)
    observer.started("bench", "measure")
    rows = measure_size(subjects, environment=describe_environment())
    problems: dict[str, str] = {}
    for text in request.target:
        try:
            rows += _on_target(text, subjects, config, ids, task, observer)
        except EdgestillError as error:
            if len(request.target) == 1:
                raise
            problems[text] = error.message
    profiles: list[Profiled] = []
    if request.profile or request.profile_page:
        from .benchmark_profile import profile_subjects

        profiles = profile_subjects(
            subjects, [text for text in request.target if text not in problems], ids=ids, new_tokens=request.new_tokens,
            threads=request.threads, effort=request.effort, observer=observer, page=request.profile_page,
        )  # fmt: skip
    taken = [row for row in rows if row.source != "predicted"]  # predictions have intervals of their own kind
    found = compare(taken, subjects[0].name)
    decisions = decide(found, request.max_slowdown) if request.max_slowdown is not None else []
    if request.max_slowdown is not None:
        outcomes = {decision.outcome for decision in decisions}
        code = 1 if "fail" in outcomes else 3 if "inconclusive" in outcomes or problems or not decisions else 0
    else:
        code = 0
    return BenchResult((*rows, *right), tuple(found), tuple(decisions), problems, code, tuple(profiles))


def _on_target(
    text: str, subjects: Sequence[Subject], config: BenchConfig, ids: Any, task: str, observer: Observer
) -> list[Measurement]:
    """Speed and memory of all subjects on one target; a profile predicts them and runs nothing."""
    from .bench.measure import Place, measure_speed

    name = parse_target(text)
    if name.scheme == "profile":
        return list(predicted_rows(subjects, name.address, length=int(ids.shape[1]), new_tokens=config.new_tokens))
    if name.scheme == "qemu":
        return _counted(str(name), subjects, ids, task, config.launches == 1, observer)
    with open_target(text) as target:
        if hasattr(target, "ask"):  # a target that waits for somebody
            target.ask = observer.asks
        facts = target.facts()
        place = Place(dict(facts) if facts is not None else describe_environment(), target.name, target.source)
        return measure_speed(
            subjects, config, ids=ids, task=task, open_worker=target.open_worker, place=place,
            progress=observer.advanced,
        )  # fmt: skip


def _subjects(request: BenchRequest) -> tuple[list[Subject], str, list[int]]:
    """The subjects with their names, their task, and how many tokens each takes (with what was asked for)."""
    from .bench.measure import Subject

    subjects: list[Subject] = []
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
    return subjects, next(iter(tasks.values())), longest


def _counted(
    target: str, subjects: Sequence[Subject], ids: Any, task: str, quick: bool, observer: Observer
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
    from .bench.task_files import load_tokenizer_file

    tokenizer = load_tokenizer_file(folder)
    return [tokenizer.encode(text).ids for text in SAMPLE_TEXT]
