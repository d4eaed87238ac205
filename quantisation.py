"""The language in which an artifact is asked for: ``onnx:int4``, ``gguf:q4_k_m``, ``coreml:int8``, ``gguf@60MB``.

What stands before the colon is a format, what follows says how its weights are stored; after an ``@`` stands a size,
and the types are chosen to fit it. Each format has a module of its own with its names and options; here they are put
together. What the names mean in numbers stands in
:mod:`edgestill.grids`.
"""

from __future__ import annotations

from collections.abc import Callable

from . import quantisation_budget, quantisation_coreml, quantisation_gguf, quantisation_onnx
from .errors import nearest
from .quantisation_base import Quantisation
from .quantisation_budget import Budget

__all__ = ["GRAMMARS", "QUANTISATIONS", "Budget", "Quantisation", "parse_quantisation"]

_FORMATS = {"onnx": quantisation_onnx, "gguf": quantisation_gguf, "coreml": quantisation_coreml}

QUANTISATIONS: dict[str, tuple[str, ...]] = {form: module.NAMES for form, module in _FORMATS.items()}
"""The plain names of each format, in the order in which help texts list them."""

GRAMMARS: dict[str, str] = {form: module.GRAMMAR for form, module in _FORMATS.items()}
"""What may be written after ``FORMAT:``, for humans."""

_PARSERS: dict[str, Callable[[str], Quantisation]] = {form: module.parse for form, module in _FORMATS.items()}


def parse_quantisation(to: str) -> Quantisation:
    """Read ``FORMAT:QUANTISATION`` or ``FORMAT@SIZE``; raises ``ValueError`` that names the nearest valid one.

    >>> parse_quantisation("gguf:q4_k_m").name, parse_quantisation("gguf@60 mb").to
    ('q4_k_m', 'gguf@60MB')
    """
    mark = "@" if "@" in to and ":" not in to else ":"
    form, _, name = to.partition(mark)
    if form not in _PARSERS:
        raise ValueError(f"unknown format {form!r} in {to!r}; {nearest(form, list(_PARSERS))}")
    if mark == "@":
        return quantisation_budget.parse(form, name)
    return _PARSERS[form](name)
