"""On-policy distillation: in some optimiser steps the student writes, and learns from what the teacher says of it.

A seeded coin decides for each step (GKD, arXiv 2306.13649): with probability ``ratio`` the step's texts are cut to
prompts and continued by the student as it is now, otherwise they stay as they are. What the student wrote may be kept
in a bounded buffer and learnt from again (DistiLLM, arXiv 2402.03898): writing is most of such a step's cost.

Every choice depends on the seed, the step and the example only, so a killed run needs nothing but the buffer, the
current ratio and two counts to go on with the same texts. Several processes (:mod:`.ranks`) toss the same coin, and
each writes its own share of the texts: without a buffer they learn from what one process would have written. Each keeps
its own texts in its part of the buffer, so which old texts come back depends on how many processes there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..checkpoints import ModelFolder
from ..errors import RecipeError, Unsupported
from ..loss_names import LOSS_NAMES, parse_loss
from ..recipe import DistillConfig
from ..recipe_teaching import OnPolicyConfig, Writing
from . import ranks
from .batches import LEARN_OWN, Batch, collate
from .sampling import Writer
from .student import StudentPlan

__all__ = ["Rollouts", "check_on_policy", "check_window", "prompt_length"]

Words = Literal["text", "student", "replay"]
# What a random number is for, so that no two uses share one.
_COIN, _WRITING, _REPLAY = 1, 2, 3


def prompt_length(tokens: int, most: int) -> int:
    """How much of an example of ``tokens`` is its prompt: at most ``most``, at most half of it, at least one token.

    >>> prompt_length(100, 16), prompt_length(20, 16), prompt_length(2, 16)
    (16, 10, 1)
    """
    return max(1, min(most, tokens // 2))


def check_window(settings: Writing, section: str, window: int) -> None:
    """:class:`RecipeError` when a prompt and what follows it may be longer than ``window`` tokens."""
    asked = settings.prompt_tokens + settings.new_tokens
    if asked > window:
        raise RecipeError(
            f"[distill.{section}] prompt_tokens + new_tokens = {asked}, but a text may have {window} tokens",
            hint="lower one of them, or raise [data] max_length up to what the model can take",
        )


def check_on_policy(
    config: DistillConfig,
    folder: ModelFolder,
    plan: StudentPlan | None,
    *,
    window: int,
    held_out: int,
    cached: bool = False,
) -> None:
    """Refuse what ``[distill.on_policy]`` can't do, before anything is loaded.

    ``plan``: what is left of the teacher ``folder``, ``None`` for a student that does not come from it;
    ``window``: tokens of the longest text; ``held_out``: how many dev examples there are; ``cached``: whether the
    teacher's answers are read from disk. Raises :class:`RecipeError` and :class:`Unsupported`.
    """
    settings = config.on_policy
    if settings is None:
        return
    if folder.task != "text-generation":
        raise Unsupported(
            f"[distill.on_policy] for {folder.task}: the student has to write texts, an encoder can't",
            hint="remove the section",
        )
    if cached:
        raise Unsupported(
            "[distill.on_policy] with a cached teacher: nobody knows before what the student will write",
            hint="ask the teacher live, or use [distill.sequence], whose texts can be cached",
        )
    check_window(settings, "on_policy", window)
    if not any(weight and LOSS_NAMES[parse_loss(name).name].reads != "labels" for name, weight in config.loss.items()):
        raise RecipeError(
            "[distill.on_policy] needs a loss that asks the teacher: cross-entropy would only repeat the student",
            hint="add reverse_kl, jsd or another divergence to [distill] loss",
        )
    group = config.batch_size * config.gradient_accumulation
    if 0 < settings.replay < group:
        raise RecipeError(
            f"[distill.on_policy] replay = {settings.replay} can't hold the {group} texts of one optimiser step",
            hint="keep several steps' texts, e.g. 1000",
        )
    if settings.adapt_every is not None and not held_out:
        raise RecipeError(
            "[distill.on_policy] adapt_every measures the KL on held-out text, and there is none",
            hint="set `dev` in a [[data.text]], or leave adapt_every out",
        )
    if not config.teacher and plan == StudentPlan.of_layers(folder):
        raise RecipeError(
            "[distill.on_policy]: the student is the teacher, so there is nothing to learn from its texts",
            hint="keep fewer layers in [student]",
        )


class Rollouts:
    """Decides for each optimiser step whose words it learns from, and brings them.

    ``vocab_size``, ``stop`` and ``pad_id`` as :class:`~edgestill.distill.sampling.Writer` takes them; ``steps`` is the
    length of the run, ``measure`` gives the student's held-out KL (for ``adapt_every``) and ``held_out_kl`` what it was
    in the beginning.
    """

    def __init__(
        self,
        settings: OnPolicyConfig,
        *,
        steps: int,
        seed: int,
        vocab_size: int,
        stop: Collection[int],
        pad_id: int,
        measure: Callable[[nn.Module], float] | None = None,
        held_out_kl: float | None = None,
    ) -> None:
        self.ratio = settings.ratio
        self.prompt_tokens_read = 0
        self.tokens_written = 0
        self.words: Words = "text"
        self._settings = settings
        self._steps = steps
        self._seed = seed
        self._vocab_size = vocab_size
        self._stop = frozenset(stop)
        self._pad_id = pad_id
        self._measure = measure
        self._last_kl = held_out_kl
        self._kept: deque[dict[str, Any]] = deque(maxlen=settings.replay // ranks.world())

    def take(self, student: nn.Module, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The batches that optimiser step ``step`` (from 1) learns from: ``batches`` themselves, or the student's."""
        self._adapt(student, step)
        rows = sum(len(batch["index"]) for batch in batches)
        self.words = self._whose(step, rows)
        if self.words == "text":
            return list(batches)
        if self.words == "student":
            return [self._written(student, batch, step) for batch in batches]
        chosen = iter(self._chooser(step, _REPLAY).choice(len(self._kept), size=rows, replace=False).tolist())
        return [self._pack([self._kept[next(chosen)] for _ in batch["index"]], batch) for batch in batches]

    def _chooser(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers])

    def _whose(self, step: int, rows: int) -> Words:
        coin, second = self._chooser(step, _COIN).random(2)
        if coin >= self.ratio:
            return "text"
        again = self._settings.replay_ratio
        share = (step - 1) / self._steps if again == "linear" else again
        return "replay" if second < share and len(self._kept) >= rows else "student"

    def _adapt(self, student: nn.Module, step: int) -> None:
        """DistiLLM's schedule: more of the student's own words once it gets worse on held-out text."""
        every = self._settings.adapt_every
        if every is None or self._measure is None or step == 1 or (step - 1) % every:
            return
        found = self._measure(student)
        if self._last_kl is not None and found > self._last_kl:
            self.ratio = min(1.0, self.ratio + self._settings.adapt_step)
        self._last_kl = found

    def _written(self, student: nn.Module, batch: Batch, step: int) -> Batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        most = self._settings.prompt_tokens
        prompts = [
            ids[: prompt_length(length, most)].tolist() for ids, length in zip(batch["input_ids"], lengths, strict=True)
        ]
        numbers = batch["index"].tolist()
        writer = Writer([student], self._settings, vocab_size=self._vocab_size, stop=self._stop, pad_id=self._pad_id)
        found = writer.write(prompts, [(self._seed, step, _WRITING, number) for number in numbers])
        rows = [
            {"index": number, "prompt": len(prompt), "ids": [*prompt, *item.ids]}
            for number, prompt, item in zip(numbers, prompts, found, strict=True)
        ]
        self._kept.extend(rows)
        self.prompt_tokens_read += sum(map(len, prompts))
        self.tokens_written += sum(len(item.ids) for item in found)
        return self._pack(rows, batch)

    def _pack(self, rows: Sequence[Mapping[str, Any]], like: Batch) -> Batch:
        """Prompt and continuation padded on the right, as every batch is; the continuation alone is learnt."""
        packed = collate([{**row, "label": -100} for row in rows], self._pad_id)
        packed["learn"] = torch.where(packed["learn"] > 0, LEARN_OWN, 0)
        device = like["input_ids"].device
        return {name: value.to(device) for name, value in packed.items()}

    def state(self) -> list[dict[str, Any]]:
        """All that a checkpoint needs of each process, as plain values; every process has to ask."""
        return ranks.everyones(self._own_state())

    def _own_state(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "last_kl": self._last_kl,
            "prompt_tokens_read": self.prompt_tokens_read,
            "tokens_written": self.tokens_written,
            "kept": [[row["index"], row["prompt"], row["ids"]] for row in self._kept],
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what :meth:`state` gave. As many processes as then find their own texts again, others share all
        of them evenly."""
        own, world = ranks.rank(), ranks.world()
        if len(states) == world:
            kept = states[own]["kept"]
            counted = [states[own]]
        else:
            everything = [row for state in states for row in state["kept"]]
            kept = everything[own : len(everything) // world * world : world]
            counted = list(states) if own == 0 else []
        self.ratio, self._last_kl = states[0]["ratio"], states[0]["last_kl"]
        self.prompt_tokens_read = sum(state["prompt_tokens_read"] for state in counted)
        self.tokens_written = sum(state["tokens_written"] for state in counted)
        self._kept.clear()
        self._kept.extend({"index": index, "prompt": prompt, "ids": ids} for index, prompt, ids in kept)
