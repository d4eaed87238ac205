"""The language-model head and the loss over it, in chunks of tokens.

Logits of a whole batch (``[batch, length, vocab]``) are never held: SmolLM2 has 49,152 of them for each token. For
each chunk, logits, loss and the loss' gradient by the logits are computed, folded into the gradients of the hidden
states and of the head, and dropped. Value and gradient are those of the dense computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported

__all__ = ["chunk_rows", "chunked_head"]

CHUNK_BYTES = 24 << 20
"""Most bytes of one chunk's logits; about seven such blocks are alive at once. Each chunk walks twice through the head
and once through its gradient, so that smaller ones cost time."""

ChunkLoss = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""``(logits [n, V], begin, end) -> (loss, raw components [k])`` of the rows ``begin:end``."""


def chunk_rows(vocab_size: int, item_bytes: int = 4) -> int:
    """How many tokens make a chunk of at most :data:`CHUNK_BYTES`.

    >>> chunk_rows(49152)
    128
    """
    return max(1, CHUNK_BYTES // (vocab_size * item_bytes))


def chunked_head(hidden: Tensor, head: nn.Module, loss: ChunkLoss, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum ``loss`` over the logits ``head(hidden)`` without holding them all.

    ``hidden`` [N, D]; ``head`` a linear layer; ``rows`` tokens a chunk. Returns the summed loss, which carries the
    gradient to ``hidden`` and the head, and the summed components, which carry none. N = 0 gives zeros.
    """
    if not isinstance(head, nn.Linear):
        raise Unsupported(f"a head of type {type(head).__name__}", hint="only a linear language-model head is known")
    rows = rows or chunk_rows(head.out_features, hidden.element_size())
    total: Tensor
    total, parts = _ChunkedHead.apply(hidden, head.weight, head.bias, loss, rows)
    return total, parts


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: ChunkLoss, rows: int
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # The first chunk writes the head's gradient (113 MB for SmolLM2) whole, so that it need not be zeros before.
        made = torch.empty_like if len(hidden) else torch.zeros_like
        grads = [
            make(tensor) if wanted and tensor is not None else None
            for tensor, wanted, make in (
                (hidden, wants_hidden, made), (weight, wants_weight, made), (bias, wants_bias, torch.zeros_like),
            )
        ]  # fmt: skip
        total, parts = hidden.new_zeros(()), None
        for begin in range(0, max(len(hidden), 1), rows):
            block = hidden[begin : begin + rows]
            logits = nn.functional.linear(block, weight, bias).requires_grad_()
            with torch.enable_grad():
                value, components = loss(logits, begin, begin + len(block))
            total = total + value.detach()
            parts = components.detach() if parts is None else parts + components.detach()
            if not any(grad is not None for grad in grads):
                continue
            (slope,) = torch.autograd.grad(value, logits)
            del logits, value
            if grads[0] is not None:
                torch.mm(slope, weight, out=grads[0][begin : begin + rows])
            if grads[1] is not None:
                if begin == 0:
                    torch.mm(slope.T, block, out=grads[1])
                else:
                    grads[1].addmm_(slope.T, block)
            if grads[2] is not None:
                grads[2].add_(slope.sum(0))
        ctx.save_for_backward(*grads)
        assert parts is not None  # the loop runs at least once
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _parts: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        if not bool(slope == 1):  # as a rule it is: then the head's gradient (113 MB for SmolLM2) is not copied
            found = tuple(None if grad is None else grad * slope for grad in found)
        return (*found, None, None)
