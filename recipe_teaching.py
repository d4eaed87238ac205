"""The parts of ``[distill]`` that say who writes what the student learns from, and who judges it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .recipe_base import NotNegative, Positive, PositiveFloat, Share, Strict, TeacherConfig, Weight

__all__ = ["ExtraTeacherConfig", "OnPolicyConfig", "SequenceConfig", "Writing"]


class Writing(Strict):
    """How continuations of the training texts are written, whoever writes them."""

    prompt_tokens: Positive = 16
    """most tokens of a training example that serve as prompt; never more than half of the example."""
    new_tokens: Positive = 48
    """most tokens that are written after it; less where the model ends the text."""
    sampling_temperature: Weight = 1.0
    """of what is drawn (0: always the likeliest token); `temperature`, in [distill], is that of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """draw among the likeliest tokens that hold this much probability together."""
    top_k: Positive | None = None
    """draw among so many of the likeliest tokens."""


class OnPolicyConfig(Writing):
    """`[distill.on_policy]`: in some optimiser steps the student continues the beginnings of the training texts
    itself, and the teacher scores its words (GKD, arXiv 2306.13649). Prompts are not learnt from."""

    ratio: Share = 0.5
    """share of the optimiser steps that learn from the student's words, drawn by a seeded coin for each step."""
    replay: NotNegative = 0
    """how many of its texts are kept to learn from again, the oldest dropped first (DistiLLM, arXiv 2402.03898); 0:
    none."""
    replay_ratio: Share | Literal["linear"] = "linear"
    """share of the steps on the student's words that take kept ones instead of new ones: a number, or `linear`, from 0
    in the first step towards 1 in the last."""
    adapt_every: Positive | None = None
    """measure the held-out KL every so many steps, and raise `ratio` when it got worse; unset: `ratio` stays."""
    adapt_step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """by how much it is raised, up to 1."""


class SequenceConfig(Writing):
    """`[distill.sequence]`: before training, the teacher continues the beginnings of the training texts (Kim and Rush,
    arXiv 1606.07947); the student learns from its words. Prompts are not learnt from."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training examples whose continuation the teacher writes; the others stay as they are."""
    sampling_temperature: Weight = 0.0
    """of what is drawn (0: always the likeliest token); `temperature`, in [distill], is that of the loss."""
    batch_size: Positive = 16
    """texts that are written at once."""


class ExtraTeacherConfig(TeacherConfig):
    """`[[distill.teacher]]`: one more teacher, with the same tokenizer as the first (classification: the same labels).
    What stands inside (hidden states, attention) is imitated from the first teacher only; `correct_teacher` corrects
    that one alone."""

    weight: PositiveFloat = 1.0
    """its part in the mean of the teachers' probabilities."""
