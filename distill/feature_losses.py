"""Losses over what lies inside the models or comes out as embeddings: states of blocks, vectors of texts.

Each gives ``[N]``, a value for every place where ``mask`` is true, so padding has no part in it. Sources: hidden
states arXiv 1412.6550 (projector) and arXiv 1908.09355 (layer maps); similarity of the batch arXiv 1907.09682.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import RecipeError, Unsupported
from .rows import valid, wide
from .signal import Embedding, Hidden

__all__ = ["embedding_cosine", "embedding_gram", "hidden_states"]


def hidden_states(student: Sequence[Tensor], signal: Hidden, mask: Tensor) -> Tensor:
    """``|s − t|² / |t|²`` of a token's state, mean over the mapped layers.

    ``student``: block outputs [B, T, D], brought to the teacher's width by projectors where they differ. Dividing by
    the teacher's own size makes layers and models comparable.
    """
    total: Tensor | None = None
    for ours, theirs in zip(student, signal.states, strict=True):
        target = wide(valid(theirs, mask))
        error = (wide(valid(ours, mask)) - target).square().sum(-1)
        part = error / target.square().sum(-1).clamp_min(1e-12)
        total = part if total is None else total + part
    if total is None:
        raise RecipeError("hidden_states has no layer to imitate", hint="keep at least one layer")
    return total / len(student)


def embedding_cosine(student: Tensor, signal: Embedding, mask: Tensor) -> Tensor:
    """``1 − cos(student, teacher)`` of each text; ``student`` [B, D]."""
    ours, theirs = wide(valid(student, mask)), wide(valid(signal.vectors, mask))
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
    ours = F.normalize(wide(valid(student, mask)), dim=-1)
    theirs = F.normalize(wide(valid(signal.vectors, mask)), dim=-1)
    error = (ours @ ours.T - theirs @ theirs.T).square()
    others = error.sum(-1) - error.diagonal()
    return others / max(len(ours) - 1, 1)
