"""Which losses may read a token cache, and how exactly: said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import TOKEN_TASKS, Task
from ..checkpoints import ModelFolder
from ..errors import RecipeError
from ..recipe import DistillConfig
from ..recipe_cache import CacheConfig
from .losses import Loss, select_losses
from .signal import Hidden, Labels, Sparse
from .token_records import TokenFormat

__all__ = ["CacheUse", "check_cache", "plan_cache"]

_LIVE = "leave out [distill.cache]: the teacher is then asked live"


@dataclass(frozen=True)
class CacheUse:
    """What is kept of each token, where (``None``: the working folder), and how each loss takes it."""

    form: TokenFormat
    place: Path | None
    temperature: float
    losses: Mapping[str, str]

    @property
    def line(self) -> str:
        """For people."""
        return "teacher from a cache: " + "; ".join(f"{name} {how}" for name, how in self.losses.items())

    @property
    def facts(self) -> dict[str, Any]:
        """For ``distillation.json``."""
        return {
            "source": "cache", "top_k": self.form.kept, "tail_samples": self.form.samples,
            "temperature": self.temperature, "hidden_layers": list(self.form.layers), "losses": dict(self.losses),
        }  # fmt: skip


def plan_cache(
    config: CacheConfig,
    losses: Mapping[str, Loss],
    task: Task,
    *,
    temperature: float,
    vocab_size: int,
    layers: tuple[int, ...] = (),
    width: int = 0,
) -> CacheUse:
    """Resolve ``[distill.cache]``; ``layers`` are the teacher's blocks that a loss imitates, of ``width`` numbers.

    Raises :class:`RecipeError` with the reason for a task or a loss that needs more than a cache holds.
    """
    form = TokenFormat(
        vocab_size, config.top_k, tuple(sorted({temperature, *config.temperatures})), config.tail_samples, layers, width
    )
    place = None if config.path is None else Path(config.path)
    return CacheUse(form, place, temperature, _taken(losses, task, form))


def check_cache(config: DistillConfig, folder: ModelFolder) -> None:
    """Refuse what ``[distill.cache]`` can't do with the teacher ``folder``, before anything is done."""
    if config.cache is None:
        return
    losses = select_losses(config.loss, folder.task)
    plan_cache(config.cache, losses, folder.task, temperature=config.temperature, vocab_size=folder.vocab_size)
    if config.streaming:
        raise RecipeError(
            "[distill.cache] together with streaming: an answer is kept for each token of a known text",
            hint="leave one of them out",
        )
    if config.teacher and set(config.cache.temperatures) - {config.temperature}:
        raise RecipeError(
            f"[distill.cache] temperatures of several teachers: their mean is taken at {config.temperature:g} only",
            hint="leave `temperatures` out",
        )


def _taken(losses: Mapping[str, Loss], task: Task, form: TokenFormat) -> dict[str, str]:
    """How each loss takes the cache, or :class:`RecipeError`."""
    if task != "text-generation":
        raise RecipeError(
            f"[distill.cache] keeps answers about the next token, and the task is {task}",
            hint="leave it out: "
            + ("its teacher is asked live" if task in TOKEN_TASKS else "vectors of whole texts are always kept"),
        )
    found: dict[str, str] = {}
    for name, loss in losses.items():
        if loss.signal is Labels:
            found[name] = "exact: asks no teacher"
            continue
        if loss.signal is Hidden:
            found[name] = "exact up to fp16, in which the states are kept"
            continue
        taken = loss.takes.get(Sparse)
        if taken is None or taken.how == "refused":
            why = taken.why if taken is not None else "it reads what no cache of top-k logits holds"
            raise RecipeError(f"loss {name!r} can't use [distill.cache]: {why}", hint=_LIVE)
        if form.kept == form.vocab_size:
            found[name] = "exact: every token is kept"
        elif form.samples and name == "forward_kl":
            found[name] = f"unbiased estimate, with {form.samples} tokens drawn from the tail"
        else:
            found[name] = f"{taken.how}: the {form.kept} likeliest tokens and all others as one"
    return found
