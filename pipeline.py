"""The main job: a recipe in, one run folder out. Each stage is skipped when nothing that it depends on has changed.

::

    fetch -> teacher -> data -> student -> references -> export -> verify -> accuracy -> speed -> report

    runs/NAME/
      recipe.toml  run.json  measurements.jsonl  report.html  MODEL_CARD.md
      teacher/  student/           model folders (further teachers: teacher-2/ ...)
      artifacts/VARIANT/           verified artifacts
      quarantine/VARIANT/          artifacts that failed
      app/VARIANT/LANGUAGE/        samples, where [[export]] asks for them
      work/                        references, checkpoints, results of single stages; may be removed
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .apps import check_apps, write_apps
from .artifact import Artifact, open_artifact
from .bench.environment import usable_threads
from .bench.metrics import find_metric
from .company import company, together
from .delivery import RunResult, deliver
from .distillation import check_comparable, latency_cost, make_start
from .errors import EdgestillError, MissingDependency, ResourceExhausted, UsageError, nearest
from .files import atomic_write, hash_json
from .judging import Judge, Subjects
from .recipe import DistillConfig, ExportConfig, Recipe, find_recipe, load_recipe
from .recipe_text import dump_recipe
from .stages import Observer, RunFolder, find_run

if TYPE_CHECKING:
    from .checkpoints import ModelFolder
    from .data import DataSets
    from .distill import DistillResult
    from .export.source import Source
    from .recipe_teaching import ExtraTeacherConfig

__all__ = ["STAGES", "RunConfig", "rebuild_report", "run_recipe"]

# Where `--until` can stop, in order.
STAGES = ("fetch", "teacher", "student", "export", "verify", "bench", "report")
SPLITS: tuple[Literal["train", "calibration", "dev", "test"], ...] = ("train", "calibration", "dev", "test")
# Raised by one when what a stage writes changes although its input does not.
VERSIONS = {"teacher": 1, "student": 1, "export": 1}


@dataclass(frozen=True)
class RunConfig:
    """What to run: a recipe file (or the name of a shipped one), the folder of run folders, where to stop."""

    recipe: str | Path
    runs: Path = Path("runs")
    until: str | None = None


def run_recipe(config: RunConfig, observer: Observer | None = None) -> RunResult:
    """Run a recipe and return what came out; the same call again goes on where the last one stopped.

    A failed artifact or gate does not stop the others: it is in the result, whose ``exit_code`` says so. Raises what
    the rooms raise (:mod:`edgestill.errors`) when the run itself can't go on; what was done is kept.
    """
    if config.until is not None and config.until not in STAGES:
        raise UsageError(f"no stage {config.until!r}", hint=nearest(config.until, STAGES))
    path = find_recipe(config.recipe)
    recipe = load_recipe(path)
    with RunFolder(config.runs / recipe.name, observer).locked() as folder, company():
        return Run(recipe, path, folder).until(config.until or STAGES[-1])


def rebuild_report(folder: Path) -> Path:
    """Write ``report.html`` and ``MODEL_CARD.md`` of a finished run folder anew; returns the report's path."""
    recipe = load_recipe(find_run(folder) / "recipe.toml")
    with RunFolder(folder).locked() as opened:
        missing = [name for name in ("teacher", "speed") if name not in opened.records()]
        if missing:
            raise UsageError(f"{folder} is not finished: no {missing[0]} yet", hint="run the recipe again, it goes on")
        deliver(recipe, opened)
    return folder / "report.html"


class Run:
    """One recipe on its way through the stages."""

    def __init__(self, recipe: Recipe, path: Path, folder: RunFolder, *, app_out: Path | None = None) -> None:
        self.recipe = recipe
        self.app_out = app_out
        self.last = STAGES[-1]
        self.base = path.resolve().parent
        self.folder = folder
        self.progress = folder.observer.advanced
        self.threads = (recipe.distill.threads if recipe.distill else None) or usable_threads()
        self.problems: dict[str, str] = {}

    def until(self, last: str) -> RunResult:
        """All stages up to ``last``."""
        for metric in self.recipe.gates:
            find_metric(metric)  # a mistyped gate is found now, not after the work
        check_apps(self.recipe)
        atomic_write(self.folder / "recipe.toml", dump_recipe(self.recipe))
        self.last, done = last, STAGES[: STAGES.index(last) + 1]
        source = self._fetch()
        if "teacher" in done:
            teacher = self._teacher(source)
        if "student" in done:
            data = self._data()
            student = self._student(teacher, data)
        if "export" in done:
            artifacts = self._export(teacher, student, data)
        if "verify" in done:
            subjects = Subjects(teacher, student, self.cut(teacher, data))
            judge = Judge(self.recipe, self.folder, subjects, data)
            passed = judge.verify(artifacts)
            for config, artifact in passed:
                with self._not_stopping_the_others(config.variant, f"app:{config.variant}"):
                    write_apps(config, artifact, self.folder, self.app_out)
        if "bench" in done:
            judge.accuracy()
            judge.tasks(passed)
            judge.robustness()
            judge.speed(passed)
        return deliver(self.recipe, self.folder, self.problems, complete=last == STAGES[-1])

    def prepare(self) -> tuple[ModelFolder, DataSets]:
        """The first stages: teacher and text, ready to be used."""
        return self._teacher(self._fetch()), self._data()

    # ---- stages ---------------------------------------------------------------------------------------------------

    def _fetch(self) -> Path:
        from .fetch import fetch

        teacher = self.recipe.teacher
        found: list[Any] = []

        def action() -> Mapping[str, Any]:
            found.append(fetch(teacher.source, sha256=teacher.sha256, base=self.base, progress=self.progress))
            return {"sha256": found[0].sha256, "note": teacher.source}

        self.folder.stage("fetch", {"source": teacher.source}, action, title="fetch the teacher", always=True)
        path: Path = found[0].path
        return path

    def _teacher(self, source: Path) -> ModelFolder:
        from .checkpoints import open_model, prepare_model

        recipe = self.recipe

        def action() -> Mapping[str, Any]:
            model = prepare_model(
                source, self.folder / "teacher", task=recipe.task, license=recipe.teacher.license,
                address=recipe.teacher.source, progress=self.progress,
            )  # fmt: skip
            return {"note": describe(model), "model_id": model.model_id}

        inputs = {
            "version": VERSIONS["teacher"], "sha256": self.folder.records()["fetch"].facts["sha256"],
            "task": recipe.task, "license": recipe.teacher.license,
        }  # fmt: skip
        self.folder.stage("teacher", inputs, action, ["teacher"], "prepare the teacher")
        return open_model(self.folder / "teacher")

    def more_teachers(self) -> list[ModelFolder]:
        """Fetch and prepare ``[[distill.teacher]]``: ``teacher-2/``, ``teacher-3/`` and so on in the run folder."""
        from .checkpoints import open_model, prepare_model
        from .fetch import fetch

        recipe, found = self.recipe, []
        for number, config in enumerate(recipe.distill.teacher if recipe.distill else (), start=2):
            name = f"teacher-{number}"
            source = fetch(config.source, sha256=config.sha256, base=self.base, progress=self.progress)

            def action(
                path: Path = source.path, name: str = name, config: ExtraTeacherConfig = config
            ) -> Mapping[str, Any]:
                model = prepare_model(
                    path, self.folder / name, task=recipe.task, license=config.license, address=config.source,
                    progress=self.progress,
                )  # fmt: skip
                return {"note": describe(model), "model_id": model.model_id}

            inputs = {
                "version": VERSIONS["teacher"], "sha256": source.sha256, "task": recipe.task,
                "license": config.license,
            }  # fmt: skip
            self.folder.stage(name, inputs, action, [name], f"prepare teacher {number}")
            found.append(open_model(self.folder / name))
        return found

    def _data(self) -> DataSets:
        from .data import load_data

        loaded: list[DataSets] = []

        def action() -> Mapping[str, Any]:
            streaming = self.recipe.distill is not None and self.recipe.distill.streaming
            loaded.append(load_data(self.recipe.data, base=self.base, progress=self.progress, stream=streaming))
            sets = {
                part.name: {"sha256": part.sha256, "counts": {s: len(getattr(part, s)) for s in splits}}
                for parts, splits in ((loaded[0].text, SPLITS), (loaded[0].labelled, ("train", "test")))
                for part in parts
            }
            total: dict[str, int] = {name: len(loaded[0].split(name)) for name in SPLITS}
            if (stream := loaded[0].stream) is not None:
                total["train (streamed)"] = len(stream)
            shown = ", ".join(f"{count} {name}" for name, count in total.items() if count)
            return {"sha256": loaded[0].sha256, "sets": sets, "note": shown or "none"}

        self.folder.stage("data", {"data": self.recipe.data.model_dump(mode="json")}, action, title="text", always=True)
        return loaded[0]

    def _student(self, teacher: ModelFolder, data: DataSets) -> ModelFolder:
        from .checkpoints import open_model

        recipe = self.recipe
        if recipe.distill is None and recipe.student == type(recipe.student)():
            return teacher  # shipped as it is
        others = self.more_teachers()

        self._start(teacher)

        def action() -> Mapping[str, Any]:
            result = self.teach(
                teacher, data, out=self.folder / "student", work=self.folder / "work/distill", others=others
            )
            facts = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("path", "curves")}
            atomic_write(self.folder / "work/curves.json", json.dumps(list(result.curves)))
            model = open_model(self.folder / "student")
            return {"note": describe(model), "model_id": model.model_id, "result": facts}

        self.folder.stage(
            "student", {"version": VERSIONS["student"], "threads": self.threads, **self.student_inputs(teacher, data),
                        "others": [other.model_id for other in others]},
            action, ["student", "work/curves.json"], "distil the student" if recipe.distill else "cut the student",
        )  # fmt: skip
        return open_model(self.folder / "student")

    def _distill_config(self) -> DistillConfig | None:
        """The section with the path of its teacher cache taken from the recipe's folder."""
        config = self.recipe.distill
        if config is None or config.cache is None or config.cache.path is None:
            return config
        cache = config.cache.model_copy(update={"path": str(self.base / config.cache.path)})
        return config.model_copy(update={"cache": cache})

    def teach(
        self,
        teacher: ModelFolder,
        data: DataSets,
        *,
        out: Path,
        work: Path,
        signal: Path | None = None,
        others: Sequence[ModelFolder] = (),
    ) -> DistillResult:
        """The student of this recipe, as the model folder ``out``; see :func:`edgestill.distill.distill`."""
        from .checkpoints import open_model
        from .distill import distill

        recipe, target = self.recipe, self.recipe.student.target
        start = self.folder / "work/start" if recipe.student.config or recipe.student.source else None
        cost = None
        if target is not None and target.latency_ms is not None:
            cost = latency_cost(open_model(start) if start else teacher, recipe.bench.threads, recipe.bench.length)
        return together(distill)(
            teacher.path, out, student=recipe.student, config=self._distill_config(), data=data,
            max_length=recipe.data.max_length, work=work, signal=signal, start=start, cost=cost,
            progress=self.progress, others=[other.path for other in others], ship=self._ship(data),
        )  # fmt: skip

    def _ship(self, data: DataSets) -> Callable[[Path, Path], Artifact] | None:
        """The exporter that ``[distill.quantized]`` trains for."""
        quantized = self.recipe.distill.quantized if self.recipe.distill else None
        if quantized is None:
            return None
        of_student = [config for config in self.recipe.export if config.of == "student" and config.to == quantized.to]
        config = of_student[0] if of_student else ExportConfig(to=quantized.to)
        return partial(_ship, config, tuple(data.split("calibration")))

    def student_inputs(self, teacher: ModelFolder, data: DataSets) -> dict[str, Any]:
        """Everything in this recipe that decides its student, JSON-able."""
        recipe = self.recipe
        return {
            "teacher": teacher.model_id,
            "student": recipe.student.model_dump(mode="json"),
            # Where a teacher cache lies, and what else it holds, does not change the student.
            "distill": recipe.distill.model_dump(mode="json", exclude={"cache": {"path", "temperatures"}})
            if recipe.distill
            else None,
            "max_length": recipe.data.max_length,
            "text": hash_json([data.split("train"), data.split("dev")]) if recipe.distill else None,
            **({} if data.stream is None else {"streamed": data.stream.sha256}),
            # What a classifier may learn with cross_entropy; sets for a probe teach nobody.
            **({"labelled": [part.sha256 for part in data.labelled]} if teacher.labels and data.labelled else {}),
            **self._shape_inputs(data),
        }

    def _shape_inputs(self, data: DataSets) -> dict[str, Any]:
        """What else decides a student that is more than layers of the teacher."""
        recipe, inputs = self.recipe, {}
        if "start" in self.folder.records() and (recipe.student.config or recipe.student.source):
            inputs["start"] = self.folder.records()["start"].facts["model_id"]
        if recipe.student.needs_text:
            inputs["importance"] = hash_json(data.split("calibration") or data.split("train"))
        if recipe.student.target is not None and recipe.student.target.latency_ms is not None:
            inputs["timed"] = [recipe.bench.threads, recipe.bench.length]
        if recipe.student.vocabulary is not None:  # the text that a trimmed vocabulary is chosen by
            inputs["vocabulary"] = hash_json([data.split("train"), data.split("calibration"), data.split("dev")])
        return inputs

    def _start(self, teacher: ModelFolder) -> Path | None:
        """The model that the student is cut from, when it is not the teacher."""
        from .checkpoints import open_model

        student = self.recipe.student
        if student.config is None and student.source is None:
            return None
        place = self.folder / "work/start"
        inputs: dict[str, Any] = {"teacher": teacher.model_id, "seed": student.seed, "sha256": student.sha256}
        if student.config is not None:
            from .distill.fresh import read_shape

            inputs["config"] = read_shape(self.base / student.config, teacher)
        else:
            inputs["source"] = student.source

        def action() -> Mapping[str, Any]:
            make_start(self.recipe, teacher, self.base, place, self.folder.observer)
            model = open_model(place)
            return {"note": describe(model), "model_id": model.model_id}

        self.folder.stage("start", inputs, action, ["work/start"], "prepare what the student starts from")
        if STAGES.index(self.last) > STAGES.index("student"):
            check_comparable(open_model(place), teacher, self.folder.path)
        return place

    def cut(self, teacher: ModelFolder, data: DataSets) -> ModelFolder | None:
        """The student before it learned anything: what shows that distillation was worth its time."""
        from .checkpoints import open_model
        from .distill import distill

        recipe = self.recipe
        if recipe.distill is None or recipe.student == type(recipe.student)():
            return None

        start = self._start(teacher)

        def action() -> Mapping[str, Any]:
            work, plan = self.folder / "work/cut-distill", self.folder / "work/distill/plan.json"
            if plan.is_file():  # the very same parts, measured once
                atomic_write(work / "plan.json", plan.read_text(encoding="utf-8"))
            distill(
                teacher.path, self.folder / "work/cut", student=recipe.student, config=None, data=data,
                max_length=recipe.data.max_length, work=work, start=start, progress=self.progress,
            )  # fmt: skip
            return {"note": "the student before training, for comparison"}

        inputs = {"version": VERSIONS["student"], "teacher": teacher.model_id,
                  "student": recipe.student.model_dump(mode="json"), **self._shape_inputs(data)}  # fmt: skip
        self.folder.stage("cut", inputs, action, ["work/cut"], "cut an untrained student")
        return open_model(self.folder / "work/cut")

    def _export(
        self, teacher: ModelFolder, student: ModelFolder, data: DataSets
    ) -> list[tuple[ExportConfig, Artifact]]:
        from .export.source import Source

        calibration, dev = data.split("calibration"), data.split("dev")
        wanted = [(config, teacher if config.of == "teacher" else student) for config in self.recipe.export]
        made: dict[str, Artifact] = {}
        for model in (student,) if student is teacher else (student, teacher):
            source = Source(model)
            for config in source.in_turn([config for config, of in wanted if of is model]):
                with self._not_stopping_the_others(config.variant):
                    made[config.variant] = self._export_one(config, source, teacher, calibration, dev)
        return [(config, made[config.variant]) for config, _ in wanted if config.variant in made]

    def _export_one(
        self, config: ExportConfig, source: Source, teacher: ModelFolder, calibration: list[str], dev: list[str]
    ) -> Artifact:
        from .export import export

        variant = config.variant
        # The part of the recipe that decides the artifact's bytes; how it is measured does not.
        made_by = self.recipe.model_dump(mode="json", include={"task", "teacher", "student", "data", "distill"})
        lineage = {"teacher_id": teacher.model_id, "recipe_sha256": hash_json(made_by)}
        inputs = {
            "version": VERSIONS["export"], "model": source.model_id,
            "config": config.model_dump(mode="json", exclude={"app"}),
            "calibration": hash_json(calibration), "lineage": lineage,
        }  # fmt: skip
        if config.parsed.reads_text:  # others don't look at it
            inputs["dev"] = hash_json(dev)

        def action() -> Mapping[str, Any]:
            artifact = export(
                source, self.folder / "artifacts" / variant, config, calibration=calibration, dev=dev,
                work=self.folder / "work/sensitivities", lineage=lineage, progress=self.progress,
            )  # fmt: skip
            note = f"{artifact.model_bytes / 1e6:.1f} MB, {artifact.manifest.contents}"
            return {"artifact_id": artifact.manifest.artifact_id, "note": note}

        self.folder.stage(
            f"export:{variant}", inputs, action, title=f"export {variant}",
            intact=lambda facts: self._find(variant, facts["artifact_id"]) is not None,
        )  # fmt: skip
        found = self._find(variant, None)
        assert found is not None
        return found

    def _find(self, variant: str, artifact_id: str | None) -> Artifact | None:
        """The whole, unchanged artifact, wherever the verdict put it."""
        for room in ("artifacts", "quarantine"):
            path = self.folder / room / variant
            with contextlib.suppress(UsageError):
                artifact = open_artifact(path)
                if artifact_id in (None, artifact.manifest.artifact_id):
                    return artifact
        return None

    @contextlib.contextmanager
    def _not_stopping_the_others(self, variant: str, stage: str = "") -> Iterator[None]:
        """Keep an artifact that can't be made as a problem; what would hit the others too goes on up."""
        try:
            yield
        except (MissingDependency, ResourceExhausted):
            raise
        except EdgestillError as error:
            self.problems[variant] = str(error)
            self.folder.observer.failed(stage or f"export:{variant}", str(error))


def describe(model: ModelFolder) -> str:
    """``"bert, 6 layers, 22.7 M parameters"``."""
    return f"{model.architecture}, {model.layers} layers, {model.parameters / 1e6:.1f} M parameters"


def _ship(config: ExportConfig, calibration: Sequence[str], model: Path, out: Path) -> Artifact:
    """A module-level function, so that it can be sent to processes that train together."""
    from .export import export

    return export(model, out, config, calibration=calibration)
