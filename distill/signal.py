"""What a teacher says about a batch, as frozen values that the losses read.

A loss names the kind of signal that it takes (:data:`edgestill.distill.losses.LOSSES`). Sparse signals (top-k logits
with the exact tail mass) will be one more class here; nothing else has to change for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dense", "Embedding", "Hidden", "Labels", "Signal"]


@dataclass(frozen=True)
class Dense:
    """The teacher's logits ``[..., V]`` over the whole vocabulary (or classes), at loss ``temperature``.

    ``vocab_size`` is the tokenizer's size: rows that padding of the embedding matrix added behind it mean nothing
    and are cut off on both sides (Qwen2.5 has 151,936 or 152,064 rows for 151,665 tokens).
    """

    logits: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None


@dataclass(frozen=True)
class Hidden:
    """Outputs of the teacher's mapped blocks, ``[B, T, D]`` each, one for each block of the student."""

    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Embedding:
    """The teacher's vectors of whole texts, ``[B, D]``."""

    vectors: Tensor


@dataclass(frozen=True)
class Labels:
    """What the text itself says: true ids ``[...]`` (next tokens, or classes)."""

    ids: Tensor
    vocab_size: int | None = None


Signal = Dense | Hidden | Embedding | Labels
