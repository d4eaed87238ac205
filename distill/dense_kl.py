"""The forward KL of two blocks of logits with the gradient by hand: what nearly every distillation of logits pays for.

Autograd would hold the two distributions, their logs and their difference, each a block of [N, V], and walk through
them once more. The gradient is known: ``(q − p) / T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_forward_kl"]


def dense_forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(teacher / T) ‖ softmax(student / T))`` in nats, ``[N]``, of logits ``[N, V]``.

    Only ``student`` gets a gradient. What the teacher rules out (logit −inf) adds nothing; NaN stays NaN.
    """
    found: Tensor = _ForwardKL.apply(teacher, student, temperature)
    return found


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        gap = _below_largest(teacher, temperature)
        p = gap.exp()
        p_sum = p.sum(-1, keepdim=True)
        q = _below_largest(student, temperature)
        gap.sub_(q)
        q.exp_()  # in place: five blocks of [N, V] are alive here, not six
        q_sum = q.sum(-1, keepdim=True)
        # The difference of logs, token by token: entropies would cancel when the KL is small. The logs of the two
        # normalisers are as large as log V, so their difference is taken before it is rounded to fp32.
        shift = (p_sum.double().log() - q_sum.double().log()).to(gap.dtype)
        gap.sub_(shift)
        if gap.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(gap)):
            gap.masked_fill_(p == 0, 0.0)  # 0 · −inf
        ctx.save_for_backward(p, p_sum, q, q_sum)
        ctx.temperature = temperature
        return gap.mul_(p).sum(-1) / p_sum.squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        p, p_sum, q, q_sum = ctx.saved_tensors
        slope = slope.unsqueeze(-1) / ctx.temperature
        grad = q * (slope / q_sum)
        return None, grad.addcmul_(p, slope / p_sum, value=-1), None


def _below_largest(logits: Tensor, temperature: float) -> Tensor:
    """Softened logits below their largest [N, V], a new tensor."""
    below = logits - logits.amax(-1, keepdim=True)
    return below.div_(temperature) if temperature != 1 else below
