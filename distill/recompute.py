"""Gradient checkpointing (arXiv 1604.06174): a layer's activations are dropped and computed again when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .anatomy import blocks

__all__ = ["recompute_blocks"]


def recompute_blocks(model: nn.Module) -> None:
    """Have each layer of ``model`` keep only its input for the backward pass; values and gradients stay the same.

    Not Transformers' own switch, which does nothing outside of ``train()``: students train in ``eval()``, without
    dropout. The forward method is wrapped and not the call, so that hooks on a layer run once.
    """
    for block in blocks(model):
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # Without dropout nothing draws random numbers.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return run
