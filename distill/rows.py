"""From logits and masks to the rows that the losses compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from .signal import Dense, Sparse

__all__ = ["dense_rows", "log_rows", "log_softmax", "student_buckets", "valid", "wide"]


def valid(values: Tensor, mask: Tensor) -> Tensor:
    """The rows where ``mask`` is true, before any log is taken; no copy when all are."""
    chosen = mask.bool()
    return values.flatten(0, chosen.dim() - 1) if bool(chosen.all()) else values[chosen]


def wide(values: Tensor) -> Tensor:
    """At least fp32: a small KL over a large vocabulary is noise in bf16."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def dense_rows(student: Tensor, signal: Dense, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(teacher, student)`` logits ``[N, V]`` over the true vocabulary, at least fp32."""
    ours, theirs = (wide(valid(logits, mask)[..., : signal.vocab_size]) for logits in (student, signal.logits))
    if theirs.shape != ours.shape:
        raise BadInput(
            f"the teacher has {theirs.shape[-1]} logits, the student {ours.shape[-1]}",
            hint="both need the tokenizer's vocabulary",
        )
    return theirs.detach(), ours


def log_rows(student: Tensor, signal: Dense | Sparse, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(teacher_log, student_log)``, each ``[N, M]`` log-probabilities at the signal's temperature, at least fp32.

    ``student`` logits [..., V]. M is V for a dense signal, and k + 1 for a sparse one: its k tokens, then all others
    together. Only the student's carries a gradient.
    """
    if isinstance(signal, Dense):
        teacher, logits = dense_rows(student, signal, mask)
        with torch.no_grad():
            teacher_log = log_softmax(teacher, signal.temperature)
        return teacher_log, log_softmax(logits, signal.temperature)
    logits = wide(valid(student, mask)[..., : signal.vocab_size])
    with torch.no_grad():
        parts = [valid(signal.log_probs, mask), valid(signal.tail, mask).unsqueeze(-1)]
        # Once more normalised: stored in half precision, the masses would add up to 1.001 or 0.999, and a divergence
        # of such rows can be below 0.
        teacher_log = F.log_softmax(torch.cat([part.to(logits.dtype) for part in parts], -1), dim=-1)
    return teacher_log, student_buckets(logits, valid(signal.ids, mask), signal.temperature)[0]


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """``log_softmax(logits / temperature)``, an order of magnitude nearer to the exact one in fp32.

    torch's own adds up a large vocabulary one after another and rounds at the size of the logits, which is what a small
    divergence is made of. Here the sum is pairwise, and the largest logit is taken out first.
    """
    centred = logits - logits.detach().amax(-1, keepdim=True)
    if temperature != 1:
        centred = centred / temperature
    return centred - centred.logsumexp(-1, keepdim=True)


def student_buckets(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``[N, k + 1]`` log-probabilities of ``ids`` [N, k] and of all other tokens, and the log-normaliser ``[N]``.

    ``logits`` [N, V], softened here. The rest's mass is the log of the sum over the rest itself: one minus the others
    would be nothing but rounding where they have nearly all of it.
    """
    buckets: Tensor = _Buckets.apply(logits, ids.long(), temperature)
    total = buckets.logsumexp(-1, keepdim=True)
    return buckets - total, total.squeeze(-1)


class _Buckets(torch.autograd.Function):
    """Softened scores of the tokens ``ids`` and the log-sum of all others' exponentials, [N, k + 1].

    By hand, since autograd would hold four blocks of [N, V] where one is enough, and that is the cost of this loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        chosen = logits.gather(-1, ids) / temperature
        rest = logits / temperature if temperature != 1 else logits.clone()
        # The lowest number, not −inf: with k = V nothing is left, and the log of an empty sum has no gradient.
        rest.scatter_(-1, ids, torch.finfo(rest.dtype).min)
        highest = rest.amax(-1, keepdim=True)
        mass = rest.sub_(highest).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(ids, rest, mass)
        ctx.temperature = temperature
        return torch.cat([chosen, mass.log() + highest], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        ids, rest, mass = ctx.saved_tensors
        slope = slope / ctx.temperature
        grad = rest * (slope[..., -1:] / mass)
        return grad.scatter_(-1, ids, slope[..., :-1]), None, None
