"""Prune, distil, prune again: how far each round goes.

Past half of the parameters one cut loses what training can't bring back; several smaller ones, each healed, lose less
(Minitron, arXiv 2407.14679). Round r of R goes r/R of the way from the first model to the final sizes. Scores are
measured anew on what the rounds before left; layers that are named (``keep``) or spread evenly are the same ones in the
end, whatever R. A vocabulary is trimmed in the first round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import open_model
from ..errors import RecipeError
from ..progress import Progress
from ..recipe import StudentConfig
from ..torch_models import quiet
from . import ranks
from .anatomy import teacher_widths
from .heads import HeadCounts
from .limits import limited_threads, memory_errors
from .planning import Calibration, fill_plan, keep_plan, shape_plan, width_step
from .result import DistillResult
from .start import Start
from .student import StudentPlan

if TYPE_CHECKING:
    from .job import Job

__all__ = ["round_plan", "run_rounds", "split_steps", "surviving", "way"]

RunJob = Callable[["Job", Path, Path, Progress], DistillResult]


def way(begin: int, end: int, number: int, rounds: int, step: int = 1) -> int:
    """The size after round ``number``: that share of the way down from ``begin`` to ``end``, on a grid of ``step``.

    >>> [way(30, 15, number, 2) for number in (1, 2)], way(1536, 700, 1, 2, 32), way(1536, 700, 2, 2, 32)
    ([22, 15], 1120, 700)
    """
    if number == rounds:
        return end
    return begin - step * round((begin - end) * number / (rounds * step))


def split_steps(steps: int, rounds: int) -> list[int]:
    """Optimiser steps of each round; what is left over goes to the last.

    >>> split_steps(100, 3)
    [33, 33, 34]
    """
    each = steps // rounds
    return [*[each] * (rounds - 1), steps - each * (rounds - 1)]


def round_plan(
    first: Start, start: Start, final: StudentPlan, student: StudentConfig, text: Calibration, number: int, work: Path
) -> StudentPlan:
    """The plan of round ``number`` for ``start``, kept in ``work``; ``final`` is the plan of the whole way."""

    def make() -> StudentPlan:
        begin, rounds = teacher_widths(first.folder), student.steps
        groups = way(begin.kv_heads, final.kv_heads, number, rounds)
        each = way(begin.heads // begin.kv_heads, final.heads // final.kv_heads, number, rounds)
        ffn = way(begin.ffn, final.ffn, number, rounds, width_step(begin.ffn))
        named = student.choose == "even"
        if named:
            keep = surviving(start.layers, final.keep, first.folder.layers, number, rounds)
        else:
            keep = tuple(range(way(first.folder.layers, len(final.keep), number, rounds)))
        shape = shape_plan(
            start.folder, keep, ffn, HeadCounts(groups * each, groups), final.vocabulary if number == 1 else ()
        )
        return fill_plan(start.folder, shape, student.choose, text, fixed=named)

    return keep_plan(start.folder, student, text, work, make, final=final.digest(), round=number)


def run_rounds(
    job: Job, student: StudentConfig, out: Path, work: Path, text: Calibration, progress: Progress, run_job: RunJob
) -> DistillResult:
    """Several jobs, each on what the one before left; every one resumes by itself, so all of them do.

    ``job``: the whole way in one; its steps are shared. Round r works in ``work/round-r`` and leaves its student there,
    the last one in ``out``. Each round has an order of its examples of its own, and a learning rate schedule.
    """
    if job.steps < student.steps:
        raise RecipeError(
            f"[student] steps = {student.steps} rounds share {job.steps} optimiser steps",
            hint="fewer rounds, or more epochs",
        )
    if not isinstance(job.config.layer_map, str):
        raise RecipeError(
            "[distill] layer_map names layers for one student, but [student] steps makes several",
            hint="use kept, skip, last or cka",
        )
    start, done = job.start, DistillResult(out, job.plan.keep, job.teacher.layers)
    for number, steps in enumerate(split_steps(job.steps, student.steps), start=1):
        place = work / f"round-{number}"
        with quiet(), limited_threads(job.config.threads), memory_errors():
            plan = ranks.from_first(partial(round_plan, job.start, start, job.plan, student, text, number, place))
        changes: dict[str, Any] = {"max_steps": steps, "seed": job.config.seed + number - 1}
        if number < student.steps:
            changes["quantized"] = None  # what is cut further does not ship
        config = job.config.model_copy(update=changes)
        part = dataclasses.replace(job, start=start, plan=plan, config=config, steps=steps, shelf=job.shelf or work)
        target = out if number == student.steps else place / "student"
        result = run_job(part, target, place, _told(progress, f"round {number} of {student.steps}"))
        done = dataclasses.replace(
            result, steps=done.steps + result.steps, tokens_seen=done.tokens_seen + result.tokens_seen,
            seconds=round(done.seconds + result.seconds, 3), dev_before=done.dev_before or result.dev_before,
            curves=(*done.curves, *({"round": number, **row} for row in result.curves)),
            cost={name: done.cost.get(name, 0) + count for name, count in result.cost.items()},
        )  # fmt: skip
        facts = {"plan": plan.facts(), "steps": result.steps, "tokens_seen": result.tokens_seen}
        facts["dev_after"] = dict(result.dev_after)
        start = Start(open_model(target), start.origins(plan), start.of_teacher, (*start.history, facts))
    return done


def _told(progress: Progress, where: str) -> Progress:
    def tell(message: str, fraction: float | None = None) -> None:
        progress(f"{where}: {message}", fraction)

    return tell


def surviving(
    layers: Sequence[int], final: Sequence[int], total: int, number: int, rounds: int
) -> tuple[int, ...]:  # fmt: skip
    """Positions in ``layers`` that are still there after round ``number``: every R-th of those to go, goes.

    >>> surviving((0, 1, 2, 3, 4, 5), (0, 5), 6, 1, 2), surviving((0, 2, 4, 5), (0, 5), 6, 2, 2)
    ((0, 2, 4, 5), (0, 3))
    """
    going = [layer for layer in range(total) if layer not in final]
    gone = {layer for place, layer in enumerate(going) if place % rounds < number}
    return tuple(place for place, layer in enumerate(layers) if layer not in gone)
