"""How the weights of a ONNX artifact may be stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .quantisation_base import Quantisation, unknown

__all__ = ["GRAMMAR", "NAMES", "OnnxQuantisation", "parse"]

NAMES = ("fp32", "fp16", "int8", "int4", "int8-dynamic", "int8-dynamic-per-channel")
GRAMMAR = " | ".join(NAMES) + "; fp32 and fp16 take -portable"
_PORTABLE = "-portable"


@dataclass(frozen=True)
class OnnxQuantisation(Quantisation):
    """``portable``: standard operators only, for runtimes without those of ONNX Runtime."""

    portable: bool = False


def parse(name: str) -> OnnxQuantisation:
    """Read what follows ``onnx:``; raises ``ValueError``.

    >>> parse("fp16-portable").portable
    True
    """
    if name.endswith(_PORTABLE):
        weights = parse(name.removesuffix(_PORTABLE))
        if weights.base not in ("fp32", "fp16"):
            raise ValueError(f"onnx:{name}: quantised matrix products are operators of ONNX Runtime; "
                             "write onnx:fp32-portable or onnx:fp16-portable")  # fmt: skip
        return dataclasses.replace(weights, name=f"{weights.name}{_PORTABLE}", portable=True)
    if name not in NAMES:
        raise unknown("onnx", name, NAMES)
    return OnnxQuantisation("onnx", name, name)
