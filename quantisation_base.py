"""What every format's quantisation is: a plain value, and the refusal of an unknown name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import nearest

__all__ = ["Quantisation", "unknown"]


@dataclass(frozen=True)
class Quantisation:
    """How the weights of an artifact are stored.

    ``name`` is the canonical text after the colon: two spellings of one thing have the same. ``base`` is its family
    (``int4`` of ``int4-b16-sym``). A format adds fields of its own in a subclass.
    """

    format: str
    name: str
    base: str

    @property
    def to(self) -> str:
        """``FORMAT:NAME``."""
        return f"{self.format}:{self.name}"

    @property
    def reads_text(self) -> bool:
        """Whether what is stored is measured on `calibration` text and chosen on `dev` text."""
        return False

    @property
    def runs_model(self) -> bool:
        """Whether the float model is run (in torch) to make such an artifact."""
        return False


def unknown(form: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a name that ``form`` does not know."""
    return ValueError(f"unknown quantisation {name!r} in {f'{form}:{name}'!r}; {nearest(name, list(known))}")
