"""From ``[student]`` to a plan: sizes first (to a target, if there is one), then what is the least missed.

Width goes before depth: of two plans of one size, the one with all layers and narrower FFNs loses less accuracy
(Minitron, arXiv 2407.14679), so a target is met by neurons down to half of them, and only then by layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..checkpoints import ModelFolder, load_tokenizer
from ..errors import RecipeError
from ..files import atomic_write, hash_json, read_json
from ..recipe import StudentConfig
from ..recipe_student import BYTES_PER_WEIGHT, TargetConfig
from .anatomy import Widths, count_parameters, teacher_widths
from .batches import Batch, encode
from .depth import choose_layers, spread
from .heads import HeadCounts, choose_heads, resolve_heads
from .importance import MOST_TOKENS, Importance, best, calibration_batches, measure_importance
from .student import StudentPlan

if TYPE_CHECKING:
    from ..data import DataSets

__all__ = [
    "Calibration",
    "PlanCost",
    "fill_plan",
    "find_plan",
    "meet_target",
    "plan_student",
    "shape_plan",
    "width_step",
]

VERSION = 1
PLAN_FILE = "plan.json"
LEAST_SHARE = 0.5
"""A target takes this share of the FFN neurons before it takes a layer."""

PlanCost = Callable[[StudentPlan], float]
"""What a plan costs, in the unit of the target (milliseconds); the plan's choice of parts is of no importance to it."""


@dataclass(frozen=True)
class Calibration:
    """The text that importance is measured on: ``texts``, each cut to ``max_length`` tokens."""

    texts: tuple[str, ...]
    max_length: int

    @classmethod
    def of(cls, data: DataSets, max_length: int) -> Calibration:
        """The calibration split, or the training text where that is empty."""
        return cls(tuple(data.split("calibration") or data.split("train")), max_length)

    def batches(self, folder: ModelFolder, most_tokens: int = MOST_TOKENS) -> list[Batch]:
        """Tokenised for the model in ``folder``."""
        tokenizer = load_tokenizer(folder.path)
        length = min(self.max_length, folder.max_length)
        examples = encode(self.texts, tokenizer, folder.task, length, prefix=folder.prompt_prefix)
        return calibration_batches(examples, int(tokenizer.pad_token_id or 0), most_tokens)


def plan_student(
    folder: ModelFolder,
    config: StudentConfig,
    text: Calibration | None = None,
    cost: PlanCost | None = None,
    vocabulary: Sequence[int] = (),
) -> StudentPlan:
    """The plan of a recipe's ``[student]`` for the model in ``folder``. Measures importance only where it decides.

    ``vocabulary``: the token ids that stay (empty: all).

    Raises :class:`~edgestill.errors.RecipeError` for what can't be (layers, widths, groups, a target out of reach) and
    :class:`~edgestill.errors.BadInput` where text is needed and missing.
    """
    shape = find_shape(folder, config, cost, vocabulary)
    return fill_plan(folder, shape, config.choose, text, fixed=config.keep is not None)


def find_plan(
    folder: ModelFolder,
    config: StudentConfig,
    text: Calibration,
    cost: PlanCost | None,
    work: Path,
    vocabulary: Sequence[int] = (),
) -> StudentPlan:
    """:func:`plan_student`, kept in ``work`` when it was measured: a killed run goes on with the same plan."""
    if not config.needs_text:
        return plan_student(folder, config, vocabulary=vocabulary)
    return keep_plan(
        folder, config, text, work, lambda: plan_student(folder, config, text, cost, vocabulary), ids=list(vocabulary)
    )


def keep_plan(
    folder: ModelFolder, config: StudentConfig, text: Calibration, work: Path, make: Callable[[], StudentPlan],
    **more: Any,
) -> StudentPlan:  # fmt: skip
    """The plan in ``work``, if it was made from the same things, else a new one, which is then kept there."""
    key = hash_json(
        {
            "version": VERSION,
            "model": folder.model_id,
            "student": config.model_dump(mode="json"),
            "text": [text.texts, text.max_length],
            "libraries": [torch.__version__, transformers.__version__],
            **more,
        }
    )
    path = work / PLAN_FILE
    if path.exists():
        record = read_json(path)
        if isinstance(record, dict) and record.get("key") == key:
            return plan_from_json(record["plan"])
    plan = make()
    atomic_write(path, json.dumps({"key": key, "plan": dataclasses.asdict(plan)}) + "\n")
    return plan


def plan_from_json(raw: dict[str, Any]) -> StudentPlan:
    """The inverse of ``dataclasses.asdict`` after a turn through JSON."""
    nested = {name: tuple(tuple(row) for row in raw[name]) for name in ("neurons", "queries", "groups")}
    return StudentPlan(**{**raw, "keep": tuple(raw["keep"]), "vocabulary": tuple(raw["vocabulary"]), **nested})


def find_shape(
    folder: ModelFolder, config: StudentConfig, cost: PlanCost | None = None, vocabulary: Sequence[int] = ()
) -> StudentPlan:
    """The sizes that ``config`` asks for, as a plan whose parts are not chosen yet (:func:`shape_plan`)."""
    widths = teacher_widths(folder)
    counts = resolve_heads(folder, config.heads, config.kv_heads)
    ffn = widths.ffn if config.ffn is None else resolve_ffn(config.ffn, widths.ffn)
    shape = shape_plan(folder, choose_layers(config, folder.layers), ffn, counts, vocabulary)
    return shape if config.target is None else meet_target(folder, config, shape, cost)


def resolve_ffn(wanted: float, teacher: int) -> int:
    """Neurons for a recipe's ``ffn``: a count, or a share (1 or less) rounded to :func:`width_step`.

    >>> resolve_ffn(700, 1536), resolve_ffn(0.5, 1536), resolve_ffn(0.4, 48), resolve_ffn(1, 48)
    (700, 768, 19, 48)
    """
    if wanted > teacher:
        raise RecipeError(f"[student] ffn = {wanted:g}, but the teacher has {teacher} neurons", hint="keep fewer")
    if wanted > 1:
        return int(wanted)
    step = width_step(teacher)
    return min(teacher, max(step, step * round(wanted * teacher / step)))


def width_step(teacher: int) -> int:
    """The grid of FFN widths: blocks of 32 weights, which int4 and int8 formats quantise together, in wide FFNs."""
    return 32 if teacher >= 256 and teacher % 32 == 0 else 1


def shape_plan(
    folder: ModelFolder, keep: Sequence[int], ffn: int, counts: HeadCounts, vocabulary: Sequence[int] = ()
) -> StudentPlan:
    """A plan of these sizes that takes the first neurons and heads: right in size, to be filled by importance."""
    teacher = teacher_widths(folder)
    widths = Widths(ffn, counts.heads, counts.kv_heads, len(vocabulary) or teacher.vocab_size)
    each, kept = teacher.heads // teacher.kv_heads, counts.heads // counts.kv_heads
    queries = tuple(group * each + at for group in range(counts.kv_heads) for at in range(kept))
    fewer = (counts.heads, counts.kv_heads) != (teacher.heads, teacher.kv_heads)
    return StudentPlan(
        keep=tuple(keep),
        ffn=ffn,
        heads=counts.heads,
        kv_heads=counts.kv_heads,
        vocab_size=widths.vocab_size,
        vocabulary=tuple(vocabulary),
        parameters=sum(count_parameters(folder, tuple(keep), widths).values()),
        neurons=(tuple(range(ffn)),) * len(keep) if ffn < teacher.ffn else (),
        queries=(queries,) * len(keep) if fewer else (),
        groups=(tuple(range(counts.kv_heads)),) * len(keep) if fewer else (),
    )


def fill_plan(
    folder: ModelFolder,
    shape: StudentPlan,
    choose: str,
    text: Calibration | None,
    *,
    fixed: bool = False,
    scores: Importance | None = None,
) -> StudentPlan:
    """``shape`` with the parts that matter most: its layers (unless ``fixed`` or even), neurons and heads."""
    by_score = choose != "even" and not fixed and len(shape.keep) < folder.layers
    if not (by_score or shape.neurons or shape.queries):
        return shape
    if scores is None:
        batches = (text or Calibration((), 1)).batches(folder)
        scores = measure_importance(folder, batches, taylor=choose == "taylor")
    keep = best(scores.layers, len(shape.keep)) if by_score else shape.keep
    teacher = teacher_widths(folder)
    changes: dict[str, Any] = {"keep": keep}
    if shape.neurons:
        changes["neurons"] = tuple(best(scores.neurons[layer], shape.ffn) for layer in keep)
    if shape.queries:
        counts = HeadCounts(shape.heads, shape.kv_heads)
        chosen = [choose_heads(scores.queries[layer], teacher.kv_heads, counts) for layer in keep]
        changes["queries"] = tuple(queries for queries, _ in chosen)
        changes["groups"] = tuple(groups for _, groups in chosen)
    return dataclasses.replace(shape, **changes)


def meet_target(folder: ModelFolder, config: StudentConfig, shape: StudentPlan, cost: PlanCost | None) -> StudentPlan:
    """The largest plan within the target: most layers first, then most neurons; what ``config`` fixes stays.

    Costs grow with layers and with neurons, so both are found by bisection: about a dozen calls of ``cost``.
    """
    target = config.target
    assert target is not None
    limit, price, unit = _price(folder, target, cost)
    step = width_step(shape.ffn)
    free_depth = config.layers is None and config.keep is None
    least = -(-int(shape.ffn * LEAST_SHARE) // step) * step if free_depth else step
    widths = [shape.ffn] if config.ffn is not None else [*range(max(step, least), shape.ffn, step), shape.ffn]
    depths = list(range(1, folder.layers + 1)) if free_depth else [len(shape.keep)]
    counts = HeadCounts(shape.heads, shape.kv_heads)

    def plan(depth: int, ffn: int) -> StudentPlan:
        keep = spread(depth, folder.layers) if free_depth else shape.keep
        return shape_plan(folder, keep, ffn, counts, shape.vocabulary)

    depth = _largest(depths, lambda value: price(plan(value, widths[0])) <= limit)
    if depth is None:
        smallest = plan(depths[0], widths[0])
        fixed = smallest.groups_of(folder)["embedding"]
        raise RecipeError(
            f"[student.target] {unit.format(limit)} is out of reach: {depths[0]} layers with FFNs of {widths[0]} come "
            f"to {unit.format(price(smallest))}",
            hint=f"the token tables alone hold {fixed} parameters; allow more, or set `layers` and `ffn` yourself",
        )
    ffn = _largest(widths, lambda value: price(plan(depth, value)) <= limit)
    return plan(depth, ffn or widths[0])


def _price(folder: ModelFolder, target: TargetConfig, cost: PlanCost | None) -> tuple[float, PlanCost, str]:
    """The limit, what to hold against it, and how to write both."""
    if target.latency_ms is not None:
        if cost is None:
            raise RecipeError(
                "[student.target] latency_ms needs a machine to measure on", hint="use `edgestill run` or `distill`"
            )
        return target.latency_ms, cost, "{:.2f} ms"
    if target.bytes is not None:
        each = BYTES_PER_WEIGHT[target.precision]
        return target.bytes, lambda plan: plan.parameters * each, f"{{:.0f}} bytes at {target.precision}"
    most = target.parameters or int((target.fraction or 1.0) * folder.parameters)
    return most, lambda plan: float(plan.parameters), "{:.0f} parameters"


def _largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending ``values`` that fits, where a smaller one always fits, too; ``None`` if none does.

    >>> _largest([1, 2, 3, 5], lambda value: value < 4), _largest([1], lambda value: False)
    (3, None)
    """
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None
