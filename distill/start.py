"""What a student is cut from: the teacher, another model, or what an earlier round of pruning left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import ModelFolder, open_model
from ..errors import RecipeError
from ..recipe import DistillConfig
from .layer_maps import map_layers
from .student import StudentPlan

__all__ = ["Start", "check_start"]


@dataclass(frozen=True)
class Start:
    """A model folder with its past.

    ``layers``: for each of its layers, the layer of the first start that it was; ``of_teacher``: that first start is
    the teacher. ``history`` has one entry for each round before this one.
    """

    folder: ModelFolder
    layers: tuple[int, ...]
    of_teacher: bool
    history: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, teacher: ModelFolder, start: Path | None = None) -> Start:
        """The model folder ``start``, by default the teacher itself."""
        folder = teacher if start is None else open_model(start)
        return cls(folder, tuple(range(folder.layers)), start is None)

    def origins(self, plan: StudentPlan) -> tuple[int, ...]:
        """For each layer that ``plan`` keeps, the layer of the first start that it was."""
        return tuple(self.layers[index] for index in plan.keep)

    def taught(self, how: str | Sequence[int], plan: StudentPlan, teacher_layers: int) -> tuple[int, ...]:
        """Which teacher layer each layer of the student imitates (:func:`~edgestill.distill.layer_maps.map_layers`)."""
        if not self.of_teacher:
            if how == "kept":
                raise RecipeError(
                    "[distill] layer_map = 'kept', but the student's layers don't come from the teacher",
                    hint="use skip, last, cka or a list",
                )
            if len(plan.keep) > teacher_layers:
                raise RecipeError(
                    f"[distill] hidden_states maps {len(plan.keep)} student layers to {teacher_layers} of the teacher",
                    hint="leave hidden_states out, or take a student with fewer layers",
                )
        return map_layers(how, self.origins(plan), teacher_layers)


def check_start(teacher: ModelFolder, start: ModelFolder, config: DistillConfig | None) -> None:
    """Whether ``start`` can learn from ``teacher``: same task, same classes, comparable outputs."""
    if start.path == teacher.path:
        return
    if start.task != teacher.task:
        raise RecipeError(
            f"[student] source is made for {start.task}, the teacher for {teacher.task}",
            hint="set `task`, or use another",
        )
    if start.labels != teacher.labels:
        raise RecipeError(
            f"[student] source has the classes {', '.join(start.labels)}, the teacher {', '.join(teacher.labels)}",
            hint="use a model with the teacher's classes, in their order",
        )
    losses = {} if config is None else {str(name): weight for name, weight in config.loss.items()}
    if (
        start.hidden_size != teacher.hidden_size
        and start.task == "feature-extraction"
        and losses.get("embedding_cosine")
    ):
        raise RecipeError(
            f"loss embedding_cosine compares embeddings of {start.hidden_size} and {teacher.hidden_size} numbers",
            hint="use embedding_gram, which compares similarities",
        )
