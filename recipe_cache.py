"""The section `[distill.cache]` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from .recipe_base import NotNegative, Positive, PositiveFloat, Strict
from .sorted_ids import coded_bytes

__all__ = ["CacheConfig"]


class CacheConfig(Strict):
    """`[distill.cache]`: the teacher is asked once for each token, before training; its answers stay on disk."""

    top_k: Positive = 64
    """logits kept of each token (64: 272 bytes a token at most); of all others their exact mass together. Losses
    between probabilities are then exact over k + 1 buckets, a lower bound of the full value."""
    tail_samples: Annotated[NotNegative, Field(le=4096)] = 0
    """tokens drawn from the others at each temperature; with them forward_kl is an unbiased estimate of the full
    value."""
    temperatures: tuple[PositiveFloat, ...] = ()
    """further temperatures to keep, for other recipes that share the cache (that of `[distill]` is always kept)."""
    path: str | None = None
    """folder of caches that several recipes share, relative to the recipe; one cache serves many students. Or one cache
    itself, which is refused if it is of another teacher, text or form. By default, in the run folder."""

    def row_bytes(self, vocab_size: int, temperature: float) -> int:
        """Bytes that a token takes (without hidden states), at the `temperature` of `[distill]` and the further ones.

        >>> CacheConfig().row_bytes(49152, 1.0), CacheConfig().row_bytes(151665, 1.0)
        (272, 250)
        """
        kept = min(self.top_k, vocab_size)
        samples = self.tail_samples if kept < vocab_size else 0
        number = 2 if vocab_size <= 1 << 16 else 4
        ids = 2 * kept if number == 2 else coded_bytes(kept, vocab_size)
        return ids + 2 * kept + 12 + len({temperature, *self.temperatures}) * (4 + samples * (number + 4))

    @field_validator("path")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; leave it out for the run folder")
        return value
