"""Losses over logits: a teacher's distribution, dense or sparse, or the true ids.

Each gives ``[N]``, a value for every place where ``mask`` is true. Divergences are between distributions softened by
the signal's temperature T, times T² (total variation: T), which keeps the gradient's size independent of T
(arXiv 1503.02531): a divergence falls with the square of the logits' size, total variation with the size itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergences
from .dense_kl import dense_forward_kl
from .rows import dense_rows, log_rows, student_buckets, valid, wide
from .signal import Dense, Labels, Sparse

__all__ = [
    "alpha_beta",
    "cross_entropy",
    "forward_kl",
    "jsd",
    "logit_mse",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]


def forward_kl(student: Tensor, signal: Dense | Sparse, mask: Tensor) -> Tensor:
    """``T² · KL(teacher ‖ student)`` in nats, summed over the vocabulary; ``student`` logits [..., V].

    A class that the teacher rules out (logit −inf) adds nothing. A sparse signal with sampled tokens gives an
    unbiased estimate, which may be below 0 for a place; one without them the exact KL of its buckets.
    """
    if isinstance(signal, Sparse) and signal.sampled_ids is not None:
        return _sampled_kl(student, signal, mask) * signal.temperature**2
    if isinstance(signal, Dense):
        return dense_forward_kl(*dense_rows(student, signal, mask), signal.temperature) * signal.temperature**2
    return divergences.kl(*log_rows(student, signal, mask)) * signal.temperature**2


def _sampled_kl(student: Tensor, signal: Sparse, mask: Tensor) -> Tensor:
    """The sum over the k tokens, exact, and over the others the mean over the drawn ones (arXiv 2503.16870)."""
    assert signal.sampled_ids is not None
    assert signal.sampled_log_probs is not None
    logits = wide(valid(student, mask)[..., : signal.vocab_size])
    ids, drawn = valid(signal.ids, mask), valid(signal.sampled_ids, mask).long()
    buckets, total = student_buckets(logits, ids, signal.temperature)
    head = divergences.kl_of_some(wide(valid(signal.log_probs, mask)).to(logits.dtype), buckets[..., :-1])
    theirs = wide(valid(signal.sampled_log_probs, mask)).to(logits.dtype)
    ours = logits.gather(-1, drawn) / signal.temperature - total.unsqueeze(-1)
    if signal.sampled_log_weights is None:
        weights = wide(valid(signal.tail, mask)).exp().unsqueeze(-1).to(logits.dtype)
    else:
        weights = wide(valid(signal.sampled_log_weights, mask)).exp().to(logits.dtype)
    return head + torch.where(weights == 0, 0.0, weights * (theirs - ours)).mean(-1)


def _divergence(
    of: Callable[..., Tensor], power: int, student: Tensor, signal: Dense | Sparse, mask: Tensor, *parameters: float
) -> Tensor:
    return of(*log_rows(student, signal, mask), *parameters) * signal.temperature**power


def reverse_kl(student: Tensor, signal: Dense | Sparse, mask: Tensor) -> Tensor:
    """``T² · KL(student ‖ teacher)`` in nats. Infinite where the student believes what the teacher rules out."""
    return _divergence(divergences.reverse_kl, 2, student, signal, mask)


def jsd(student: Tensor, signal: Dense | Sparse, mask: Tensor, beta: float = 0.5) -> Tensor:
    """``T²`` times the generalised Jensen-Shannon divergence; see :func:`edgestill.distill.divergences.jsd`."""
    return _divergence(divergences.jsd, 2, student, signal, mask, beta)


def skew_kl(student: Tensor, signal: Dense | Sparse, mask: Tensor, alpha: float = 0.1) -> Tensor:
    """``T² · KL(teacher ‖ alpha · teacher + (1 − alpha) · student)``."""
    return _divergence(divergences.skew_kl, 2, student, signal, mask, alpha)


def skew_reverse_kl(student: Tensor, signal: Dense | Sparse, mask: Tensor, alpha: float = 0.1) -> Tensor:
    """``T² · KL(student ‖ alpha · student + (1 − alpha) · teacher)``."""
    return _divergence(divergences.skew_reverse_kl, 2, student, signal, mask, alpha)


def total_variation(student: Tensor, signal: Dense | Sparse, mask: Tensor) -> Tensor:
    """``T · ½ Σ |teacher − student|``."""
    return _divergence(divergences.total_variation, 1, student, signal, mask)


def alpha_beta(student: Tensor, signal: Dense | Sparse, mask: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """``T²`` times the alpha-beta divergence; see :func:`edgestill.distill.divergences.alpha_beta`."""
    return _divergence(divergences.alpha_beta, 2, student, signal, mask, alpha, beta)


def logit_mse(student: Tensor, signal: Dense, mask: Tensor) -> Tensor:
    """The **mean** over the true vocabulary of the squared difference of raw logits (arXiv 2105.08919).

    A mean, so that a weight means the same for 3 classes and for 150,000 tokens. Temperature would divide both sides
    by T and multiply by T²: it has no part in it. Where both rule a token out (−inf) nothing is added.
    """
    ours = wide(valid(student, mask)[..., : signal.vocab_size])
    theirs = wide(valid(signal.logits, mask)[..., : signal.vocab_size])
    both = (ours == -torch.inf) & (theirs == -torch.inf)
    return torch.where(both, 0.0, ours - theirs).square().mean(-1)


def cross_entropy(student: Tensor, signal: Labels, mask: Tensor) -> Tensor:
    """``−log p(true id)`` in nats; ``student`` logits [..., V]. Temperature has no part in it."""
    logits = wide(valid(student, mask)[..., : signal.vocab_size])
    return F.cross_entropy(logits, valid(signal.ids, mask), reduction="none")
