"""How the weights of a ONNX artifact may be stored."""

from __future__ import annotations

from .quantisation_base import Quantisation, unknown

__all__ = ["GRAMMAR", "NAMES", "parse"]

NAMES = ("fp32", "fp16", "int8", "int4", "int8-dynamic", "int8-dynamic-per-channel")
GRAMMAR = " | ".join(NAMES)


def parse(name: str) -> Quantisation:
    """Read what follows ``onnx:``; raises ``ValueError``."""
    if name not in NAMES:
        raise unknown("onnx", name, NAMES)
    return Quantisation("onnx", name, name)
