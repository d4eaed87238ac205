"""What a run ends with: one result value, ``measurements.jsonl``, ``report.html`` and ``MODEL_CARD.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .artifact import Artifact, open_artifact
from .bench.environment import describe_environment, package_versions
from .bench.gates import GateResult, gates_exit_code, judge
from .bench.pick import HEADLINE
from .bench.records import Check, Measurement, Verdict, write_measurements
from .files import hash_bytes, read_json
from .judging import read_all_measurements, read_noise, read_verdicts
from .recipe import Recipe
from .recipe_text import dump_recipe
from .stages import RunFolder

if TYPE_CHECKING:
    from .bench.report.facts import ArtifactFacts, DataFacts, DistillFacts, ModelFacts

__all__ = ["ArtifactResult", "RunResult", "deliver"]

# What the result shows of each artifact, beside the headline metric of its task.
_SHOWN = ("model_bytes", "latency_ms", "decode_tokens_per_s", "prefill_tokens_per_s", "load_ms", "peak_memory_bytes")


@dataclass(frozen=True)
class ArtifactResult:
    """One artifact as the result tells it: where it is, how it was judged, its main numbers (``null``: not taken).

    ``metrics`` maps ``NAME`` or, for accuracy, ``NAME@DATA`` (against the teacher) to the headline value.
    """

    name: str
    folder: str
    artifact_id: str
    contents: str
    level: Literal["device_verified", "program_verified", "failed", "not_verified"]
    failures: tuple[str, ...]
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class RunResult:
    """What a run came to. ``status`` is ``partial`` when it was asked to stop early; ``problems`` maps a variant that
    could not be made to the reason."""

    run: str
    recipe: str
    status: Literal["passed", "failed", "inconclusive", "partial"]
    exit_code: int
    headline: str
    report: str | None
    model_card: str | None
    artifacts: tuple[ArtifactResult, ...]
    baselines: Mapping[str, Mapping[str, float | None]]
    gates: tuple[GateResult, ...]
    problems: Mapping[str, str]
    stages: Mapping[str, float]
    unchanged: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=package_versions)
    schema_version: int = 1


def deliver(
    recipe: Recipe, folder: RunFolder, problems: Mapping[str, str] | None = None, *, complete: bool = True
) -> RunResult:
    """Gather what the stages left in ``folder``, judge the gates, and (``complete``) write report and model card."""
    problems = dict(problems or {})
    verdicts = read_verdicts(folder.path, recipe)
    measurements = read_all_measurements(folder.path, recipe)
    artifacts = _artifacts(recipe, folder.path)
    gates = judge(measurements, recipe.gates) if complete else []
    headline = ""
    if complete:
        write_measurements(folder / "measurements.jsonl", measurements)
        headline = _report(recipe, folder, artifacts, measurements, verdicts, gates, problems)
    code = 0
    if problems or any(not verdict.passed for verdict in verdicts):
        code = 1
    code = code or gates_exit_code(gates)
    status: Any = {0: "passed", 3: "inconclusive"}.get(code, "failed") if complete or code else "partial"
    levels = {verdict.subject: verdict for verdict in verdicts}
    return RunResult(
        run=str(folder.path),
        recipe=recipe.name,
        status=status,
        exit_code=code,
        headline=headline,
        report=str(folder / "report.html") if complete else None,
        model_card=str(folder / "MODEL_CARD.md") if complete else None,
        artifacts=tuple(
            _result(name, artifact, folder.path, levels.get(name), measurements)
            for name, artifact in artifacts.items()
        ),
        baselines={
            name: _numbers(name, measurements)
            for name in ("teacher", "student", "untrained-cut")
            if any(row.subject == name for row in measurements)
        },
        gates=tuple(gates),
        problems=problems,
        stages={name: record.seconds for name, record in folder.records().items()},
        unchanged=tuple(folder.skipped),
    )  # fmt: skip


def _artifacts(recipe: Recipe, root: Path) -> dict[str, Artifact]:
    found = {}
    for config in recipe.export:
        for room in ("artifacts", "quarantine"):
            if (root / room / config.variant).is_dir():
                found[config.variant] = open_artifact(root / room / config.variant, check=False)
                break
    return found


def _result(
    name: str, artifact: Artifact, root: Path, verdict: Verdict | None, measurements: Sequence[Measurement]
) -> ArtifactResult:
    failures = [_failure(check) for check in verdict.failures] if verdict else []
    return ArtifactResult(
        name=name,
        folder=artifact.path.relative_to(root).as_posix(),
        artifact_id=artifact.manifest.artifact_id,
        contents=artifact.manifest.contents,
        level=verdict.level if verdict else "not_verified",
        failures=tuple(failures),
        metrics=_numbers(name, measurements),
    )


def _failure(check: Check) -> str:
    """One line: which check, what it found, in which tensor first."""
    found = check.reason or f"{check.value}"
    return f"{check.name}: {found}" + (f"; first in {check.first_tensor}" if check.first_tensor else "")


def _numbers(name: str, measurements: Sequence[Measurement]) -> dict[str, float | None]:
    """The headline value of each metric of one subject, as :class:`ArtifactResult` keys them."""
    accuracy = {metric for metrics in HEADLINE.values() for metric in metrics} | {"top1_agreement", "perplexity_ratio"}
    numbers: dict[str, float | None] = {}
    for row in measurements:
        if row.subject != name:
            continue
        value = row.summary.value if row.summary else None
        if row.metric in _SHOWN:
            numbers[row.metric] = value
        elif row.metric in accuracy and row.against in ("teacher", None):
            numbers[f"{row.metric}@{row.data}"] = value
    return numbers


def _report(
    recipe: Recipe,
    folder: RunFolder,
    artifacts: Mapping[str, Artifact],
    measurements: Sequence[Measurement],
    verdicts: Sequence[Verdict],
    gates: Sequence[GateResult],
    problems: Mapping[str, str],
) -> str:
    """Write report and card; returns the sentence that says what to ship."""
    from .bench.report import ArtifactFacts, RunFacts, StageFacts, build_report
    from .checkpoints import open_model

    teacher = open_model(folder / "teacher")
    student = open_model(folder / "student") if (folder / "student").is_dir() else None
    records = folder.records()
    text = dump_recipe(recipe)
    of = {config.variant: config.of for config in recipe.export}
    made: list[ArtifactFacts] = [
        ArtifactFacts(name, artifact.manifest, artifact.path.relative_to(folder.path).as_posix(), of[name])
        for name, artifact in artifacts.items()
    ]
    facts = RunFacts(
        name=recipe.name,
        description=recipe.description,
        task=teacher.task,
        license=teacher.license,
        teacher=_model_facts("teacher", teacher, recipe.teacher.source),
        student=_model_facts("student", student, "the teacher") if student else None,
        data=_data_facts(recipe, records),
        distill=_distill_facts(recipe, folder) if student else None,
        noise=read_noise(folder.path) if student else (),
        artifacts=made,
        stages=[
            StageFacts(name, record.seconds, "reused" if name in folder.skipped else "done")
            for name, record in records.items()
        ],
        recipe_text=text,
        recipe_sha256=hash_bytes(text.encode()),
        versions=package_versions(),
        seeds={"data": recipe.data.seed, "bench": recipe.bench.seed}
        | ({"distill": recipe.distill.seed} if recipe.distill else {}),
        environment=describe_environment(),
        problems=[f"{name}: {reason}" for name, reason in problems.items()],
    )
    return build_report(facts, measurements, verdicts, gates, folder.path).choice.sentence


def _model_facts(name: str, model: Any, source: str) -> ModelFacts:
    from .bench.report import ModelFacts

    return ModelFacts(
        name, model.architecture, model.parameters, model.layers, model.hidden_size, model.vocab_size,
        model.size_bytes, model.model_id, model.license, source,
    )  # fmt: skip


def _data_facts(recipe: Recipe, records: Mapping[str, Any]) -> list[DataFacts]:
    from .bench.report import DataFacts

    sets = records["data"].facts.get("sets", {}) if "data" in records else {}
    rows: list[DataFacts] = []
    for kind, configs in (("text", recipe.data.text), ("labelled", recipe.data.task)):
        for config in configs:
            known = sets.get(config.name, {})
            rows.append(DataFacts(config.name, kind, config.source, known.get("sha256", ""), known.get("counts", {})))  # type: ignore[arg-type]
    return rows


def _distill_facts(recipe: Recipe, folder: RunFolder) -> DistillFacts | None:
    from .bench.report import DistillFacts

    record = folder.records().get("student")
    if record is None or recipe.distill is None:
        return None
    result = record.facts["result"]
    curves = read_json(folder / "work/curves.json")
    return DistillFacts(
        losses={name: weight for name, weight in recipe.distill.loss.items() if weight}, steps=result["steps"],
        seconds=result["seconds"], tokens_seen=result["tokens_seen"], keep=result["keep"],
        teacher_layers=result["teacher_layers"], dev_before=result["dev_before"], dev_after=result["dev_after"],
        curve=curves, cost=result.get("cost", {}),
    )  # fmt: skip
