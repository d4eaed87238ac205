"""How the weights of a Core ML artifact may be stored."""

from __future__ import annotations

from .quantisation_base import Quantisation, unknown

__all__ = ["GRAMMAR", "NAMES", "parse"]

NAMES = ("fp16", "int8")
GRAMMAR = " | ".join(NAMES)


def parse(name: str) -> Quantisation:
    """Read what follows ``coreml:``; raises ``ValueError``."""
    if name not in NAMES:
        raise unknown("coreml", name, NAMES)
    return Quantisation("coreml", name, name)
