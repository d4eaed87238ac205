"""How the weights of a GGUF artifact may be stored."""

from __future__ import annotations

from .quantisation_base import Quantisation, unknown

__all__ = ["GRAMMAR", "NAMES", "parse"]

NAMES = ("f32", "f16", "q8_0", "q4_k_m", "q4_0")
GRAMMAR = " | ".join(NAMES)


def parse(name: str) -> Quantisation:
    """Read what follows ``gguf:``; raises ``ValueError``."""
    if name not in NAMES:
        raise unknown("gguf", name, NAMES)
    return Quantisation("gguf", name, name)
