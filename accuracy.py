"""Accuracy on the artifact, in its runtime: against a teacher and a student, and on small tasks of one's own.

``edgestill bench ARTIFACT --against TEACHER [--student FOLDER] [--text FILE] [--tasks FILE]``. Every subject gets the
same token ids in a process of its own, on each target: what teacher and student say is computed here, once, and the
device sends back the reduction. Intervals resample documents. What a subject or a target can't do is a row without a
value and with the reason; the others are measured.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import TOKEN_TASKS, open_artifact
from .bench.completions import read_completions
from .bench.environment import describe_environment, device_label
from .bench.labelled import read_labelled, read_pairs
from .bench.metrics import METRICS
from .bench.records import Measurement
from .bench.task_files import TaskFile, first_fields
from .commands import judged_texts, model_folder
from .errors import EdgestillError, ResourceExhausted, Unsupported, UsageError
from .runtimes.precision import scoring_options, scoring_protocol
from .runtimes.targets import SCHEMES, Target, open_target, parse_target
from .runtimes.transports.local import LocalWorker
from .stages import Observer

if TYPE_CHECKING:
    from .bench.fidelity import Estimate
    from .bench.measure import Subject
    from .checkpoints import ModelFolder

__all__ = ["AccuracyRequest", "measure_accuracy", "read_task"]

EXAMPLES = 1024
"""Texts that are read from a file at most."""

_HEADLINE = {"feature-extraction": "spearman"}  # what stands for all metrics of a subject that can't be scored


@dataclass(frozen=True)
class AccuracyRequest:
    """Compare with ``against`` (the teacher) and ``student`` on ``text`` (default: the built-in sample); answer
    ``tasks`` (JSON lines, :func:`read_task`). At most ``tokens`` are predicted (text generation), in
    windows of ``window``, or ``examples`` texts are read."""

    against: Path | None = None
    student: Path | None = None
    text: Path | None = None
    tasks: tuple[Path, ...] = ()
    threads: int = 2
    tokens: int = 2048
    window: int = 128
    examples: int = 600
    batch_size: int = 8
    seed: int = 0


def measure_accuracy(
    subjects: Sequence[Subject],
    request: AccuracyRequest,
    observer: Observer,
    *,
    targets: Sequence[str] = ("host",),
) -> list[Measurement]:
    """Every metric of accuracy of every subject on every target, a row each (``against``: ``"teacher"``,
    ``"student"``, or none for a task's own accuracy).

    Raises :class:`UsageError` for options that make no sense, :class:`BadInput` for files that can't be read; what is
    wrong with one subject, or with a target, is written into its rows.
    """
    if request.against is None and (request.student or request.text):
        raise UsageError("--student and --text need a teacher", hint="--against TEACHER")
    if request.against is None and not request.tasks:
        raise UsageError("nothing to compare with", hint="--against TEACHER, or --tasks FILE.jsonl")
    names = [str(parse_target(text)) for text in targets]
    sets = [read_task(path) for path in request.tasks]
    observer.started("accuracy", "measure accuracy")
    with contextlib.ExitStack() as stack:
        places = [_find_place(name, stack, observer) for name in names]  # before minutes are spent on what it asks
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgestill-"))
        question = _Question(request, observer)
        question.make(sets, Path(scratch))
        return [row for place in places for row in _Judge(question, place).measure(subjects)]


def read_task(path: Path) -> TaskFile:
    """A file of examples, of the kind that its first line is of: labelled texts, scored pairs
    (:mod:`edgestill.bench.labelled`), multiple choice or cloze (:mod:`edgestill.bench.completions`)."""
    fields = first_fields(path)
    if "text" in fields:
        return read_labelled(path)
    return read_pairs(path) if {"first", "second"} & fields else read_completions(path)


@dataclass(frozen=True)
class _Place:
    """A target by its name as typed; ``missing`` says why nothing can be asked there (``target`` is ``None`` then)."""

    name: str
    target: Target | None
    environment: Mapping[str, Any]
    device: str
    missing: str = ""


def _find_place(name: str, stack: contextlib.ExitStack, observer: Observer) -> _Place:
    try:
        if not SCHEMES[parse_target(name).scheme].opens:
            raise Unsupported(f"{name} is predicted: a calculation has no answers", hint="--target host")
        target = stack.enter_context(open_target(name))
        if hasattr(target, "ask"):  # a target that waits for somebody
            target.ask = observer.asks
        facts = target.facts()
    except EdgestillError as error:
        return _Place(name, None, {}, name, _line(error))
    environment = dict(facts) if facts is not None else describe_environment()
    return _Place(target.name, target, environment, device_label(environment))


@dataclass
class _Question:
    """What every subject is asked on every target: ``references`` (folders, by whom is compared with) over the text
    ``data``, task ``sets`` and the teacher's ``answers`` to them. All of it is made on this machine."""

    request: AccuracyRequest
    observer: Observer
    data: str = ""
    references: Mapping[str, Path] = field(default_factory=dict)
    sets: Sequence[TaskFile] = ()
    answers: dict[str, Any] = field(default_factory=dict)

    def make(self, sets: Sequence[TaskFile], work: Path) -> None:
        self.sets = sets
        if self.request.against is None:
            return
        teacher = model_folder(self.request.against, work / "teacher", self.observer)
        self.data, self.references = self._references(teacher, work)
        if sets:
            with LocalWorker(teacher.path, scoring_options(teacher.path, self.request.threads)) as worker:
                self.answers = {one.name: self.ask(worker, teacher.path, one, "teacher") for one in sets}

    def _references(self, teacher: ModelFolder, work: Path) -> tuple[str, dict[str, Path]]:
        """What teacher and student say; a student reads its own ids, and the teacher those."""
        from .bench.reference import make_reference, vocabulary_columns

        request = self.request
        name, texts = judged_texts(request.text, most=EXAMPLES)
        reader = teacher
        if request.student is not None:
            reader = model_folder(request.student, work / "student", self.observer)
        generates = teacher.task == "text-generation"
        length = min(reader.max_length, teacher.max_length)
        _check_room(work, reader, request, both=reader is not teacher)
        settings: dict[str, Any] = {
            "threads": request.threads, "batch_size": request.batch_size, "progress": self.observer.advanced,
        }  # fmt: skip
        own = make_reference(
            reader.path, work / "asked", texts=texts, max_length=length, window=min(request.window, length),
            limit=request.tokens if generates else request.examples, **settings,
        )  # fmt: skip
        if reader is teacher:
            return name, {"teacher": own}
        theirs = make_reference(
            teacher.path, work / "asked-teacher", ids_from=own, columns=vocabulary_columns(teacher, reader), **settings
        )
        return name, {"teacher": theirs, "student": own}

    def ask(self, worker: Any, folder: Path, data: TaskFile, name: str) -> Any:
        """What a worker's model answers to ``data``."""

        def progress(message: str, fraction: float | None = None) -> None:
            self.observer.advanced(f"{name} on {data.name}", fraction)

        return data.ask(worker, folder, batch_size=self.request.batch_size, progress=progress)


@dataclass
class _Judge:
    """Asks subjects on one target."""

    question: _Question
    place: _Place

    def measure(self, subjects: Sequence[Subject]) -> list[Measurement]:
        rows: list[Measurement] = []
        for subject in subjects:
            for against, reference in self.question.references.items():
                rows += self._against(subject, against, reference)
            for one in self.question.sets:
                rows += self._task(subject, one)
        return rows

    @property
    def request(self) -> AccuracyRequest:
        return self.question.request

    def _against(self, subject: Subject, against: str, reference: Path) -> list[Measurement]:
        from .bench.fidelity import fidelity
        from .bench.reference import read_facts
        from .runtimes.scoring import open_reference

        facts = read_facts(reference)
        protocol = {"inputs": facts["inputs"], "inputs_sha256": facts["inputs_sha256"]}
        metric = _HEADLINE.get(facts["task"], "kl")
        self.question.observer.advanced(f"{subject.name} against the {against} on {self.place.name}")

        def take(worker: Any) -> list[Estimate]:
            scores = dict(worker.score(reference, self.request.batch_size))
            if facts["task"] == "feature-extraction":
                said = open_reference(reference).said
                scores["reference_embeddings"] = said
            return fidelity(facts["task"], scores, documents=facts["documents"], seed=self.request.seed)

        return self._rows(subject, take, metric, protocol, against=against, data=self.question.data)

    def _task(self, subject: Subject, data: TaskFile) -> list[Measurement]:
        def take(worker: Any) -> list[Estimate]:
            found = self.question.ask(worker, subject.folder, data, subject.name)
            teacher = self.question.answers.get(data.name)
            return data.estimates(found, teacher=teacher, seed=self.request.seed)

        return self._rows(subject, take, data.headline, {}, data=data.name)

    def _rows(
        self, subject: Subject, take: Callable[[Any], list[Estimate]], metric: str, protocol: Mapping[str, Any],
        **context: Any,
    ) -> list[Measurement]:  # fmt: skip
        subject_id = subject.subject_id or ""
        place = self.place
        if place.target is None:
            return [self._missing(subject, metric, place.missing, **context)]
        options = scoring_options(subject.folder, self.request.threads)
        try:
            with place.target.open_worker(subject.folder, options) as worker:
                if "score" not in worker.info().capabilities:
                    raise Unsupported(f"the worker on {place.name} does not score", hint="docs/worker-protocol.md")
                estimates, info = take(worker), worker.info()
        except (EdgestillError, ArithmeticError) as error:
            return [self._missing(subject, metric, _line(error), **context)]
        return [
            estimate.measurement(
                subject=subject.name, artifact_id=subject_id, info=info, device=place.device,
                threads=self.request.threads, environment=place.environment, target=place.name,
                protocol={**protocol, **scoring_protocol(info.runtime)}, **context,
            )
            for estimate in estimates
        ]  # fmt: skip

    def _missing(self, subject: Subject, metric: str, reason: str, **context: Any) -> Measurement:
        runtime = "torch"
        if subject.kind == "artifact":
            with contextlib.suppress(EdgestillError):
                runtime = open_artifact(subject.folder, check=False).manifest.format
        return Measurement(
            subject=subject.name, metric=metric, unit=METRICS[metric].unit, source="measured", summary=None,
            samples=(), artifact_id=subject.subject_id or "", runtime=runtime, runtime_version="", backend="",
            device=self.place.device, threads=self.request.threads, protocol={},
            environment=self.place.environment, reason=reason, target=self.place.name, **context,
        )  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_room(work: Path, model: ModelFolder, request: AccuracyRequest, *, both: bool) -> None:
    """Logits of a big vocabulary are big, and a memory-mapped file on a full disk kills the process."""
    if model.task not in TOKEN_TASKS:
        return
    tokens = request.tokens if model.task == "text-generation" else request.examples * model.max_length
    wanted = 4 * model.vocab_size * tokens * (2 if both else 1)
    free = shutil.disk_usage(work).free
    if wanted > free:
        raise ResourceExhausted(
            f"the reference needs {wanted / 1e9:.1f} GB in {work.parent}, {free / 1e9:.1f} GB are free",
            hint="lower --tokens, or set TMPDIR to a folder with more room",
        )
