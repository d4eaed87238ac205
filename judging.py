"""The stages of a run that judge: references, verdicts, accuracy, labelled tasks, speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import Artifact, append_verdict, move_artifact
from .bench.environment import describe_environment, device_label
from .bench.records import Measurement, Verdict, read_measurements, verdict_from_json, write_measurements
from .bench.sample_text import SAMPLE_TEXT
from .data_labels import LabelledSet, in_labels_of
from .files import atomic_write, hash_json, read_json
from .recipe import ExportConfig, Recipe
from .stages import RunFolder

if TYPE_CHECKING:
    from .bench.fidelity import Estimate
    from .bench.robustness import NoiseRow
    from .checkpoints import ModelFolder
    from .data import DataSets
    from .runtimes.session import SessionInfo

__all__ = ["Judge", "Subjects", "read_all_measurements", "read_noise", "read_verdicts", "subject_names"]

# Raised by one when what a stage writes changes although its input does not.
VERSIONS = {"verify": 3, "accuracy": 3, "tasks": 3, "robustness": 2, "speed": 2}

NOISE_FILE = "work/robustness.json"


@dataclass(frozen=True)
class Subjects:
    """The models of a run: ``student`` is the teacher itself when it is shipped as it is; ``cut`` the student before
    training."""

    teacher: ModelFolder
    student: ModelFolder
    cut: ModelFolder | None = None

    def torch(self) -> dict[str, ModelFolder]:
        """Those that torch runs, by the name that reports use."""
        found = {"teacher": self.teacher}
        if self.student.path != self.teacher.path:
            found["student"] = self.student
        if self.cut is not None:
            found["untrained-cut"] = self.cut
        return found


class Judge:
    """Judges what a run made, stage after stage, all in its run folder."""

    def __init__(self, recipe: Recipe, folder: RunFolder, subjects: Subjects, data: DataSets) -> None:
        self.recipe = recipe
        self.folder = folder
        self.subjects = subjects
        self.data = data
        self.progress = folder.observer.advanced
        self._columns: tuple[int, ...] | None = None
        self.environment = describe_environment()
        self.texts: dict[str, Sequence[str]] = {text.name: text.test for text in data.text if text.test}
        if not self.texts:
            self.texts = {"sample": SAMPLE_TEXT}

    # ---- references ----------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The teacher's id of each of the student's, where its vocabulary was trimmed."""
        from .bench.reference import vocabulary_columns

        if self.recipe.student.vocabulary is None:
            return None
        if self._columns is None:
            self._columns = vocabulary_columns(self.subjects.teacher, self.subjects.student)
        return self._columns

    def asked(self, of: str) -> str:
        """The name of the teacher's answers that a subject is compared with: it must have read the same ids."""
        return "teacher" if of == "teacher" or self.columns is None else "teacher-of-student"

    def references(self, model: ModelFolder, name: str) -> dict[str, Path]:
        """What ``model`` says about each held-out text. Made once, reused while whole.

        Everyone reads the teacher's token ids. A student with a trimmed vocabulary reads its own, and then
        ``teacher-of-student`` are the teacher's answers on those.
        """
        from .bench.reference import make_reference

        bench = self.recipe.bench
        limit = bench.tokens if self.subjects.teacher.task == "text-generation" else bench.examples
        length = min(self.recipe.data.max_length, model.max_length)
        found = {}
        for text, examples in self.texts.items():
            root = self.folder / "work/references" / text
            trimmed = self.columns is not None
            if name == "teacher" or (trimmed and name == "student"):
                found[text] = make_reference(
                    model.path, root / name, texts=examples, max_length=length, window=min(bench.window, length),
                    limit=limit, threads=bench.threads, progress=self.progress,
                )  # fmt: skip
            else:
                found[text] = make_reference(
                    model.path, root / name, ids_from=root / ("student" if trimmed else "teacher"),
                    columns=self.columns, threads=bench.threads, progress=self.progress,
                )  # fmt: skip
        return found

    def _all_references(self) -> dict[str, dict[str, Path]]:
        """The references of teacher and student, and of the teacher on the student's ids, as one stage."""
        made: dict[str, dict[str, Path]] = {}

        def action() -> Mapping[str, Any]:
            made["teacher"] = self.references(self.subjects.teacher, "teacher")
            same = self.subjects.student.path == self.subjects.teacher.path
            made["student"] = made["teacher"] if same else self.references(self.subjects.student, "student")
            theirs = self.asked("student")
            made[theirs] = self.references(self.subjects.teacher, theirs)
            return {"note": ", ".join(self.texts)}

        self.folder.stage("references", {}, action, title="ask teacher and student", always=True)
        return made

    def question(self) -> dict[str, Any]:
        """What all figures of accuracy depend on beside their subject."""
        bench = self.recipe.bench
        return {
            "teacher": self.subjects.teacher.model_id, "texts": hash_json({k: list(v) for k, v in self.texts.items()}),
            "length": self.recipe.data.max_length, "window": bench.window, "tokens": bench.tokens,
            "examples": bench.examples, "threads": bench.threads, "seed": bench.seed,
        }  # fmt: skip

    # ---- verdicts ------------------------------------------------------------------------------------------------

    def verify(self, artifacts: Sequence[tuple[ExportConfig, Artifact]]) -> list[tuple[ExportConfig, Artifact]]:
        """Judge every artifact; the failed ones are moved to ``quarantine/``. Returns those that passed."""
        references = self._all_references()
        passed = []
        for config, artifact in artifacts:
            source = self.subjects.teacher if config.of == "teacher" else self.subjects.student
            theirs = references[self.asked(config.of)]
            verdict = self._verify(config.variant, artifact, source, references[config.of], theirs)
            room = "artifacts" if verdict.passed else "quarantine"
            if artifact.path.parent.name != room:
                artifact = move_artifact(artifact, self.folder / room / config.variant)
            if verdict.passed:
                passed.append((config, artifact))
        return passed

    def _verify(
        self, variant: str, artifact: Artifact, source: ModelFolder, own: dict[str, Path], teacher: dict[str, Path]
    ) -> Verdict:
        from .bench.fidelity import fidelity
        from .bench.reference import read_facts
        from .bench.verify import VerifyOptions, examine

        result = f"work/verdicts/{variant}.json"
        rows = f"work/accuracy/{variant}.jsonl"

        def action() -> Mapping[str, Any]:
            options = VerifyOptions(threads=self.recipe.bench.threads, device=device_label(self.environment))
            found = examine(
                artifact.path, student=source.path, references=own, teacher_references=teacher,
                work=self.folder / "work/verify" / variant, subject=variant, options=options, progress=self.progress,
            )  # fmt: skip
            verdict = dataclasses.asdict(found.verdict)
            measured: list[Measurement] = []
            if found.info is not None and found.verdict.passed:
                for (text, against), scores in found.scores.items():
                    documents = read_facts((own if against == "student" else teacher)[text])["documents"]
                    estimates = fidelity(source.task, scores, documents=documents, seed=self.recipe.bench.seed)
                    measured += self._rows(
                        estimates, variant, artifact.manifest.artifact_id, found.info, against=against, data=text
                    )
            write_measurements(self.folder / rows, measured)
            append_verdict(artifact, verdict)
            atomic_write(self.folder / result, json.dumps(verdict, indent=1) + "\n")
            return {"note": self._short(found.verdict, measured)}

        inputs = {
            "version": VERSIONS["verify"], "artifact": artifact.manifest.artifact_id, "source": source.model_id,
            **self.question(),
        }  # fmt: skip
        self.folder.stage(f"verify:{variant}", inputs, action, [result, rows], f"verify {variant}")
        return verdict_from_json(read_json(self.folder / result))

    def _rows(
        self, estimates: Sequence[Estimate], subject: str, subject_id: str, info: SessionInfo, **context: Any
    ) -> list[Measurement]:
        from .runtimes.precision import scoring_protocol

        return [
            estimate.measurement(
                subject=subject, artifact_id=subject_id, info=info, device=device_label(self.environment),
                threads=self.recipe.bench.threads, environment=self.environment,
                protocol=scoring_protocol(info.runtime), **context,
            )
            for estimate in estimates
        ]  # fmt: skip

    def _short(self, verdict: Verdict, measured: Sequence[Measurement]) -> str:
        if not verdict.passed:
            return f"FAILED {verdict.note}"
        from .bench.pick import HEADLINE

        for metric in HEADLINE[self.subjects.teacher.task]:
            shown = [
                f"{row.summary.value:.4g} ({row.data})"
                for row in measured
                if row.metric == metric and row.against == "teacher" and row.summary
            ]
            if shown:
                return f"{verdict.level.replace('_', ' ')}; {metric} to the teacher {', '.join(shown)}"
        return verdict.level.replace("_", " ")

    # ---- accuracy of what torch runs -----------------------------------------------------------------------------

    def accuracy(self) -> None:
        """Student and untrained cut, run by torch, against the teacher; the teacher's own perplexity."""
        for name, model in self.subjects.torch().items():
            self._accuracy(name, model)

    def _accuracy(self, name: str, model: ModelFolder) -> None:
        from .bench.fidelity import fidelity, own_estimates
        from .bench.reference import read_facts
        from .runtimes.scoring import open_reference
        from .runtimes.session import SessionOptions
        from .runtimes.transports.local import LocalWorker

        rows = f"work/accuracy/{name}.jsonl"

        def action() -> Mapping[str, Any]:
            measured: list[Measurement] = []
            references = self.references(self.subjects.teacher, self.asked(name))
            with LocalWorker(model.path, SessionOptions(self.recipe.bench.threads)) as worker:
                for text, reference in references.items():
                    self.progress(f"{name} on {text}", None)
                    documents = read_facts(reference)["documents"]
                    scores = dict(worker.score(reference))
                    if model.task == "feature-extraction":
                        scores["reference_embeddings"] = open_reference(reference).said
                    if name == "teacher":
                        own = model.task == "text-generation"
                        estimates = own_estimates(scores, documents=documents) if own else []
                    else:
                        estimates = fidelity(model.task, scores, documents=documents, seed=self.recipe.bench.seed)
                    against = None if name == "teacher" else "teacher"
                    measured += self._rows(estimates, name, model.model_id, worker.info(), against=against, data=text)
            write_measurements(self.folder / rows, measured)
            return {"note": ""}

        inputs = {"version": VERSIONS["accuracy"], "model": model.model_id, **self.question()}
        self.folder.stage(f"accuracy:{name}", inputs, action, [rows], f"accuracy of the {name}")

    # ---- labelled tasks ------------------------------------------------------------------------------------------

    def tasks(self, artifacts: Sequence[tuple[ExportConfig, Artifact]]) -> None:
        """Accuracy on labelled data, of the torch models and of every artifact that passed."""
        if not self.data.labelled:
            return
        references = self.task_references()
        subjects = {name: (model.path, model.model_id) for name, model in self.subjects.torch().items()}
        subjects |= {config.variant: (a.path, a.manifest.artifact_id) for config, a in artifacts}
        reads = {config.variant: config.of for config, _ in artifacts}
        for name, (path, subject_id) in subjects.items():
            self._tasks(name, path, subject_id, references[self.asked(reads.get(name, name))])

    def task_references(self) -> dict[str, dict[str, Path]]:
        """What the teacher says about each labelled set, on its own ids and on a trimmed student's."""
        from .bench.tasks import make_task_reference

        teacher, student = self.subjects.teacher, self.subjects.student
        made: dict[str, dict[str, Path]] = {"teacher": {}, self.asked("student"): {}}

        def action() -> Mapping[str, Any]:
            for data in self.data.labelled:
                root = self.folder / "work/references" / data.name
                settings: dict[str, Any] = {
                    "max_length": min(self.recipe.data.max_length, teacher.max_length),
                    "threads": self.recipe.bench.threads, "progress": self.progress,
                }  # fmt: skip
                made["teacher"][data.name] = make_task_reference(teacher.path, root / "teacher", data, **settings)
                theirs = self.asked("student")
                if theirs != "teacher":
                    own = make_task_reference(student.path, root / "student", data, **settings)
                    made[theirs][data.name] = make_task_reference(
                        teacher.path, root / theirs, data, ids_from=own, columns=self.columns, **settings
                    )
            return {"note": ", ".join(task.name for task in self.data.labelled)}

        self.folder.stage("task references", {}, action, title="ask the teacher for labels", always=True)
        return made

    def _tasks(self, name: str, path: Path, subject_id: str, references: Mapping[str, Path]) -> None:
        from .bench.tasks import task_estimates
        from .runtimes.precision import scoring_options
        from .runtimes.scoring import open_reference
        from .runtimes.transports.local import LocalWorker

        rows = f"work/tasks/{name}.jsonl"

        def action() -> Mapping[str, Any]:
            measured: list[Measurement] = []
            notes = []
            with LocalWorker(path, scoring_options(path, self.recipe.bench.threads)) as worker:
                for task, reference in references.items():
                    self.progress(f"{name} on {task}", None)
                    scores = worker.score(reference)
                    outputs = scores["embeddings" if "embeddings" in scores else "logits"]
                    teacher = None if name == "teacher" else open_reference(reference).said
                    estimates = task_estimates(
                        outputs, reference, teacher_outputs=teacher, seed=self.recipe.bench.seed
                    )  # fmt: skip
                    notes.append(f"{task} {estimates[0].summary.value:.1%}")
                    measured += self._rows(estimates, name, subject_id, worker.info(), data=task)
            write_measurements(self.folder / rows, measured)
            return {"note": ", ".join(notes)}

        inputs = {
            "version": VERSIONS["tasks"], "subject": subject_id, "tasks": [task.sha256 for task in self.data.labelled],
            **self.question(),
        }  # fmt: skip
        self.folder.stage(f"tasks:{name}", inputs, action, [rows], f"labels with {name}")

    def _of_texts(self) -> list[LabelledSet]:
        """The sets that label whole texts, by the teacher's numbers where it has labels of its own."""
        labels = self.subjects.teacher.labels
        return [in_labels_of(data, labels) if labels else data for data in self.data.tasks]

    # ---- perturbed text ------------------------------------------------------------------------------------------

    def robustness(self) -> None:
        """What noise in the text costs teacher and student (float models in torch); only where there is a student."""
        from .bench.robustness import CLEAN, Renumbered, measure_robustness
        from .checkpoints import load_tokenizer
        from .runtimes.session import SessionOptions
        from .runtimes.torch_session import TorchSession

        bench, teacher = self.recipe.bench, self.subjects.teacher
        models = {name: model for name, model in self.subjects.torch().items() if name != "untrained-cut"}
        if "student" not in models:
            return

        def action() -> Mapping[str, Any]:
            sessions: dict[str, Any] = {
                name: TorchSession(model.path, SessionOptions(bench.threads)) for name, model in models.items()
            }
            if self.columns is not None:
                sessions["teacher"] = Renumbered(sessions["teacher"], self.columns)
            rows = measure_robustness(
                sessions, load_tokenizer(models["student"].path), self.texts, self._of_texts(),
                max_length=min(self.recipe.data.max_length, *(model.max_length for model in models.values())),
                window=bench.window, prefix=teacher.prompt_prefix, seed=bench.seed, progress=self.progress,
            )  # fmt: skip
            atomic_write(self.folder / NOISE_FILE, json.dumps([dataclasses.asdict(row) for row in rows]) + "\n")
            return {"note": ", ".join(dict.fromkeys(row.noise for row in rows if row.noise != CLEAN))}

        inputs = {
            "version": VERSIONS["robustness"], "student": models["student"].model_id,
            "tasks": [task.sha256 for task in self.data.tasks], **self.question(),
        }  # fmt: skip
        self.folder.stage("robustness", inputs, action, [NOISE_FILE], "teacher and student on noisy text")

    # ---- speed ---------------------------------------------------------------------------------------------------

    def speed(self, artifacts: Sequence[tuple[ExportConfig, Artifact]]) -> None:
        """Size, time and memory of everything that passed, interleaved, in fresh processes."""
        from .bench.measure import Subject, measure_size, measure_speed, timed_input
        from .bench.reference import inputs_of

        bench = self.recipe.bench
        subjects = [
            Subject(name, model.path, "model", model.parameters, model.model_id)
            for name, model in self.subjects.torch().items()
            if name != "untrained-cut"  # as fast as the student
        ]
        subjects += [
            Subject(config.variant, artifact.path, "artifact", self._parameters(config), artifact.manifest.artifact_id)
            for config, artifact in artifacts
        ]

        def action() -> Mapping[str, Any]:
            # Ids that every subject has; what they mean makes no difference to speed.
            reference = next(iter(self.references(self.subjects.teacher, self.asked("student")).values()))
            inputs = inputs_of(reference)
            examples = [ids[mask == 1].tolist() for ids, mask in zip(inputs.ids, inputs.mask, strict=True)]
            longest = min([self.subjects.teacher.max_length, *(a.manifest.max_length for _, a in artifacts)])
            ids = timed_input(examples, bench.batch_size, min(bench.length, longest))
            rows = measure_size(subjects, environment=self.environment)
            rows += measure_speed(
                subjects, bench, ids=ids, task=self.subjects.teacher.task, environment=self.environment,
                progress=self.progress,
            )  # fmt: skip
            write_measurements(self.folder / "work/speed.jsonl", rows)
            return {"note": f"{len(subjects)} subjects, {bench.launches} launches each, interleaved"}

        inputs = {
            "version": VERSIONS["speed"], "subjects": {subject.name: subject.subject_id for subject in subjects},
            "bench": bench.model_dump(mode="json"), **self.question(),
        }  # fmt: skip
        self.folder.stage("speed", inputs, action, ["work/speed.jsonl"], "measure speed and memory")

    def _parameters(self, config: ExportConfig) -> int:
        return (self.subjects.teacher if config.of == "teacher" else self.subjects.student).parameters


def subject_names(recipe: Recipe) -> list[str]:
    """Every subject that a run of ``recipe`` may have measured, in the order of reports."""
    return ["teacher", "student", "untrained-cut", *(config.variant for config in recipe.export)]


def read_verdicts(folder: Path, recipe: Recipe) -> list[Verdict]:
    """The verdicts of a run, in the order of the recipe."""
    paths = [folder / "work/verdicts" / f"{name}.json" for name in subject_names(recipe)]
    return [verdict_from_json(read_json(path)) for path in paths if path.exists()]


def read_noise(folder: Path) -> list[NoiseRow]:
    """What perturbed text cost, where that was measured."""
    from .bench.robustness import NoiseRow

    path = folder / NOISE_FILE
    return [NoiseRow(**row) for row in read_json(path)] if path.exists() else []


def read_all_measurements(folder: Path, recipe: Recipe) -> list[Measurement]:
    """Everything that a run measured: size, speed and memory, then accuracy, then tasks, subject after subject."""
    names = subject_names(recipe)
    paths = [folder / "work/speed.jsonl"]
    paths += [folder / "work" / room / f"{name}.jsonl" for room in ("accuracy", "tasks") for name in names]
    rows = [row for path in paths if path.exists() for row in read_measurements(path)]
    return [row for row in rows if row.subject in names]
