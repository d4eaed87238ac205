"""How the weights of a GGUF artifact may be stored: llama.cpp's file types, with an importance matrix or without."""

from __future__ import annotations

from dataclasses import dataclass

from .quantisation_base import Quantisation, unknown

__all__ = ["FILE_TYPES", "GRAMMAR", "NAMES", "FileType", "GgufQuantisation", "parse"]


@dataclass(frozen=True)
class FileType:
    """A file type of llama.cpp: its number in ``enum llama_ftype`` and the grid that most matrices get.

    Which tensor gets which grid is decided in :mod:`edgestill.export.gguf_types`. ``needs_importance`` types are
    garbage without an importance matrix, so llama.cpp refuses to make them.
    """

    number: int
    grid: str
    needs_importance: bool = False


FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(0, "f32"), "f16": FileType(1, "f16"), "bf16": FileType(32, "bf16"),
    "q8_0": FileType(7, "q8_0"), "q6_k": FileType(18, "q6_k"),
    "q5_k_m": FileType(17, "q5_k"), "q5_k_s": FileType(16, "q5_k"), "q5_1": FileType(9, "q5_1"),
    "q5_0": FileType(8, "q5_0"),
    "q4_k_m": FileType(15, "q4_k"), "q4_k_s": FileType(14, "q4_k"), "q4_1": FileType(3, "q4_1"),
    "q4_0": FileType(2, "q4_0"), "iq4_nl": FileType(25, "iq4_nl"), "iq4_xs": FileType(30, "iq4_xs"),
    "q3_k_l": FileType(13, "q3_k"), "q3_k_m": FileType(12, "q3_k"), "q3_k_s": FileType(11, "q3_k"),
    "iq3_m": FileType(27, "iq3_s"), "iq3_s": FileType(26, "iq3_s"), "iq3_xs": FileType(22, "iq3_s", True),
    "iq3_xxs": FileType(23, "iq3_xxs", True),
    "q2_k": FileType(10, "q2_k"), "q2_k_s": FileType(21, "q2_k", True), "q2_0": FileType(41, "q2_0"),
    "iq2_m": FileType(29, "iq2_s", True), "iq2_s": FileType(28, "iq2_xs", True), "iq2_xs": FileType(20, "iq2_xs", True),
    "iq2_xxs": FileType(19, "iq2_xxs", True), "iq1_m": FileType(31, "iq1_m", True),
    "iq1_s": FileType(24, "iq1_s", True),
    "tq2_0": FileType(37, "tq2_0"), "tq1_0": FileType(36, "tq1_0"), "q1_0": FileType(40, "q1_0"),
}  # fmt: skip
"""Every file type of llama.cpp for dense models, the largest first."""

NAMES = tuple(FILE_TYPES)
GRAMMAR = f"({' | '.join(NAMES)})[-imatrix]"

_SUFFIX = "-imatrix"
_WITHOUT_CHOICE = ("f32", "f16", "bf16", "q8_0")  # every value is rounded by itself: nothing to weigh


@dataclass(frozen=True)
class GgufQuantisation(Quantisation):
    """``base`` is a key of :data:`FILE_TYPES`. ``importance``: rounding is weighed by an importance matrix, made from
    the calibration texts: asked for by ``-imatrix``, and always for the types that need one."""

    importance: bool = False

    @property
    def runs_model(self) -> bool:
        """For the importance matrix."""
        return self.importance


def parse(name: str) -> GgufQuantisation:
    """Read what follows ``gguf:``; raises ``ValueError``.

    >>> parse("q4_k_m-imatrix").importance, parse("q4_k_m").importance, parse("iq2_xxs-imatrix").name
    (True, False, 'iq2_xxs')
    """
    base = name.removesuffix(_SUFFIX)
    if base not in FILE_TYPES:
        middle = (f"{base}_m",)  # what llama.cpp's own tool means by q4_k
        raise unknown("gguf", name, middle if middle[0] in FILE_TYPES else NAMES)
    asked = base != name
    if asked and base in _WITHOUT_CHOICE:
        raise ValueError(f"{base} has no use for an importance matrix in 'gguf:{name}'; write {base!r}")
    needed = FILE_TYPES[base].needs_importance
    canonical = base + _SUFFIX if asked and not needed else base
    return GgufQuantisation("gguf", canonical, base, importance=asked or needed)
