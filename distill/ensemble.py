"""Several teachers as one: the student learns from the weighted mean of their probabilities.

``p = sum_i w_i softmax(z_i / T)``, taken as a log-sum-exp for a chunk of tokens at a time, so no ``[batch, length,
vocab]`` is ever held. Outwards the mixture looks like one model: its hidden states are those of all teachers side by
side, its head takes them apart again. What stands inside a model (hidden states, attention) is imitated from the first
teacher alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import ModelFolder, load_tokenizer
from ..errors import RecipeError, Unsupported
from ..files import hash_json
from ..loss_names import parse_loss
from ..progress import Progress, silent
from ..recipe import DistillConfig
from .batches import Batch, Examples
from .teacher import Said, Teacher
from .token_records import TokenFormat

__all__ = ["MixedModel", "MixedTeacher", "check_teachers", "mixture", "normalised"]

# A tokenizer that cuts these alike, and has the same tokens under the same ids, is the same one for our purposes.
_PROBES = (
    "The quick brown fox.",
    "  two  blanks\n\n and\ttabs ",
    "naïve café — “quotes” … 12345 3.14",
    "日本語 🙂🏽 ß",
)


def mixture(logits: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``log sum_i w_i softmax(z_i / T)`` in fp32 of logits [..., V] each; ``weights`` sum to 1."""
    total: Tensor | None = None
    for z, weight in zip(logits, weights, strict=True):
        part = torch.log_softmax(z.float() / temperature, dim=-1) + math.log(weight)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None  # at least one teacher
    return total


def normalised(config: DistillConfig) -> tuple[float, ...]:
    """The teachers' weights divided by their sum, the first one's first."""
    given = [config.teacher_weight, *(teacher.weight for teacher in config.teacher)]
    return tuple(weight / sum(given) for weight in given)


def check_teachers(
    first: ModelFolder, others: Sequence[ModelFolder], config: DistillConfig, texts: Sequence[str]
) -> None:
    """Refuse further teachers whose answers can't be averaged with the first one's, saying why.

    ``texts``: some training texts, on which the tokenizers have to agree, too. Raises :class:`RecipeError` and
    :class:`Unsupported`.
    """
    if len(others) != len(config.teacher):
        raise RecipeError(
            f"[[distill.teacher]] names {len(config.teacher)} further teachers, {len(others)} were given",
            hint="pass one model folder for each of them, in their order",
        )
    if not others:
        return
    if first.task == "feature-extraction":
        raise Unsupported(
            "[[distill.teacher]] for embeddings: two models' vectors lie in different spaces, their mean says nothing",
            hint="remove the section; text-generation and classification have probabilities to average",
        )
    if any(parse_loss(name).name == "logit_mse" for name, weight in config.loss.items() if weight):
        raise Unsupported(
            "loss 'logit_mse' with several teachers: only probabilities are averaged, raw logits have no common zero",
            hint="use forward_kl, reverse_kl or another divergence",
        )
    for other in others:
        if other.task != first.task:
            raise RecipeError(
                f"teacher {other.path} is for {other.task}, the first one for {first.task}",
                hint="teachers must have one task",
            )
        if other.labels != first.labels:
            raise RecipeError(
                f"teacher {other.path} has the labels {', '.join(other.labels)}, not {', '.join(first.labels)}",
                hint="teachers must have the same labels in the same order",
            )
        _check_tokenizer(first, other, texts)


def _check_tokenizer(first: ModelFolder, other: ModelFolder, texts: Sequence[str]) -> None:
    ours, theirs = load_tokenizer(first.path), load_tokenizer(other.path)
    probes = [*_PROBES, *texts]
    if ours.get_vocab() != theirs.get_vocab():
        reason = f"other tokens ({len(theirs)} of them, the first teacher has {len(ours)})"
    elif ours(probes)["input_ids"] != theirs(probes)["input_ids"]:
        reason = "the same tokens that cuts texts in another way"
    else:
        return
    raise Unsupported(
        f"teacher {other.path} has a tokenizer with {reason}: probabilities of different tokens can't be averaged",
        hint="use teachers of one family, or one teacher",
    )


class _Bases(nn.Module):
    """The base models of all teachers, side by side."""

    def __init__(self, bases: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)

    def forward(self, **inputs: Any) -> Any:
        """Last hidden states side by side: [B, T, D1 + D2 + ...]."""
        states = [base(**inputs).last_hidden_state for base in self.bases]
        return SimpleNamespace(last_hidden_state=torch.cat(states, dim=-1))


class _Head(nn.Module):
    """States of all teachers [N, D1 + D2 + ...] -> logits [N, V] whose softmax at T is the mean of theirs at T."""

    def __init__(self, owner: MixedModel) -> None:
        super().__init__()
        self.heads = nn.ModuleList([model.get_output_embeddings() for model in owner.members])
        self.widths = [model.config.hidden_size for model in owner.members]
        self.weights, self.vocab_size, self.temperature = owner.weights, owner.vocab_size, owner.temperature

    def forward(self, states: Tensor) -> Tensor:
        """Logits [N, V]."""
        parts = states.split(self.widths, dim=-1)
        logits = (head(part)[..., : self.vocab_size] for head, part in zip(self.heads, parts, strict=True))
        return self.temperature * mixture(logits, self.weights, self.temperature)  # type: ignore[arg-type]


class MixedModel(nn.Module):
    """Models of one task and vocabulary as one, which answers with the mean of their distributions at ``temperature``.

    ``weights`` sum to 1; ``vocab_size`` is the tokenizer's (embeddings may be padded to different sizes).
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float], vocab_size: int) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)
        self.weights = tuple(weights)
        self.vocab_size = vocab_size
        self.temperature = 1.0

    @property
    def config(self) -> Any:
        """That of the first teacher."""
        return self.members[0].config

    @property
    def base_model(self) -> nn.Module:
        """Everything before the heads."""
        return _Bases([model.base_model for model in self.members])

    def get_output_embeddings(self) -> nn.Module:
        """The heads as one, at the temperature of now."""
        return _Head(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Class logits [B, C] or [B, T, C] whose softmax at ``temperature`` is the teachers' mean there."""
        logits = [model(input_ids=input_ids, attention_mask=attention_mask).logits for model in self.members]
        mean = self.temperature * mixture(logits, self.weights, self.temperature)
        return SimpleNamespace(logits=mean)


class MixedTeacher(Teacher):
    """Several teachers with the manners of one. ``temperature`` is that of the losses, at which they are averaged;
    ``model`` itself, with which students are compared, averages at 1."""

    def __init__(
        self,
        folders: Sequence[ModelFolder],
        weights: Sequence[float],
        temperature: float,
        vocab_size: int,
        layers: Sequence[int] = (),
        pad_id: int = 0,
        device: str | torch.device = "cpu",
        vocabulary: Sequence[int] = (),
        precision: str = "fp32",
    ) -> None:
        self.folders = tuple(folders)
        self._weights = tuple(weights)
        self._loss_temperature = temperature
        self._mixed_size = vocab_size
        super().__init__(folders[0], layers, pad_id, device, vocabulary, precision)

    def _load(self) -> nn.Module:
        members = [self._load_one(folder) for folder in self.folders]
        return MixedModel(members, self._weights, self._mixed_size).eval()

    @property
    def inside(self) -> nn.Module:
        """The first teacher: what stands inside of several can't be averaged."""
        model: Any = self.model
        first: nn.Module = model.members[0]
        return first

    @property
    def identity(self) -> str:
        """sha256 of all teachers, their weights and the temperature at which they are averaged."""
        return hash_json([[folder.model_id for folder in self.folders], self._weights, self._loss_temperature])

    @contextlib.contextmanager
    def _softened(self) -> Iterator[None]:
        model: Any = self.model
        model.temperature = self._loss_temperature
        try:
            yield
        finally:
            model.temperature = 1.0

    def remember(self, examples: Examples, work: Path, progress: Progress = silent) -> None:
        """Fill the cache of mean vectors; see :class:`Teacher`."""
        with self._softened():
            super().remember(examples, work, progress)

    def remember_tokens(
        self, examples: Examples, place: Path, form: TokenFormat, temperature: float, progress: Progress = silent
    ) -> None:
        """Fill the cache of the mean at the losses' temperature, the only one of ``form``; see :class:`Teacher`."""
        if form.temperatures != (self._loss_temperature,):
            raise ValueError(f"teachers averaged at {self._loss_temperature}, asked for {form.temperatures}")
        super().remember_tokens(examples, place, form, temperature, progress)

    def _live(self, batch: Batch) -> Said:
        with self._softened():
            return super()._live(batch)

    def say(self, batch: Batch) -> Said:
        """What the losses need, for one batch; see :class:`Teacher`."""
        if not self.live:
            return super().say(batch)
        with self._softened():
            return super().say(batch)
