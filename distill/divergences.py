"""Divergences between rows of log-probabilities: one implementation for dense rows and for sparse ones.

Every function takes ``teacher`` and ``student`` log-probabilities ``[N, M]`` (M = V tokens, or k + 1 buckets) and
gives ``[N]``, in nats where it has a unit, without any factor for the temperature. p is the teacher, q the student.

What has probability 0 (log −inf) is exact, in value and gradient: 0 · log 0 is 0, and where p > 0 = q the forward KL
is infinite. NaN stays NaN. All but :func:`alpha_beta` with alpha + beta ≠ 1 are f-divergences: merging tokens into
buckets can only lower them (data processing inequality), so over k + 1 buckets they are lower bounds that rise with k.

Sources: forward and reverse KL arXiv 2306.08543; generalised JSD arXiv 2306.13649; skew KL arXiv 2402.03898; total
variation arXiv 2307.15190; alpha-beta divergence arXiv 2505.04560 and Cichocki, Cruces, Amari, Entropy 13 (2011) 134.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "alpha_beta",
    "jsd",
    "kl",
    "kl_of_some",
    "mixture",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]


# Where log-probabilities are farther apart than so much, nothing cancels, and the exponential of their difference
# might overflow.
_FAR = 10.0


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """``Σ p (log p − log q) − p + q`` over whole distributions; with the two exchanged it is the reverse KL.

    The last two sums are equal. With them no term is negative, and an error in a row's normaliser, which shifts all of
    its logs alike, counts in second order only: an fp32 log-softmax over 49,152 tokens is off by 5e-7, which would
    otherwise be the error of the KL, however small that is.
    """
    weight, other = teacher.exp(), student.exp()
    # Taken out before it is multiplied: 0 · (−inf − −inf) is not a number, and neither is its gradient.
    gap = torch.where(weight == 0, 0.0, teacher - student)
    near = gap.abs() <= _FAR
    close = torch.where(near, gap, 0.0)
    terms = torch.where(near & (weight != 0), weight * (close + torch.expm1(-close)), weight * gap - weight + other)
    return terms.sum(-1)


def kl_of_some(teacher: Tensor, student: Tensor) -> Tensor:
    """``Σ p (log p − log q)`` over a part of the tokens."""
    weight = teacher.exp()
    gap = torch.where(weight == 0, 0.0, teacher - student)
    return (weight * gap).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """``Σ q (log q − log p)``."""
    return kl(student, teacher)


def mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """``log(weight · exp(first) + (1 − weight) · exp(second))``, with ``0 < weight < 1``."""
    # Two −inf have no gradient in logaddexp. So low a number is never read: where it counts, one of them is higher.
    lowest = torch.finfo(first.dtype).min / 4
    return torch.logaddexp(first.clamp_min(lowest) + math.log(weight), second.clamp_min(lowest) + math.log1p(-weight))


def jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """``beta KL(p ‖ m) + (1 − beta) KL(q ‖ m)``, where ``m = beta p + (1 − beta) q``: beta weighs the **teacher**.

    The formula gives 0 at both ends. As in GKD and TRL they stand for the limits of the formula divided by beta and by
    1 − beta: **beta = 0 is the forward KL(p ‖ q), beta = 1 the reverse KL(q ‖ p)**. 0.5 is the symmetric divergence,
    at most log 2.
    """
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixed = mixture(teacher, student, beta)
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def skew_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """``KL(p ‖ alpha p + (1 − alpha) q)``: at most ``−log alpha``; alpha = 0 is the forward KL."""
    return kl(teacher, student if alpha == 0 else mixture(teacher, student, alpha))


def skew_reverse_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """``KL(q ‖ alpha q + (1 − alpha) p)``: at most ``−log alpha``; alpha = 0 is the reverse KL."""
    return kl(student, teacher if alpha == 0 else mixture(student, teacher, alpha))


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """``½ Σ |p − q|``, from 0 to 1."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def alpha_beta(teacher: Tensor, student: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """``−1/(αβ) Σ (p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β))``, and its limits where α or β is 0.

    ``alpha, beta >= 0``, not both 0. (1, 0) is the forward KL, (0, 1) the reverse KL, (½, ½) four times the squared
    Hellinger distance ``½ Σ (√p − √q)²``, (1, 1) half the squared Euclidean distance.
    """
    # Each term is non-negative. Near p = q it is a difference of nearly equal numbers, so there it is computed from
    # d = log q − log p with expm1. Elsewhere the plain formula is exact, and it knows what p = 0 or q = 0 means.
    both = alpha + beta
    apart = student - teacher
    unknown = torch.isnan(apart) & ~torch.isnan(teacher) & ~torch.isnan(student)  # −inf − −inf: both are 0
    near = (apart.abs() <= _FAR) | torch.isnan(teacher) | torch.isnan(student)
    gap = torch.where(near, apart, 0.0)
    p, q = (torch.where(unknown, 0.0, log) for log in (teacher, student))
    if beta == 0:
        close = (teacher * alpha).exp() * (torch.expm1(alpha * gap) - alpha * gap) / alpha**2
        weight = (alpha * p).exp()
        lead = torch.where(weight == 0, 0.0, p - q) * weight
        far = lead / alpha - (weight - (alpha * q).exp()) / alpha**2
    elif alpha == 0:
        close = (student * beta).exp() * (torch.expm1(-beta * gap) + beta * gap) / beta**2
        weight = (beta * q).exp()
        lead = torch.where(weight == 0, 0.0, q - p) * weight
        far = lead / beta - (weight - (beta * p).exp()) / beta**2
    else:
        terms = beta / both * torch.expm1(both * gap) - torch.expm1(beta * gap)
        close = (both * teacher).exp() * terms / (alpha * beta)
        cross = (alpha * p + beta * q).exp()
        far = (alpha / both * (both * p).exp() + beta / both * (both * q).exp() - cross) / (alpha * beta)
    return torch.where(near, close, torch.where(unknown, 0.0, far)).sum(-1)
