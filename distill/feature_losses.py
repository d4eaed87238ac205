"""Losses over what lies inside the models or comes out as embeddings: states, attention, vectors of texts.

Each gives ``[N]``, a value for every place where ``mask`` is true, so padding has no part in it. Sources: hidden
states arXiv 1412.6550 (projector) and arXiv 1908.09355 (layer maps); attention maps arXiv 1909.10351; relations
arXiv 2012.15828; similarity of the batch arXiv 1907.09682; contrastive scores arXiv 2101.04731 and arXiv 2010.14713.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RecipeError, Unsupported
from .divergences import kl
from .rows import valid, wide
from .signal import Attention, Embedding, Hidden, Relations

__all__ = [
    "attention_maps",
    "attention_relations",
    "contrastive_scores",
    "embedding_cosine",
    "embedding_gram",
    "hidden_states",
]


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


def attention_maps(student: Sequence[Tensor], signal: Attention, mask: Tensor) -> Tensor:
    """``KL(teacher ‖ student)`` of a token's attention over the tokens it looks at, mean over heads and mapped layers.

    ``student``: maps [B, H, T, T] of its blocks. TinyBERT compares scores before the softmax by squared error; the KL
    compares what is done with them: it does not shrink with the length of the text, and padding, which has attention
    0, is no part of it. Probabilities below the smallest normal number of their type count as that one.
    """
    total: Tensor | None = None
    for ours, theirs in zip(student, signal.maps, strict=True):
        if ours.shape[1] != theirs.shape[1]:
            raise Unsupported(
                f"attention_maps compares {ours.shape[1]} heads of the student with {theirs.shape[1]} of the teacher",
                hint="use attention_relations, which takes any numbers of heads",
            )
        logs = [_log_attention(maps, mask) for maps in (theirs, ours)]
        part = kl(logs[0].flatten(0, 1), logs[1].flatten(0, 1)).reshape(-1, ours.shape[1]).mean(-1)
        total = part if total is None else total + part
    if total is None:
        raise RecipeError("attention_maps has no layer to imitate", hint="keep at least one layer")
    return total / len(student)


def _log_attention(maps: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities [N, H, T] of the places of ``mask``; normalised, since half precision adds up to 0.99."""
    rows = wide(valid(maps.transpose(1, 2), mask))
    rows = rows / rows.sum(-1, keepdim=True)
    # Where nobody may look, both are 0 and count as equal; where only the student's underflows, its log is finite.
    return torch.where(rows == 0, torch.finfo(rows.dtype).tiny, rows).log()


def attention_relations(student: Relations, signal: Relations, mask: Tensor, relation_heads: float = 0) -> Tensor:
    """The sum of three KLs, of the relations between queries, between keys and between values (MiniLMv2).

    A relation of vectors x is ``softmax(x xᵀ / √d)`` over the real tokens, for each of ``relation_heads`` equal pieces
    of d numbers; the KL is the mean over them. Pieces need not be heads: models of any number of heads and width can
    be compared, and key-value heads of grouped queries are cut up as they are, not repeated. 0 takes the teacher's
    number of key-value heads. Every real token looks at every other, in decoders too.
    """
    count = int(relation_heads) or signal.heads
    keys = (mask if signal.real is None else signal.real).bool()
    total: Tensor | None = None
    for name in ("queries", "keys", "values"):
        logs = [valid(_relation(getattr(side, name), count, keys, name), mask) for side in (signal, student)]
        part = kl(logs[0].flatten(0, 1), logs[1].flatten(0, 1)).reshape(-1, count).mean(-1)
        total = part if total is None else total + part
    assert total is not None  # three names
    return total


def _relation(vectors: Tensor, count: int, real: Tensor, name: str) -> Tensor:
    """``[B, T, count, T]`` log-probabilities; −inf for tokens that are not real."""
    rows, length, width = vectors.shape
    if width % count:
        raise Unsupported(
            f"attention_relations can't cut {name} of {width} numbers into {count} relation heads",
            hint="name a number that divides the widths of both models, e.g. attention_relations:4",
        )
    pieces = wide(vectors).reshape(rows, length, count, width // count).transpose(1, 2)
    scores = pieces @ pieces.transpose(-1, -2) / (width // count) ** 0.5
    scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
    return F.log_softmax(scores, dim=-1).transpose(1, 2)


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


def contrastive_scores(student: Tensor, signal: Embedding, mask: Tensor, temperature: float = 0.05) -> Tensor:
    """``KL(teacher ‖ student)`` between the softmax of a text's cosine similarities to the others of its batch.

    ``student`` [B, D], teacher [B, D'] (widths may differ); similarities are divided by ``temperature``, without any
    factor for it afterwards. Which texts are near counts, and not how near exactly. A text alone in its batch, or with
    a single other, has nothing to rank: 0.
    """
    ours, theirs = wide(valid(student, mask)), wide(valid(signal.vectors, mask))
    if len(ours) < 2:
        return ours.sum(-1) * 0
    logs = []
    for vectors in (theirs, ours):
        units = F.normalize(vectors, dim=-1)
        scores = (units @ units.T / temperature).fill_diagonal_(-torch.inf)
        logs.append(F.log_softmax(scores, dim=-1))
    return kl(logs[0], logs[1])
