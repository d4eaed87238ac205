"""Which number format a device can train in, and how attention is computed in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import Unsupported

__all__ = ["check_precision", "suit_attention"]


def check_precision(precision: str, device: torch.device, key: str = "precision") -> None:
    """Raise :class:`Unsupported` when ``device`` has no bf16 of its own (emulation is slower than fp32)."""
    if precision != "bf16":
        return
    able = True
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        able = torch.backends.mps.is_macos_or_newer(14, 0)
    if not able:
        raise Unsupported(f"[distill] {key}: {device.type} here has no bf16", hint=f'set {key} = "fp32"')


def suit_attention(base: nn.Module, precision: str, device: torch.device) -> None:
    """Let ``base`` compute attention in the way that trains fastest.

    On a CPU the fused kernel's backward pass is slow in bf16: a step of MiniLM's three layers takes a fifth less with
    plain products (28 and 128 tokens). In fp32 the fused kernel wins.
    """
    if precision == "bf16" and device.type == "cpu":
        model: Any = base
        model.set_attn_implementation("eager")
