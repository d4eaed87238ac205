"""``edgestill distill RECIPE --plan``: the student that a recipe would make and what making it costs; trains nothing.

Also what needs both sides of the house: the latency of a planned student, measured here, which ``[student.target]
latency_ms`` plans to.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import TOKEN_TASKS
from .bench.environment import usable_threads
from .errors import BadInput, MissingDependency, Unsupported
from .fetch import find_cached
from .loss_names import LOSS_NAMES, parse_loss
from .recipe import Recipe, find_recipe, load_recipe
from .recipe_student import BYTES_PER_WEIGHT
from .stages import Observer

if TYPE_CHECKING:
    from .checkpoints import ModelFolder
    from .data import DataSets
    from .distill.planning import PlanCost
    from .distill.start import Start
    from .distill.student import StudentPlan
    from .distill.vocabulary_tokenizer import FittedVocabulary

__all__ = [
    "DistillPlan",
    "PlannedLayer",
    "PlannedModel",
    "TokenCost",
    "check_comparable",
    "latency_cost",
    "make_start",
    "plan_distillation",
]

_REPEATS = 5


@dataclass(frozen=True)
class PlannedModel:
    """One side. ``parameters_by_group``: ``embedding`` (tables of tokens and positions, an untied output layer),
    ``attention``, ``ffn``, ``other``. ``bytes``: of all weights at each precision. ``flops_per_token``: two for each
    weight that a token meets in a forward pass, attention scores left out."""

    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab_size: int
    parameters: int
    parameters_by_group: Mapping[str, int]
    bytes: Mapping[str, float]
    flops_per_token: int


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of what is cut, with its score (``null`` where there is no text to measure on)."""

    index: int
    kept: bool
    importance: float | None


@dataclass(frozen=True)
class TokenCost:
    """What training would take: real tokens that go through the student (forward and backward) and the teacher
    (forward; vectors of an encoder are asked for once), by the texts themselves; continuations that a model would write
    are not foreseen. ``flops``: three forward passes for the student, one for the teacher."""

    optimiser_steps: int
    student_tokens: int
    teacher_tokens: int
    flops: float


@dataclass(frozen=True)
class DistillPlan:
    """``teacher``: what teaches; ``start``: what is cut, if it is another model; ``student``: what comes out."""

    recipe: str
    teacher: PlannedModel
    start: PlannedModel | None
    student: PlannedModel
    layers: tuple[PlannedLayer, ...]
    layer_measure: str | None
    measured_tokens: int
    rounds: int
    plan_digest: str
    cost: TokenCost | None
    schema_version: int = 1


def plan_distillation(name: str | Path, observer: Observer) -> DistillPlan:
    """The plan of a recipe's student. Reads what is fetched already and measures importance; writes nothing that stays.

    Raises :class:`BadInput` for what is not fetched yet, and what planning and importance raise.
    """
    path = find_recipe(name)
    recipe = load_recipe(path)
    base = path.resolve().parent
    sources = (recipe.teacher, *recipe.student.sources, *recipe.data.text, *recipe.data.task)
    missing = [source.source for source in sources if find_cached(source.source, base=base) is None]
    if missing:
        raise BadInput(f"{missing[0]} is not fetched yet", hint=f"edgestill fetch {name}")
    try:
        with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
            return _plan(recipe, base, Path(scratch), observer)
    except ModuleNotFoundError as error:
        raise MissingDependency.package(error.name or "torch", "distill") from None


def _plan(recipe: Recipe, base: Path, scratch: Path, observer: Observer) -> DistillPlan:
    from .checkpoints import prepare_model
    from .data import load_data
    from .distill.importance import measure_importance
    from .distill.planning import Calibration, fill_plan, find_shape
    from .distill.start import Start, check_start
    from .distill.student import StudentPlan
    from .distill.vocabulary_tokenizer import fit_vocabulary
    from .torch_models import quiet

    observer.started("plan", "prepare the teacher")
    found = find_cached(recipe.teacher.source, base=base)
    assert found is not None  # looked for above
    teacher = prepare_model(
        found, scratch / "teacher", task=recipe.task, license=recipe.teacher.license, progress=observer.advanced
    )
    start = Start.of(teacher, make_start(recipe, teacher, base, scratch / "start", observer))
    check_start(teacher, start.folder, recipe.distill)
    streaming = recipe.distill is not None and recipe.distill.streaming
    data = load_data(recipe.data, base=base, progress=observer.advanced, stream=streaming)
    text = Calibration.of(data, recipe.data.max_length)
    cost = latency_cost(start.folder, recipe.bench.threads, recipe.bench.length)
    config, scores = recipe.student, None
    vocabulary = fit_vocabulary(teacher, config.vocabulary, data)
    with quiet():
        shape = find_shape(start.folder, config, cost, vocabulary.keep)
        if text.texts:
            observer.started("importance", "measure importance")
            scores = measure_importance(
                start.folder, text.batches(start.folder), taylor=config.choose == "taylor", progress=observer.advanced
            )
        plan = fill_plan(start.folder, shape, config.choose, text, fixed=config.keep is not None, scores=scores)
    observer.finished("plan", 0.0, "")
    return DistillPlan(
        recipe=recipe.name,
        teacher=_model(teacher, StudentPlan.of_layers(teacher)),
        start=None if start.of_teacher else _model(start.folder, StudentPlan.of_layers(start.folder)),
        student=_model(start.folder, plan),
        layers=tuple(
            PlannedLayer(index, index in plan.keep, None if scores is None else float(scores.layers[index]))
            for index in range(start.folder.layers)
        ),
        layer_measure=scores.layer_measure if scores else None,
        measured_tokens=scores.tokens if scores else 0,
        rounds=config.steps,
        plan_digest=plan.digest(),
        cost=_token_cost(recipe, teacher, start, plan, data, vocabulary),
    )


def _model(folder: ModelFolder, plan: StudentPlan) -> PlannedModel:
    groups = plan.groups_of(folder)
    return PlannedModel(
        layers=len(plan.keep), ffn=plan.ffn, heads=plan.heads, kv_heads=plan.kv_heads, vocab_size=plan.vocab_size,
        parameters=plan.parameters, parameters_by_group={str(name): count for name, count in groups.items()},
        bytes={name: plan.parameters * each for name, each in BYTES_PER_WEIGHT.items()},
        flops_per_token=_flops(folder, plan),
    )  # fmt: skip


def _flops(folder: ModelFolder, plan: StudentPlan) -> int:
    """Tables of an encoder are only looked up; a decoder's token table is also its output layer, or as big as it."""
    groups = plan.groups_of(folder)
    output = plan.vocab_size * folder.hidden_size if folder.task == "text-generation" else 0
    return 2 * (groups["attention"] + groups["ffn"] + groups["other"] + output)


def _token_cost(
    recipe: Recipe, teacher: ModelFolder, start: Start, plan: StudentPlan, data: DataSets, vocabulary: FittedVocabulary
) -> TokenCost | None:
    from .distill.batches import plan_batches
    from .distill.job import prepare
    from .distill.rounds import split_steps

    config = recipe.distill
    if config is None or config.teacher:  # further teachers would have to be prepared
        return None
    job = prepare(teacher, start, plan, config, data, recipe.data.max_length, vocabulary)
    lengths, student = job.train.lengths, 0
    if job.texts:  # streamed windows are full
        student = job.steps * config.batch_size * config.gradient_accumulation * job.length
    for number, steps in enumerate(() if job.texts else split_steps(job.steps, recipe.student.steps)):
        order = plan_batches(lengths, config.batch_size, config.gradient_accumulation, steps, config.seed + number)
        student += int(sum(lengths[rows].sum() for rows in order))
    asks = any(LOSS_NAMES[parse_loss(name).name].reads != "labels" for name in job.losses)
    live = teacher.task in TOKEN_TASKS or bool(config.loss.get("hidden_states"))
    asked = (student if live else int(lengths.sum())) if asks else 0
    flops = 3.0 * student * _flops(start.folder, plan) + float(asked) * _flops(teacher, type(plan).of_layers(teacher))
    return TokenCost(job.steps, student, asked, flops)


def make_start(recipe: Recipe, teacher: ModelFolder, base: Path, out: Path, observer: Observer) -> Path | None:
    """What ``[student]`` starts from, as the model folder ``out``; ``None`` when that is the teacher."""
    student = recipe.student
    if student.config is not None:
        from .distill.fresh import fresh_student

        return fresh_student(base / student.config, teacher, out, seed=student.seed).path
    if student.source is not None:
        from .checkpoints import prepare_model
        from .fetch import fetch

        found = fetch(student.source, sha256=student.sha256, base=base, progress=observer.advanced)
        return prepare_model(found.path, out, task=teacher.task, progress=observer.advanced).path
    return None


def check_comparable(start: ModelFolder, teacher: ModelFolder, run: Path) -> None:
    """Refuse, before any training, to judge a student against a teacher that counts with other tokens.

    Such a student can be distilled (:mod:`edgestill.distill.foreign`), but its artifacts have no token in common with
    the teacher to be compared by. Raises :class:`Unsupported`.
    """
    from .checkpoints import load_tokenizer

    if load_tokenizer(start.path).get_vocab() != load_tokenizer(teacher.path).get_vocab():
        raise Unsupported(
            "[student] source has another vocabulary than the teacher: artifacts of it can't be judged against that",
            hint=f"edgestill distill RECIPE, then edgestill export {run / 'student'} --to onnx:int8",
        )


def latency_cost(folder: ModelFolder, threads: int | None, length: int) -> PlanCost:
    """A cost function: milliseconds of one torch forward pass of a planned student over ``length`` tokens.

    The student is built from the model in ``folder`` and run on ``threads`` CPU threads; the median of five passes
    after one to warm up. A decoder's output layer is run for the last token only, as when a prompt is read.
    """

    def cost(plan: StudentPlan) -> float:
        import torch

        from .distill.anatomy import base_model
        from .distill.student import make_student

        model: Any = make_student(folder, plan)
        ids = torch.arange(min(length, folder.max_length))[None] % plan.vocab_size
        mask = torch.ones_like(ids)
        before = torch.get_num_threads()
        torch.set_num_threads(threads or usable_threads())
        taken = []
        try:
            with torch.inference_mode():
                for _ in range(_REPEATS + 1):
                    began = time.perf_counter()
                    if folder.task == "text-generation":
                        states = base_model(model)(input_ids=ids, attention_mask=mask).last_hidden_state
                        model.get_output_embeddings()(states[:, -1:])
                    else:
                        model(input_ids=ids, attention_mask=mask)
                    taken.append(1000 * (time.perf_counter() - began))
        finally:
            torch.set_num_threads(before)
        return statistics.median(taken[1:])

    return cost
