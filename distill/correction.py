"""Teacher correction: the teacher learns the transfer text before it teaches (Minitron, arXiv 2408.11796).

A teacher that has never seen text of this kind is a poor guide on it. The corrected copy teaches, and the student is
cut from it; held-out metrics stay those against the original teacher.
"""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints import ModelFolder
from ..errors import RecipeError
from ..recipe import DistillConfig

__all__ = ["check_something_to_learn", "correction_config"]

# What the correction takes over from [distill], beside its own length and rate.
_SHARED = (
    "batch_size", "gradient_accumulation", "weight_decay", "warmup_ratio", "schedule", "max_grad_norm", "save_every",
    "seed", "threads", "precision", "gradient_checkpointing", "streaming",
)  # fmt: skip


def correction_config(folder: ModelFolder, config: DistillConfig) -> DistillConfig:
    """The training that corrects the teacher ``folder``: plain cross-entropy on the same text.

    Raises :class:`RecipeError` for a sentence encoder, whose text has no right answer to learn.
    """
    settings = config.correct_teacher
    assert settings is not None
    if folder.task == "feature-extraction":
        raise RecipeError(
            "[distill] correct_teacher: a text has no right embedding, so there is nothing to correct the teacher by",
            hint="leave correct_teacher out, or start from a sentence encoder that was trained on such text",
        )
    shared = {name: getattr(config, name) for name in _SHARED}
    return DistillConfig(
        loss={"cross_entropy": 1.0}, max_steps=settings.steps, epochs=settings.epochs or 1.0,
        learning_rate=settings.learning_rate, **shared,
    )  # fmt: skip


def check_something_to_learn(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that is its teacher, number for number: its loss is 0 and stays so."""
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    same = theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if same:
        raise RecipeError(
            "the student is the whole teacher: it has nothing to learn from it",
            hint="make it smaller, e.g. [student] layers = 3, or leave [distill] out to ship the model as it is",
        )
