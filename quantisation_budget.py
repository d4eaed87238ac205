"""A size instead of a type: ``gguf@60MB`` asks for the least loss that fits into 60,000,000 bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from .quantisation_base import Quantisation

__all__ = ["GRAMMAR", "Budget", "parse"]

GRAMMAR = "FORMAT@SIZE with a size in MB, GB, MiB or GiB"

_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 1 << 20, "gib": 1 << 30}
_MOST_BYTES = 1 << 50


@dataclass(frozen=True)
class Budget(Quantisation):
    """Types chosen per tensor so that the model takes at most ``budget_bytes``.

    What counts is what the runtime opens: the ``.gguf``, the ``.onnx`` with its external data, the whole
    ``.mlpackage`` (:attr:`edgestill.artifact.Artifact.model_bytes`). Tokenizer and templates beside it don't.
    """

    budget_bytes: int = 0

    @property
    def to(self) -> str:
        """``FORMAT@SIZE``."""
        return f"{self.format}@{self.name}"

    @property
    def reads_text(self) -> bool:
        """The types are chosen."""
        return True

    @property
    def runs_model(self) -> bool:
        """By what each costs."""
        return True


def parse(form: str, size: str) -> Budget:
    """Read what follows ``FORMAT@``; raises ``ValueError``. The name is the same for all spellings of one size.

    >>> parse("gguf", "0.06GB").name, parse("gguf", "60MiB").budget_bytes
    ('60MB', 62914560)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kmgt]i?b)", size.strip(), re.IGNORECASE)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(
            f"{size!r} in {f'{form}@{size}'!r} is not a size; write for example {form}@60MB or {form}@60MiB"
        )
    bytes_ = int(Decimal(found[1]) * unit)
    if not 0 < bytes_ <= _MOST_BYTES:
        raise ValueError(f"{form}@{size}: a size must be above zero and below a petabyte")
    return Budget(form, _name(bytes_), "budget", bytes_)


def _name(bytes_: int) -> str:
    if bytes_ % 10**6 and bytes_ % (1 << 20) == 0:
        return f"{bytes_ >> 20}MiB"
    return f"{(Decimal(bytes_) / 10**6).normalize():f}MB"
