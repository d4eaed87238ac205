"""What a teacher says about a batch, as frozen values that the losses read.

A loss says which kinds it takes, and how exactly (:data:`edgestill.distill.losses.LOSSES`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["INSIDE", "Attention", "Dense", "Embedding", "Hidden", "Labels", "Relations", "Signal", "Sparse"]


@dataclass(frozen=True)
class Dense:
    """The teacher's logits ``[..., V]`` over the whole vocabulary (or classes), at loss ``temperature``.

    ``vocab_size`` is the tokenizer's size: rows that padding of the embedding matrix added behind it mean nothing
    and are cut off on both sides (Qwen2.5 has 151,936 or 152,064 rows for 151,665 tokens).
    """

    logits: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None

    def rows(self, begin: int, end: int) -> Dense:
        """The same of the places ``begin:end``."""
        return Dense(self.logits[begin:end], self.temperature, self.vocab_size)


@dataclass(frozen=True)
class Sparse:
    """The teacher's k most likely tokens and the exact mass of all others: ``k + 1`` buckets.

    ``ids`` [..., k] (different ones, below ``vocab_size``), their ``log_probs`` [..., k] and ``tail`` [...], the log of
    what the others have together; all taken from the full logits **at** ``temperature`` (masses of another temperature
    can't be converted) and over the tokenizer's ``vocab_size`` tokens. With k = V the tail is −inf.

    Optional tokens of the tail, drawn with replacement: ``sampled_ids`` [..., S], their ``sampled_log_probs`` [..., S]
    (of the whole distribution, at ``temperature``) and ``sampled_log_weights`` [..., S], the log of that probability
    over the one with which the token was drawn; ``None``: drawn from the tail itself at ``temperature``, where all
    weights are the tail's mass. With them forward_kl is an unbiased estimate of the exact one.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None
    sampled_ids: Tensor | None = None
    sampled_log_probs: Tensor | None = None
    sampled_log_weights: Tensor | None = None

    def rows(self, begin: int, end: int) -> Sparse:
        """The same of the places ``begin:end``."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin:end]

        return Sparse(
            self.ids[begin:end], self.log_probs[begin:end], self.tail[begin:end], self.temperature, self.vocab_size,
            part(self.sampled_ids), part(self.sampled_log_probs), part(self.sampled_log_weights),
        )  # fmt: skip

    def to(self, device: torch.device) -> Sparse:
        """The same on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Hidden:
    """Outputs of the teacher's mapped blocks, ``[B, T, D]`` each, one for each block of the student."""

    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Attention:
    """Attention maps of the teacher's mapped blocks, ``[B, H, T, T]`` each: each row a distribution over keys."""

    maps: tuple[Tensor, ...]


@dataclass(frozen=True)
class Relations:
    """Queries, keys and values ``[B, T, D]`` of one of the teacher's blocks, all heads side by side.

    As the projections give them: before rotary positions and before norms of queries and keys. ``heads`` is the number
    of key-value heads; with grouped queries keys and values are narrower than queries. ``real`` [B, T]: the tokens that
    relations are between, by default those that the loss is taken at.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    heads: int
    real: Tensor | None = None


@dataclass(frozen=True)
class Embedding:
    """The teacher's vectors of whole texts, ``[B, D]``."""

    vectors: Tensor


@dataclass(frozen=True)
class Labels:
    """What the text itself says: true ids ``[...]`` (next tokens, or classes)."""

    ids: Tensor
    vocab_size: int | None = None


INSIDE = (Hidden, Attention, Relations)
"""The kinds that are heard inside of a model while it reads (:mod:`edgestill.distill.taps`)."""

Signal = Dense | Sparse | Hidden | Attention | Relations | Embedding | Labels
