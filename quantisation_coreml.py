"""How the weights of a Core ML artifact may be stored: float, affine codes, palettes, sparse, and sparse with either.

``int8`` and ``int4-b32`` are affine codes with a scale a row or a block of a row. ``pal4`` looks 4-bit codes up in a
table of 16 values, one for the tensor or (``pal4-g16``) one for each 16 rows. ``sparse50`` keeps the larger half of the
weights and a bit mask; ``sparse50-int8`` and ``sparse50-pal4`` store what is kept as codes. What the codes mean stands
in :mod:`edgestill.coreml_grids`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .quantisation_base import Quantisation, unknown

__all__ = ["DEFAULT_BLOCK", "GRAMMAR", "NAMES", "CoremlQuantisation", "parse"]

NAMES = (
    "fp32",
    "fp16",
    "int8",
    "int4",
    "pal8",
    "pal6",
    "pal4",
    "pal3",
    "pal2",
    "sparse50",
    "sparse50-int8",
    "sparse50-pal4",
)
GRAMMAR = "fp32 | fp16 | int8[-bN] | int4[-bN] | pal2|pal3|pal4|pal6|pal8[-gN] | sparseP[-int8|-int4|-palB]"

DEFAULT_BLOCK = 32
"""Weights of a row that share a scale in ``int4``."""

_CODES = re.compile(r"(?P<kind>int|pal)(?P<bits>[234568])(?:-(?P<by>[bg])(?P<count>[1-9]\d{0,4}))?")
_SPARSE = re.compile(r"sparse(?P<percent>[1-9]\d?)(?:-(?P<inner>.+))?")


@dataclass(frozen=True)
class CoremlQuantisation(Quantisation):
    """``bits`` of a stored weight (32 and 16: floats). ``block``: weights of a row that share a scale, 0 for the whole
    row. ``group``: rows that share a table, 0 for the whole tensor. ``sparsity``: percent of the weights that are
    dropped. ``palette``: codes are looked up, not multiplied."""

    bits: int = 16
    block: int = 0
    group: int = 0
    sparsity: int = 0
    palette: bool = False

    @property
    def runs_model(self) -> bool:
        """It is traced."""
        return True

    @property
    def coded(self) -> bool:
        """Are weights stored as codes?"""
        return self.bits < 16

    @property
    def bytes_per_weight(self) -> float:
        """About what a weight takes, scales and masks included; tables are small beside it."""
        scales = 0 if self.palette or not self.coded else 2 / self.block if self.block else 0.01
        kept = 1 - self.sparsity / 100
        return kept * self.bits / 8 + scales + (1 / 8 if self.sparsity else 0)

    @property
    def ios(self) -> int:
        """The oldest iOS whose programs can say this: 16, or 18 for blocks, tables a group or of 3 bits, and codes of
        sparse weights."""
        new = self.block or self.group or (self.coded and self.sparsity) or (self.palette and self.bits == 3)
        return 18 if new or (self.bits == 4 and not self.palette) else 16


def parse(name: str) -> CoremlQuantisation:
    """Read what follows ``coreml:``; raises ``ValueError``.

    >>> parse("int4-b32").name, parse("sparse50-pal4-g16").group
    ('int4', 16)
    """
    found = _SPARSE.fullmatch(name)
    inner = found["inner"] if found else name
    sparsity = int(found["percent"]) if found else 0
    head = f"sparse{sparsity}" if found else ""
    if found and inner is None:
        return CoremlQuantisation("coreml", head, "sparse", sparsity=sparsity)
    if inner in ("fp32", "fp16") and not found:
        return CoremlQuantisation("coreml", inner, inner, bits=int(inner[2:]))
    codes = _CODES.fullmatch(inner)
    if codes is None or codes["bits"] not in ("48" if codes["kind"] == "int" else "23468"):
        raise unknown("coreml", name, NAMES)
    palette, bits, count = codes["kind"] == "pal", int(codes["bits"]), int(codes["count"] or 0)
    if count and codes["by"] != ("g" if palette else "b"):
        what = "a table for N rows is -gN" if palette else "a scale for N weights is -bN"
        raise ValueError(f"unknown quantisation {name!r} in 'coreml:{name}'; {what}")
    if not palette and bits == 4:
        count = count or DEFAULT_BLOCK
    base = f"{codes['kind']}{bits}"
    suffix = "" if not count or (base == "int4" and count == DEFAULT_BLOCK) else f"-{'g' if palette else 'b'}{count}"
    canonical = "-".join(part for part in (head, base + suffix) if part)
    return CoremlQuantisation(
        "coreml", canonical, base, bits=bits, sparsity=sparsity, palette=palette,
        block=0 if palette else count, group=count if palette else 0,
    )  # fmt: skip
