"""Which loss is best for this recipe? The same student, taught by each loss with several seeds, measured on test text.

::

    runs/NAME/losses/
      run.json                     which students are done, and from what (the same command again goes on)
      signal/                      what the teacher said, kept once for all of them
      LOSS/seed-N/student/         model folder
      LOSS/seed-N/work/            checkpoints while it learns
      LOSS/seed-N/measured.json    its figures on the test split

Only the loss and the seed (the order of the text) differ. A winner is named for a metric only where the 95 % intervals
over seeds separate (:mod:`edgestill.bench.spread`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench.metrics import METRICS
from .bench.spread import Spread, find_winner, spread
from .company import company
from .errors import RecipeError, UsageError
from .files import atomic_write, read_json
from .judging import Judge, Subjects
from .loss_names import LOSS_NAMES, parse_loss
from .pipeline import Run
from .recipe import Recipe, find_recipe, load_recipe
from .stages import Observer, RunFolder

if TYPE_CHECKING:
    from .checkpoints import ModelFolder
    from .data import DataSets

__all__ = ["LossCompareConfig", "LossComparison", "LossRow", "MetricWinner", "compare_losses", "parse_losses"]

# Raised by one when what is measured changes although its input does not.
VERSION = 1
# What is shown of each student, where its task has it.
SHOWN = ("kl", "top1_agreement", "perplexity", "spearman", "cosine", "ece", "next_token_accuracy", "accuracy",
         "f1")  # fmt: skip


@dataclass(frozen=True)
class LossCompareConfig:
    """Compare ``losses`` (each a loss's name, or a sum: ``forward_kl=0.9+cross_entropy=0.1``) over ``seeds`` seeds,
    from the recipe's own upwards."""

    recipe: str | Path
    losses: tuple[str, ...]
    seeds: int = 3
    runs: Path = Path("runs")


@dataclass(frozen=True)
class LossRow:
    """One loss: its figures by ``METRIC@DATA``; ``seconds`` and ``tokens_seen`` of training, summed over the seeds."""

    loss: str
    weights: Mapping[str, float]
    metrics: Mapping[str, Spread]
    seconds: float
    tokens_seen: int


@dataclass(frozen=True)
class MetricWinner:
    """Who wins one ``METRIC@DATA`` (``null``: nobody), and why."""

    metric: str
    data: str
    winner: str | None
    reason: str


@dataclass(frozen=True)
class LossComparison:
    """What came out. ``baselines`` are the teacher and the student before training (``untrained-cut``), on the same
    text; ``folder`` holds the students."""

    recipe: str
    task: str
    folder: str
    seeds: tuple[int, ...]
    rows: tuple[LossRow, ...]
    winners: tuple[MetricWinner, ...]
    baselines: Mapping[str, Mapping[str, float]]
    unchanged: tuple[str, ...] = ()
    schema_version: int = 1


def parse_losses(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """The weights of each loss or sum of losses, by its name as it is written in full.

    >>> parse_losses(["jsd", "forward_kl=0.9+cross_entropy=0.1"])
    {'jsd:0.5': {'jsd:0.5': 1.0}, 'forward_kl=0.9+cross_entropy=0.1': {'forward_kl': 0.9, 'cross_entropy': 0.1}}

    Raises :class:`RecipeError` for a loss that does not exist, :class:`UsageError` for none, one named twice, and a
    weight that is no number above 0.
    """
    found: dict[str, dict[str, float]] = {}
    for text in filter(None, (text.strip() for text in texts)):
        weights: dict[str, float] = {}
        for part in text.split("+"):
            name, equals, weight = part.strip().partition("=")
            full = parse_loss(name.strip()).text
            if full in weights:
                raise UsageError(f"{text}: {full} stands in it twice", hint="add the two weights up")
            weights[full] = _weight(weight, text) if equals else 1.0
        plain = list(weights.values()) == [1.0]
        title = next(iter(weights)) if plain else "+".join(f"{name}={value:g}" for name, value in weights.items())
        if title in found:
            raise UsageError(f"--loss names {title} twice", hint="name each once; --seeds repeats it")
        found[title] = weights
    if not found:
        raise UsageError("no loss to compare", hint=f"--loss {','.join(list(LOSS_NAMES)[:2])}")
    return found


def _weight(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{whole}: the weight {text[:30]!r} is no number above 0", hint="forward_kl=0.9")
    return value


def compare_losses(config: LossCompareConfig, observer: Observer | None = None) -> LossComparison:
    """Teach the recipe's student with each loss and seed, measure all of them, and say where one wins.

    Everything that could be wrong with the losses is found before the first student. A killed call goes on where it
    was; what is finished is not done again. Raises :class:`RecipeError` for a recipe without ``[distill]`` and for a
    loss that does not fit its task.
    """
    if config.seeds < 1:
        raise UsageError(f"{config.seeds} seeds: nothing to train", hint="--seeds 3 (1 gives no interval, no winner)")
    losses = parse_losses(config.losses)
    path = find_recipe(config.recipe)
    recipe = load_recipe(path)
    if recipe.distill is None:
        raise RecipeError(f"{path}: no [distill] section", hint="a loss can only be compared where something is taught")
    with RunFolder(config.runs / recipe.name, observer).locked() as outer, company():
        run = Run(recipe, path, outer)
        teacher, data = run.prepare()
        _check(losses, teacher)
        with RunFolder(outer / "losses", observer).locked() as folder:
            return _Comparison(run, folder, teacher, data).of(losses, config.seeds)


def _check(losses: Mapping[str, Mapping[str, float]], teacher: ModelFolder) -> None:
    from .distill.losses import select_losses

    for weights in losses.values():
        select_losses(weights, teacher.task)


class _Comparison:
    """One comparison at work."""

    def __init__(self, run: Run, folder: RunFolder, teacher: ModelFolder, data: DataSets) -> None:
        self.run = run
        self.folder = folder
        self.teacher = teacher
        self.data = data
        self.recipe: Recipe = run.recipe
        self.cut = run.cut(teacher, data)
        self.others = run.more_teachers()
        self.judge = Judge(self.recipe, run.folder, Subjects(teacher, self.cut or teacher, self.cut), data)

    def of(self, losses: Mapping[str, Mapping[str, float]], seeds: int) -> LossComparison:
        assert self.recipe.distill is not None
        first = self.recipe.distill.seed
        numbers = tuple(range(first, first + seeds))
        self._ask_teacher()
        baselines = {"teacher": self._baseline("teacher", self.teacher)}
        if self.cut is not None:
            baselines["untrained-cut"] = self._baseline("untrained-cut", self.cut)
        rows = []
        for loss, weights in losses.items():
            students = [self._student(loss, weights, seed) for seed in numbers]
            keys = [key for key in students[0]["metrics"] if all(key in student["metrics"] for student in students)]
            rows.append(
                LossRow(
                    loss, weights, {key: spread([student["metrics"][key] for student in students]) for key in keys},
                    round(sum(student["seconds"] for student in students), 3),
                    sum(student["tokens_seen"] for student in students),
                )
            )  # fmt: skip
        return LossComparison(
            self.recipe.name, self.teacher.task, str(self.folder.path), numbers, tuple(rows), _winners(rows), baselines,
            tuple(self.folder.skipped),
        )  # fmt: skip

    def _ask_teacher(self) -> None:
        """What the teacher says about the test split, on its own ids and on those of a trimmed vocabulary, which is the
        same for all students."""
        theirs = self.judge.asked("student")
        self.texts = {"teacher": self.judge.references(self.teacher, "teacher")}
        if theirs != "teacher" and self.cut is not None:
            self.judge.references(self.cut, "student")
            self.texts[theirs] = self.judge.references(self.teacher, theirs)
        self.tasks = self.judge.task_references() if self.data.labelled else {}

    def _student(self, loss: str, weights: Mapping[str, float], seed: int) -> dict[str, Any]:
        """Teach and measure one student, unless that is done."""
        assert self.recipe.distill is not None
        config = type(self.recipe.distill).model_validate(
            {**self.recipe.distill.model_dump(), "loss": dict(weights), "seed": seed}
        )
        place = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', loss)}/seed-{seed}"
        recipe = self.recipe.model_copy(update={"distill": config})
        run = Run(recipe, self.run.base / "recipe.toml", self.folder)

        def action() -> Mapping[str, Any]:
            result = run.teach(
                self.teacher, self.data, out=self.folder / place / "student", work=self.folder / place / "work",
                signal=self.folder / "signal", others=self.others,
            )  # fmt: skip
            metrics = self._measure(self.folder / place / "student")
            facts = {"metrics": metrics, "seconds": result.seconds, "tokens_seen": result.tokens_seen}
            atomic_write(self.folder / place / "measured.json", json.dumps(facts, indent=1) + "\n")
            return {"note": _note(metrics)}

        inputs = {
            "version": VERSION, "threads": run.threads, "student": run.student_inputs(self.teacher, self.data),
            "others": [other.model_id for other in self.others],
            **self._question(),
        }  # fmt: skip
        title = f"{loss}, seed {seed}"
        self.folder.stage(title, inputs, action, [f"{place}/student", f"{place}/measured.json"], title)
        measured: dict[str, Any] = read_json(self.folder / place / "measured.json")
        return measured

    def _question(self) -> dict[str, Any]:
        return {"question": self.judge.question(), "tasks": [task.sha256 for task in self.data.labelled]}

    def _baseline(self, name: str, model: ModelFolder) -> dict[str, float]:
        """Figures of the teacher or of the cut, as one stage."""

        def action() -> Mapping[str, Any]:
            metrics = self._measure(model.path, own=name == "teacher")
            atomic_write(self.folder / f"{name}.json", json.dumps(metrics, indent=1) + "\n")
            return {"note": _note(metrics)}

        inputs = {"version": VERSION, "model": model.model_id, **self._question()}
        self.folder.stage(name, inputs, action, [f"{name}.json"], f"measure the {name}")
        metrics: dict[str, float] = read_json(self.folder / f"{name}.json")
        return metrics

    def _measure(self, model: Path, *, own: bool = False) -> dict[str, float]:
        """``METRIC@DATA`` of a model folder on the test split; ``own``: it is the teacher itself."""
        from .bench.fidelity import fidelity, own_estimates
        from .bench.reference import read_facts
        from .bench.tasks import task_estimates
        from .runtimes.scoring import open_reference, score
        from .runtimes.session import SessionOptions
        from .runtimes.torch_session import TorchSession

        bench = self.recipe.bench
        session = TorchSession(model, SessionOptions(bench.threads))
        asked = "teacher" if own else self.judge.asked("student")
        found: dict[str, float] = {}
        for text, reference in self.texts[asked].items():
            self.run.progress(f"measured on {text}", None)
            if own and self.teacher.task != "text-generation":
                continue
            scores = score(session, reference)
            documents = read_facts(reference)["documents"]
            if self.teacher.task == "feature-extraction":
                scores["reference_embeddings"] = open_reference(reference).said
            estimates = (
                own_estimates(scores, documents=documents, seed=bench.seed) if own
                else fidelity(self.teacher.task, scores, documents=documents, seed=bench.seed)
            )  # fmt: skip
            found |= {f"{e.metric}@{text}": e.summary.value for e in estimates if e.metric in SHOWN}
        for task, reference in self.tasks.get(asked, {}).items():
            scores = score(session, reference)
            outputs = scores["embeddings" if "embeddings" in scores else "logits"]
            estimates = task_estimates(outputs, reference, seed=bench.seed)
            found |= {f"{e.metric}@{task}": e.summary.value for e in estimates if e.metric in SHOWN}
        session.close()
        return found


def _winners(rows: Sequence[LossRow]) -> tuple[MetricWinner, ...]:
    found = []
    for key in rows[0].metrics:
        metric, _, data = key.partition("@")
        spreads = {row.loss: row.metrics[key] for row in rows if key in row.metrics}
        winner = find_winner(spreads, METRICS[metric].better)
        found.append(MetricWinner(metric, data, winner.name, winner.reason))
    return tuple(found)


def _note(metrics: Mapping[str, float]) -> str:
    shown = [f"{key.partition('@')[0]} {value:.4g}" for key, value in metrics.items()]
    return ", ".join(shown[:2])
