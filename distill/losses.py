"""The losses: one signature ``(student, signal, mask) -> [valid]``, one reducer, one table.

Each loss returns one fp32 value for every place where ``mask`` is true, *not* averaged: :func:`reduce_step` is the
only code that divides, and it divides by the count of the **whole optimiser step**. So gradient accumulation only
changes memory, never the result. (Losses that compare the texts of one forward pass with each other, such as
``embedding_gram``, by nature see fewer pairs when the pass is smaller.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..artifact import Task
from ..errors import RecipeError
from ..loss_names import LOSS_NAMES, LossSpec, parse_loss
from .align import universal_logit
from .feature_losses import (
    attention_maps,
    attention_relations,
    contrastive_scores,
    embedding_cosine,
    embedding_gram,
    hidden_states,
)
from .logit_losses import (
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from .signal import Attention, Dense, Embedding, Hidden, Labels, Relations, Sparse

__all__ = [
    "LOSSES",
    "Loss",
    "Taken",
    "alpha_beta",
    "attention_maps",
    "attention_relations",
    "contrastive_scores",
    "cross_entropy",
    "embedding_cosine",
    "embedding_gram",
    "forward_kl",
    "hidden_states",
    "jsd",
    "logit_mse",
    "predicting",
    "reduce_step",
    "reverse_kl",
    "select_losses",
    "shift",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
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


@dataclass(frozen=True)
class Taken:
    """How a loss takes a kind of signal: ``exact``, as a ``lower bound``, or ``refused``; and why, in one line."""

    how: Literal["exact", "lower bound", "refused"]
    why: str = ""


_EXACT = Taken("exact")
_BUCKETS = Taken("lower bound", "exact over the k tokens and all others as one; rises to the full value with k")
_SAMPLED = Taken("lower bound", f"{_BUCKETS.why}; with sampled tail tokens an unbiased estimate of the full value")
_NEEDS_LOGITS = Taken("refused", "it needs the logit of every token, of which a sparse signal keeps k")
_NO_DIVERGENCE = Taken("refused", "with alpha + beta other than 1, merging tokens may raise it as well as lower it")

Taking = Callable[..., Mapping[type, Taken]]


def _only(kind: type) -> Taking:
    return lambda *_: {kind: _EXACT}


def _logits(sparse: Taken) -> Taking:
    return lambda *_: {Dense: _EXACT, Sparse: sparse}


def _alpha_beta_takes(alpha: float, beta: float) -> Mapping[type, Taken]:
    return {Dense: _EXACT, Sparse: _BUCKETS if abs(alpha + beta - 1) < 1e-9 else _NO_DIVERGENCE}


@dataclass(frozen=True)
class Loss:
    """A row of :data:`LOSSES`, and with another name and ``parameters`` a loss of a recipe (``jsd:0.3``).

    ``function`` takes ``(student, signal, mask, *parameters)``; :meth:`values` fills them in. ``unit`` says for each
    task that it fits what its values are counted by: ``predicted`` tokens (a real token with a real one before it),
    real ``tokens``, ``examples``, or ``labelled`` examples (for token-classification: labelled words). Its values carry
    the factor ``temperature ** temperature_power``. ``taking(*parameters)`` says how each kind of signal is taken.
    ``pairwise``: it compares the texts of a forward pass with each other, so that processes which share the pass must
    see all.
    """

    name: str
    function: Callable[..., Tensor]
    signal: type
    unit: Mapping[Task, Unit]
    taking: Taking
    temperature_power: int = 0
    parameters: tuple[float, ...] = ()
    pairwise: bool = False

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that it fits."""
        return tuple(self.unit)

    @property
    def takes(self) -> Mapping[type, Taken]:
        """How it takes each kind of signal; kinds that are not here say nothing about it."""
        return self.taking(*self.parameters)

    def values(self, student: Any, signal: Any, mask: Tensor) -> Tensor:
        """One value ``[N]`` for each place where ``mask`` is true."""
        return self.function(student, signal, mask, *self.parameters)

    def bind(self, spec: LossSpec) -> Loss:
        """The same loss with the parameters of ``spec``, under its full name."""
        return replace(self, name=spec.text, parameters=spec.parameters)


_ENCODERS_AND_DECODERS: Mapping[Task, Unit] = {
    "feature-extraction": "tokens",
    "text-classification": "tokens",
    "token-classification": "tokens",
    "text-generation": "tokens",
}
_LOGITS: Mapping[Task, Unit] = {
    "text-generation": "predicted",
    "text-classification": "examples",
    "token-classification": "tokens",
}
_LABELS: Mapping[Task, Unit] = {
    "text-generation": "predicted",
    "text-classification": "labelled",
    "token-classification": "labelled",
}
_VECTORS: Mapping[Task, Unit] = {"feature-extraction": "examples"}
# The order decides in which order losses are added up, hence the last bit of a student: new ones go to the end.
_ROWS = (
    Loss("forward_kl", forward_kl, Dense, _LOGITS, _logits(_SAMPLED), 2),
    Loss("cross_entropy", cross_entropy, Labels, _LABELS, _only(Labels)),
    Loss("hidden_states", hidden_states, Hidden, _ENCODERS_AND_DECODERS, _only(Hidden)),
    Loss("embedding_cosine", embedding_cosine, Embedding, _VECTORS, _only(Embedding)),
    Loss("embedding_gram", embedding_gram, Embedding, _VECTORS, _only(Embedding), pairwise=True),
    Loss("reverse_kl", reverse_kl, Dense, _LOGITS, _logits(_BUCKETS), 2),
    Loss("jsd", jsd, Dense, _LOGITS, _logits(_BUCKETS), 2),
    Loss("skew_kl", skew_kl, Dense, _LOGITS, _logits(_BUCKETS), 2),
    Loss("skew_reverse_kl", skew_reverse_kl, Dense, _LOGITS, _logits(_BUCKETS), 2),
    Loss("total_variation", total_variation, Dense, _LOGITS, _logits(_BUCKETS), 1),
    Loss("alpha_beta", alpha_beta, Dense, _LOGITS, _alpha_beta_takes, 2),
    Loss("logit_mse", logit_mse, Dense, _LOGITS, _logits(_NEEDS_LOGITS)),
    Loss("attention_maps", attention_maps, Attention, _ENCODERS_AND_DECODERS, _only(Attention)),
    Loss("attention_relations", attention_relations, Relations, _ENCODERS_AND_DECODERS, _only(Relations)),
    Loss("contrastive_scores", contrastive_scores, Embedding, _VECTORS, _only(Embedding), pairwise=True),
    Loss("universal_logit", universal_logit, Dense, {"text-generation": "predicted"}, _logits(_NEEDS_LOGITS), 1),
)
LOSSES: Mapping[str, Loss] = {
    row.name: replace(row, parameters=tuple(parameter.default for parameter in LOSS_NAMES[row.name].parameters))
    for row in _ROWS
}
"""Every loss that a recipe can name, with its default parameters; the same names as in :data:`LOSS_NAMES`."""


def select_losses(weights: Mapping[str, float], task: Task) -> dict[str, Loss]:
    """The losses with a weight above 0 by their full names (``jsd:0.5``), in the order of the table.

    Raises :class:`RecipeError` for an unknown loss, for one that does not fit ``task`` and for bad parameters.
    """
    fitting = ", ".join(name for name, loss in LOSSES.items() if task in loss.tasks)
    chosen: dict[str, Loss] = {}
    for name, weight in weights.items():
        if name.partition(":")[0] not in LOSSES:
            raise RecipeError(f"unknown loss {name!r}", hint=f"for {task}: {fitting}")
        spec = parse_loss(name)
        if weight and task not in LOSSES[spec.name].tasks:
            raise RecipeError(f"loss {name!r} does not fit the task {task}", hint=f"for {task}: {fitting}")
        if weight:
            chosen[spec.text] = LOSSES[spec.name].bind(spec)
    if not chosen:
        raise RecipeError("[distill] has no loss with a weight above 0", hint=f"for {task}: {fitting}")
    places = {name: place for place, name in enumerate(LOSSES)}
    return dict(sorted(chosen.items(), key=lambda item: (places[item[0].partition(":")[0]], item[1].parameters)))
