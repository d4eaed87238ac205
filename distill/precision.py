"""Which number format a device can train in."""

from __future__ import annotations

import torch

from ..errors import Unsupported

__all__ = ["check_precision"]


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
