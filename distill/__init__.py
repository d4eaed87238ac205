"""Distillation: a compact student learns from a big teacher.

One function, :func:`distill`: a teacher folder and text in, a student folder out. It may be killed at any moment and
called again; it then goes on and ends with the same weights, bit for bit (on one machine and thread count).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingDependency
from ..progress import Progress, silent
from ..recipe import DistillConfig, StudentConfig
from .result import DistillResult

if TYPE_CHECKING:
    from ..data import DataSets
    from .planning import PlanCost
    from .quantized import Ship

__all__ = ["DistillResult", "distill"]


def distill(
    teacher: Path,
    out: Path,
    *,
    student: StudentConfig,
    config: DistillConfig | None,
    data: DataSets,
    max_length: int,
    work: Path,
    signal: Path | None = None,
    start: Path | None = None,
    cost: PlanCost | None = None,
    progress: Progress = silent,
    others: Sequence[Path] = (),
    ship: Ship | None = None,
) -> DistillResult:
    """Cut a student from the model folder ``teacher``, train it on ``data`` and write the model folder ``out``.

    ``config=None``: only the cut. ``max_length`` in tokens (the model's own limit if that is lower). ``work`` holds
    checkpoints, the plan, earlier rounds and what the teacher said; it may be removed afterwards. ``signal``: another
    folder for what the teacher said, which several students of one teacher share. ``start``: a model folder to cut
    instead of the teacher; ``cost`` measures a plan for ``[student.target] latency_ms``; ``others``: the folders of the
    further teachers that ``config`` names, in its order. ``ship`` exports a model folder as an artifact folder, in the
    quantisation that ``config.quantized`` trains for. Besides the model, ``out`` gets ``distillation.json`` (what
    was done) and ``training.jsonl`` (each step's raw loss components).

    Raises :class:`~edgestill.errors.RecipeError` (a loss that doesn't fit the task, layers that aren't there),
    :class:`~edgestill.errors.BadInput` (no text, a teacher that puts out NaN), and
    :class:`~edgestill.errors.ResourceExhausted` (disk or memory); then ``out`` is as it was before.
    """
    try:
        from .run import run
    except ModuleNotFoundError as missing:
        raise MissingDependency.package(missing.name or "torch", "distill") from None
    return run(
        teacher, out, student=student, config=config, data=data, max_length=max_length, work=work, signal=signal,
        start=start, cost=cost, progress=progress, others=others, ship=ship,
    )  # fmt: skip
