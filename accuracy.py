"""Accuracy on the artifact, in its runtime: against a teacher and a student, and on small tasks of one's own.

``edgestill bench ARTIFACT --against TEACHER [--student FOLDER] [--text FILE] [--tasks FILE]``. Every subject gets the
same token ids in a process of its own; intervals resample documents. What a subject can't do is a row without a value
and with the reason; the others are measured.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import TOKEN_TASKS, open_artifact
from .bench.completions import CompletionSet, completion_estimates, encode_pairs, load_tokenizer_file, read_completions
from .bench.environment import describe_environment, device_label
from .bench.likelihood import Likelihood, likelihoods
from .bench.metrics import METRICS
from .bench.records import Measurement
from .commands import judged_texts, model_folder
from .errors import BadInput, EdgestillError, ResourceExhausted, UsageError
from .runtimes.precision import scoring_options, scoring_protocol
from .runtimes.session import SessionInfo, SessionOptions
from .stages import Observer

if TYPE_CHECKING:
    from .bench.fidelity import Estimate
    from .bench.measure import Subject
    from .checkpoints import ModelFolder

__all__ = ["AccuracyRequest", "measure_accuracy"]

EXAMPLES = 1024
"""Texts that are read from a file at most."""

OpenWorker = Callable[[Path, SessionOptions], AbstractContextManager[Any]]
_HEADLINE = {"feature-extraction": "spearman"}  # what stands for all metrics of a subject that can't be scored


@dataclass(frozen=True)
class AccuracyRequest:
    """Compare with ``against`` (the teacher) and ``student`` on ``text`` (default: the built-in sample); answer
    ``tasks`` (JSON lines, :mod:`edgestill.bench.completions`). At most ``tokens`` are predicted (text generation), in
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
    environment: Mapping[str, Any] | None = None,
    open_worker: OpenWorker | None = None,
) -> list[Measurement]:
    """Every metric of accuracy of every subject, a row each (``against``: ``"teacher"``, ``"student"``, or none for a
    task's own accuracy). ``open_worker`` starts a worker (default: a process on this machine).

    Raises :class:`UsageError` for options that make no sense, :class:`BadInput` for files that can't be read; what is
    wrong with one subject is written into its row.
    """
    if request.against is None and (request.student or request.text):
        raise UsageError("--student and --text need a teacher", hint="--against TEACHER")
    if request.against is None and not request.tasks:
        raise UsageError("nothing to compare with", hint="--against TEACHER, or --tasks FILE.jsonl")
    if open_worker is None:
        from .runtimes.transports.local import LocalWorker

        open_worker = LocalWorker
    sets = [read_completions(path) for path in request.tasks]
    judge = _Judge(request, observer, dict(environment or describe_environment()), open_worker)
    observer.started("accuracy", "measure accuracy")
    with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
        return judge.measure(subjects, sets, Path(scratch))


@dataclass
class _Judge:
    request: AccuracyRequest
    observer: Observer
    environment: Mapping[str, Any]
    open_worker: OpenWorker

    def measure(self, subjects: Sequence[Subject], sets: Sequence[CompletionSet], work: Path) -> list[Measurement]:
        references: dict[str, Path] = {}
        teacher: ModelFolder | None = None
        data = ""
        if self.request.against is not None:
            teacher = model_folder(self.request.against, work / "teacher", self.observer)
            data, references = self._references(teacher, work)
        answers: dict[str, list[Likelihood]] = {}
        if teacher is not None and sets:
            with self.open_worker(teacher.path, scoring_options(teacher.path, self.request.threads)) as worker:
                answers = {one.name: self._answers(worker, teacher.path, one, "teacher") for one in sets}
        rows: list[Measurement] = []
        for subject in subjects:
            for against, reference in references.items():
                rows += self._against(subject, against, data, reference)
            for one in sets:
                rows += self._task(subject, one, answers.get(one.name))
        return rows

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

    def _against(self, subject: Subject, against: str, data: str, reference: Path) -> list[Measurement]:
        from .bench.fidelity import fidelity
        from .bench.reference import read_facts
        from .runtimes.scoring import open_reference

        facts = read_facts(reference)
        protocol = {"inputs": facts["inputs"], "inputs_sha256": facts["inputs_sha256"]}
        metric = _HEADLINE.get(facts["task"], "kl")
        self.observer.advanced(f"{subject.name} against the {against}")

        def take(worker: Any) -> list[Estimate]:
            scores = dict(worker.score(reference, self.request.batch_size))
            if facts["task"] == "feature-extraction":
                said = open_reference(reference).said
                scores["reference_embeddings"] = said
            return fidelity(facts["task"], scores, documents=facts["documents"], seed=self.request.seed)

        return self._rows(subject, take, metric, protocol, against=against, data=data)

    def _task(self, subject: Subject, data: CompletionSet, teacher: Sequence[Likelihood] | None) -> list[Measurement]:
        def take(worker: Any) -> list[Estimate]:
            found = self._answers(worker, subject.folder, data, subject.name)
            return completion_estimates(data, found, teacher=teacher, seed=self.request.seed)

        return self._rows(subject, take, "accuracy", {}, data=data.name)

    def _answers(self, worker: Any, folder: Path, data: CompletionSet, name: str) -> list[Likelihood]:
        info: SessionInfo = worker.info()
        if info.task != "text-generation":
            raise BadInput(f"{data.name} asks for continuations, {name} is for {info.task}",
                           hint="choices and cloze need a model that generates text")  # fmt: skip
        tokenizer = load_tokenizer_file(folder)
        pairs = [(one.context, text) for one in data.examples for text in one.continuations]
        ids = encode_pairs(tokenizer, pairs, _prefix(folder, tokenizer))

        def progress(message: str, fraction: float | None = None) -> None:
            self.observer.advanced(f"{name} on {data.name}", fraction)

        return likelihoods(worker, ids, batch_size=self.request.batch_size, progress=progress)

    def _rows(
        self, subject: Subject, take: Callable[[Any], list[Estimate]], metric: str, protocol: Mapping[str, Any],
        **context: Any,
    ) -> list[Measurement]:  # fmt: skip
        subject_id = subject.subject_id or ""
        try:
            with self.open_worker(subject.folder, scoring_options(subject.folder, self.request.threads)) as worker:
                estimates, info = take(worker), worker.info()
        except (EdgestillError, ArithmeticError) as error:
            return [self._missing(subject, metric, " ".join(str(error).split()), **context)]
        return [
            estimate.measurement(
                subject=subject.name, artifact_id=subject_id, info=info, device=device_label(self.environment),
                threads=self.request.threads, environment=self.environment,
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
            device=device_label(self.environment), threads=self.request.threads, protocol={},
            environment=self.environment, reason=reason, **context,
        )  # fmt: skip


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


def _prefix(folder: Path, tokenizer: Any) -> int | None:
    """The token that stands for an empty context: BOS, else end of text, as ``tokenizer_config.json`` names them."""
    from .files import read_json

    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name) if isinstance(config, dict) else None
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found = tokenizer.token_to_id(text)
            if found is not None:
                return int(found)
    return None
