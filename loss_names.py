"""The names of the losses that a recipe may weigh, with their parameters: what can be said without torch.

A loss is written ``name`` or ``name:parameter[:parameter]`` (``forward_kl``, ``jsd:0.5``, ``alpha_beta:0.2:0.7``); a
parameter that is left out has its default. What each one computes stands in :mod:`edgestill.distill.losses`, whose
table has the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError, nearest

__all__ = ["LOSS_NAMES", "LossName", "LossSpec", "Parameter", "parse_loss"]

Reads = Literal["logits", "blocks", "vectors", "labels"]

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Parameter:
    """A number in a loss's name: ``low`` to ``high``, both allowed unless ``below_high`` or ``above_low`` says so."""

    name: str
    default: float
    low: float
    high: float
    above_low: bool = False
    below_high: bool = False
    whole: bool = False

    def allows(self, value: float) -> bool:
        """Whether ``value`` is in range (NaN never is)."""
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            return False
        return not (self.above_low and value == self.low) and not (self.below_high and value == self.high)

    @property
    def range(self) -> str:
        """The range in words.

        >>> Parameter("alpha", 0.1, 0, 1, below_high=True).range
        '0 to below 1'
        """
        kind = "a whole number from " if self.whole else ""
        low, high = _short(self.low), _short(self.high)
        return f"{kind}{'above ' if self.above_low else ''}{low} to {'below ' if self.below_high else ''}{high}"


@dataclass(frozen=True)
class LossName:
    """A row of :data:`LOSS_NAMES`: ``meaning`` in one line, what of the teacher it ``reads``, its ``parameters``.

    ``rule`` says what is wrong with parameters that are each in range, or ``None``.
    """

    name: str
    meaning: str
    reads: Reads
    parameters: tuple[Parameter, ...] = ()
    rule: Callable[..., str | None] = lambda *_: None

    @property
    def written(self) -> str:
        """How it is written with its defaults.

        >>> LOSS_NAMES["jsd"].written
        'jsd:0.5'
        """
        return LossSpec(self.name, tuple(parameter.default for parameter in self.parameters)).text


@dataclass(frozen=True)
class LossSpec:
    """A loss with all its parameters, in the order of its row."""

    name: str
    parameters: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The one way in which it is written: every parameter, shortest numbers.

        >>> parse_loss("jsd").text, parse_loss("alpha_beta:1.0:0").text
        ('jsd:0.5', 'alpha_beta:1:0')
        """
        return ":".join([self.name, *map(_short, self.parameters)])


def _short(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _not_both_zero(alpha: float, beta: float) -> str | None:
    return None if alpha + beta > 0 else "alpha and beta are both 0"


_ROWS = (
    LossName("forward_kl", "KL(teacher ‖ student): covers all that the teacher finds possible", "logits"),
    LossName("cross_entropy", "−log p of the true next token, or class: learning from the data itself", "labels"),
    LossName("hidden_states", "states of mapped blocks, relative squared error (layers by `layer_map`)", "blocks"),
    LossName("embedding_cosine", "1 − cosine between the embeddings of a text", "vectors"),
    LossName("embedding_gram", "squared error of the similarities between the texts of a batch", "vectors"),
    LossName("reverse_kl", "KL(student ‖ teacher): says only what the teacher finds likely", "logits"),
    LossName("jsd", "generalised Jensen-Shannon divergence; beta is the teacher's weight in the mixture: 0 is "
             "forward_kl, 1 is reverse_kl", "logits", (Parameter("beta", 0.5, 0, 1),)),
    LossName("skew_kl", "KL(teacher ‖ alpha·teacher + (1 − alpha)·student); 0 is forward_kl", "logits",
             (Parameter("alpha", 0.1, 0, 1, below_high=True),)),
    LossName("skew_reverse_kl", "KL(student ‖ alpha·student + (1 − alpha)·teacher); 0 is reverse_kl", "logits",
             (Parameter("alpha", 0.1, 0, 1, below_high=True),)),
    LossName("total_variation", "half the sum of |teacher − student|, at most 1", "logits"),
    LossName("alpha_beta", "alpha-beta divergence; 1:0 is forward_kl, 0:1 is reverse_kl, 0.5:0.5 is four times the "
             "squared Hellinger distance", "logits",
             (Parameter("alpha", 0.2, 0, 2), Parameter("beta", 0.7, 0, 2)), _not_both_zero),
    LossName("logit_mse", "mean squared difference of the logits over the vocabulary; temperature has no part in it",
             "logits"),
    LossName("attention_maps", "KL between the attention of mapped blocks, head by head (equal numbers of heads)",
             "blocks"),
    LossName("attention_relations", "KL between the relations of queries, of keys and of values in the student's last "
             "block and the teacher's that it is mapped to; relation_heads 0: the teacher's key-value heads", "blocks",
             (Parameter("relation_heads", 0, 0, 4096, whole=True),)),
    LossName("contrastive_scores", "KL between the softmax of the similarities of a text to the others of its batch",
             "vectors", (Parameter("temperature", 0.05, 0, 10, above_low=True),)),
    LossName("universal_logit", "sum of |teacher − student| of the sorted probabilities: which token is which has no "
             "part in it, so it joins models with different vocabularies", "logits"),
)  # fmt: skip
LOSS_NAMES: Mapping[str, LossName] = {row.name: row for row in _ROWS}
"""Every loss that a recipe can name, by its name without parameters."""


def parse_loss(text: str) -> LossSpec:
    """Read ``name`` or ``name:parameter[:parameter]``.

    >>> parse_loss("skew_kl:0.3")
    LossSpec(name='skew_kl', parameters=(0.3,))

    Raises :class:`RecipeError` for an unknown name and for parameters that are too many, no numbers or out of range.
    """
    name, *given = text.split(":")
    if name not in LOSS_NAMES:
        raise RecipeError(f"unknown loss {text[:60]!r}", hint=nearest(name, list(LOSS_NAMES)))
    row = LOSS_NAMES[name]
    hint = "; ".join(f"{parameter.name}: {parameter.range}" for parameter in row.parameters)
    hint = f"e.g. {row.written} ({hint})" if hint else f"write {name}"
    if len(given) > len(row.parameters):
        names = f" ({', '.join(parameter.name for parameter in row.parameters)})" if row.parameters else ""
        raise RecipeError(f"{name} takes {len(row.parameters)} parameters{names}, got {len(given)}", hint=hint)
    values = [parameter.default for parameter in row.parameters]
    for index, (word, parameter) in enumerate(zip(given, row.parameters, strict=False)):
        if not _NUMBER.fullmatch(word):
            raise RecipeError(f"{parameter.name} of {name} is no number: {word[:30]!r}", hint=hint)
        values[index] = float(word)
        if not parameter.allows(values[index]):
            raise RecipeError(f"{parameter.name} of {name} is {word[:30]}, allowed: {parameter.range}", hint=hint)
    if problem := row.rule(*values):
        raise RecipeError(f"{name}: {problem}", hint=hint)
    return LossSpec(name, tuple(values))
