"""The losses: one signature ``(student, signal, mask) -> [valid]``, one reducer, one table.

Each loss returns one fp32 value for every place where ``mask`` is true, *not* averaged: :func:`reduce_step` is the
only code that divides, and it divides by the count of the **whole optimiser step**. So gradient accumulation only
changes memory, never the result. (``embedding_gram`` compares the texts of one forward pass with each other, so by
nature it sees fewer pairs when the pass is smaller.)

Sources: forward KL with temperature and its T² arXiv 1503.02531; hidden states arXiv 1412.6550 (projector) and
arXiv 1908.09355 (layer maps); similarity of the batch arXiv 1907.09682.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Task
from ..errors import RecipeError, Unsupported
from .signal import Dense, Embedding, Hidden, Labels

__all__ = [
    "LOSSES",
    "Loss",
    "cross_entropy",
    "embedding_cosine",
    "embedding_gram",
    "forward_kl",
    "hidden_states",
    "predicting",
    "reduce_step",
    "select_losses",
    "shift",
]


Unit = Literal["predicted", "tokens", "examples", "labelled"]


def predicting(mask: Tensor, learn: Tensor | None = None) -> Tensor:
    """The places [B, T-1] (bool) that predict: their own and their next token are real, and the next one is learnt.

    ``mask`` [B, T] (1 = real token); ``learn`` [B, T] (above 0 = learnt, see :mod:`.batches`), by default every token.
    """
    real = mask.bool()
    valid = real[:, :-1] & real[:, 1:]
    return valid if learn is None else valid & (learn[:, 1:] > 0)


def shift(states: Tensor, ids: Tensor, mask: Tensor, learn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pair each place with the token that comes after it: the only place where logits and labels are shifted.

    ``states`` [B, T, ...] (hidden states or logits), ``ids`` [B, T], ``mask`` and ``learn`` as in :func:`predicting`.
    Returns the states ``[N, ...]`` and next ids ``[N]`` of the N places that predict, row by row.
    """
    valid = predicting(mask, learn)
    return states[:, :-1][valid], ids[:, 1:][valid]


def reduce_step(values: Tensor, count: int) -> Tensor:
    """The sum of ``values`` over the count of the whole optimiser step; an empty mask gives 0 with a gradient of 0."""
    return values.sum() / max(int(count), 1)


def _valid(values: Tensor, mask: Tensor) -> Tensor:
    """The rows where ``mask`` is true, before any log is taken; no copy when all are."""
    chosen = mask.bool()
    return values.flatten(0, chosen.dim() - 1) if bool(chosen.all()) else values[chosen]


def _wide(values: Tensor) -> Tensor:
    """At least fp32: a small KL over a large vocabulary is noise in bf16."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def forward_kl(student: Tensor, signal: Dense, mask: Tensor) -> Tensor:
    """``T² · KL(teacher ‖ student)`` in nats, both softened by T, summed over the vocabulary.

    ``student`` logits [..., V]; T² keeps the gradient's size independent of T. A class that the teacher rules out
    (logit −inf) adds nothing.
    """
    temperature = signal.temperature
    teacher_logits = _valid(signal.logits, mask)[..., : signal.vocab_size]
    student_logits = _valid(student, mask)[..., : signal.vocab_size]
    with torch.no_grad():
        teacher_log = F.log_softmax(_wide(teacher_logits) / temperature, dim=-1)
        teacher = teacher_log.exp()
    student_log = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    # The difference of logs, not of entropies: those cancel when the KL is small. And 0 · −inf is 0 here.
    divergence = torch.where(teacher > 0, teacher * (teacher_log - student_log), 0.0).sum(-1)
    return divergence * temperature**2


def cross_entropy(student: Tensor, signal: Labels, mask: Tensor) -> Tensor:
    """``−log p(true id)`` in nats; ``student`` logits [..., V]. Temperature has no part in it."""
    logits = _wide(_valid(student, mask)[..., : signal.vocab_size])
    return F.cross_entropy(logits, _valid(signal.ids, mask), reduction="none")


def hidden_states(student: Sequence[Tensor], signal: Hidden, mask: Tensor) -> Tensor:
    """``|s − t|² / |t|²`` of a token's state, mean over the mapped layers.

    ``student``: block outputs [B, T, D], brought to the teacher's width by projectors where they differ. Dividing by
    the teacher's own size makes layers and models comparable.
    """
    total: Tensor | None = None
    for ours, theirs in zip(student, signal.states, strict=True):
        target = _wide(_valid(theirs, mask))
        error = (_wide(_valid(ours, mask)) - target).square().sum(-1)
        part = error / target.square().sum(-1).clamp_min(1e-12)
        total = part if total is None else total + part
    if total is None:
        raise RecipeError("hidden_states has no layer to imitate", hint="keep at least one layer")
    return total / len(student)


def embedding_cosine(student: Tensor, signal: Embedding, mask: Tensor) -> Tensor:
    """``1 − cos(student, teacher)`` of each text; ``student`` [B, D]."""
    ours, theirs = _wide(_valid(student, mask)), _wide(_valid(signal.vectors, mask))
    if ours.shape[-1] != theirs.shape[-1]:
        raise Unsupported(
            f"embedding_cosine compares vectors of {ours.shape[-1]} and {theirs.shape[-1]} numbers",
            hint="use embedding_gram, which only compares similarities",
        )
    return 1 - F.cosine_similarity(ours, theirs, dim=-1)


def embedding_gram(student: Tensor, signal: Embedding, mask: Tensor) -> Tensor:
    """For each text, the mean squared error of its cosine similarities to the other texts of the batch.

    ``student`` [B, D], teacher [B, D'] (widths may differ). A text alone in its batch has nothing to compare: 0.
    """
    ours = F.normalize(_wide(_valid(student, mask)), dim=-1)
    theirs = F.normalize(_wide(_valid(signal.vectors, mask)), dim=-1)
    error = (ours @ ours.T - theirs @ theirs.T).square()
    others = error.sum(-1) - error.diagonal()
    return others / max(len(ours) - 1, 1)


@dataclass(frozen=True)
class Loss:
    """A row of :data:`LOSSES`.

    ``unit`` says for each task that it fits what its values are counted by: ``predicted`` tokens (a real token with a
    real one before it), real ``tokens``, ``examples``, or ``labelled`` examples.
    """

    name: str
    function: Callable[[Any, Any, Tensor], Tensor]
    signal: type
    unit: Mapping[Task, Unit]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that it fits."""
        return tuple(self.unit)


_ENCODERS_AND_DECODERS: Mapping[Task, Unit] = {
    "feature-extraction": "tokens",
    "text-classification": "tokens",
    "text-generation": "tokens",
}
_ROWS = (
    Loss("forward_kl", forward_kl, Dense, {"text-generation": "predicted", "text-classification": "examples"}),
    Loss("cross_entropy", cross_entropy, Labels, {"text-generation": "predicted", "text-classification": "labelled"}),
    Loss("hidden_states", hidden_states, Hidden, _ENCODERS_AND_DECODERS),
    Loss("embedding_cosine", embedding_cosine, Embedding, {"feature-extraction": "examples"}),
    Loss("embedding_gram", embedding_gram, Embedding, {"feature-extraction": "examples"}),
)
LOSSES: Mapping[str, Loss] = {loss.name: loss for loss in _ROWS}
"""Every loss that a recipe can name, and the tasks that it fits."""


def select_losses(weights: Mapping[str, float], task: Task) -> dict[str, Loss]:
    """The losses with a weight above 0, in the order of the table.

    Raises :class:`RecipeError` for an unknown loss and for one that does not fit ``task``.
    """
    fitting = ", ".join(name for name, loss in LOSSES.items() if task in loss.tasks)
    for name, weight in weights.items():
        if name not in LOSSES:
            raise RecipeError(f"unknown loss {name!r}", hint=f"for {task}: {fitting}")
        if weight and task not in LOSSES[name].tasks:
            raise RecipeError(f"loss {name!r} does not fit the task {task}", hint=f"for {task}: {fitting}")
    chosen = {name: loss for name, loss in LOSSES.items() if weights.get(name)}
    if not chosen:
        raise RecipeError("[distill] has no loss with a weight above 0", hint=f"for {task}: {fitting}")
    return chosen
