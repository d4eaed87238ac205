"""How the weights of an ONNX artifact may be stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .quantisation_base import Quantisation, unknown

__all__ = ["BLOCKS", "GRAMMAR", "NAMES", "OnnxQuantisation", "parse"]

NAMES = ("fp32", "fp16", "int8", "int4", "int8-static", "int8-dynamic", "int8-dynamic-per-channel")
BLOCKS = (16, 32, 64, 128)
GRAMMAR = (
    " | ".join(NAMES)
    + "; int4 and int8 take -b16|-b32|-b64|-b128, -sym|-asym, -pure, -gptq; fp32 and fp16 take -portable"
)
_PORTABLE = "-portable"


@dataclass(frozen=True)
class OnnxQuantisation(Quantisation):
    """``block`` and ``symmetric`` are ``None`` where the plain name's own choice holds, which depends on the model.

    ``pure`` stores every matrix alike; without it int4 keeps the sensitive ones in 8 bits. ``gptq`` makes up for
    the error of each code in the others (it needs calibration text). ``portable``: standard operators only, for
    runtimes without those of ONNX Runtime.

    ``int8-static`` measures what goes into each product and which of them stay in blocks.

    The plain names round each weight to the nearest code, with float32 scales: a student can be trained through them.
    Any option brings float16 scales (widened once, when the file is loaded), and with 4 bits ranges that are searched.
    """

    block: int | None = None
    symmetric: bool | None = None
    pure: bool = False
    gptq: bool = False
    portable: bool = False

    @property
    def plain(self) -> bool:
        """No option is given."""
        return self.name == self.base

    @property
    def reads_text(self) -> bool:
        """The grids of inputs, and what stays in blocks."""
        return self.base == "int8-static"

    @property
    def runs_model(self) -> bool:
        """Compensation needs to know what goes into each product, too."""
        return self.reads_text or self.gptq

    @property
    def bits(self) -> Literal[4, 8, 16, 32]:
        """Bits of a stored weight."""
        known: dict[str, Literal[4, 8, 16, 32]] = {"fp32": 32, "fp16": 16, "int4": 4}
        return known.get(self.base, 8)


def parse(name: str) -> OnnxQuantisation:
    """Read what follows ``onnx:``; raises ``ValueError``. Options may come in any order.

    >>> parse("fp16-portable").portable
    True
    >>> parse("int4-gptq-sym-b32").name
    'int4-b32-sym-gptq'
    """
    if name.endswith(_PORTABLE):
        weights = parse(name.removesuffix(_PORTABLE))
        if weights.base not in ("fp32", "fp16"):
            raise ValueError(f"onnx:{name}: quantised matrix products are operators of ONNX Runtime; "
                             "write onnx:fp32-portable or onnx:fp16-portable")  # fmt: skip
        return dataclasses.replace(weights, name=f"{weights.name}{_PORTABLE}", portable=True)
    if name in NAMES:
        return OnnxQuantisation("onnx", name, name)
    if name == "bf16":
        raise ValueError("onnx:bf16: ONNX Runtime's CPU provider has no bfloat16 matrix product; write onnx:fp16")
    base, *options = name.split("-")
    if base not in ("int4", "int8"):
        raise unknown("onnx", name, NAMES)
    block: int | None = None
    symmetric: bool | None = None
    flags: set[str] = set()
    for option in options:
        if option.startswith("b") and option[1:].isdecimal():
            if int(option[1:]) not in BLOCKS:
                sizes = ", ".join(str(size) for size in BLOCKS)
                raise ValueError(f"onnx:{name}: blocks of {option[1:]}; ONNX Runtime's kernels take {sizes}")
            known, block = block is not None, int(option[1:])
        elif option in ("sym", "asym"):
            known, symmetric = symmetric is not None, option == "sym"
        elif option in ("pure", "gptq"):
            known = option in flags
            flags.add(option)
        else:
            raise unknown("onnx", name, (*NAMES, *(f"{base}-{o}" for o in ("b32", "sym", "asym", "pure", "gptq"))))
        if known:
            raise ValueError(f"onnx:{name}: two options of one kind ({option})")
    parts = [base]
    parts += [f"b{block}"] if block else []
    parts += [("asym", "sym")[symmetric]] if symmetric is not None else []
    parts += [flag for flag in ("pure", "gptq") if flag in flags]
    return OnnxQuantisation("onnx", "-".join(parts), base, block, symmetric, "pure" in flags, "gptq" in flags)
