"""What a format lets the allocation choose from: which tensors, in which types and sizes, and what they decode to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Chosen", "Encode", "Space", "Tensor"]

Floats = npt.NDArray[np.float32]
Encode = Callable[[str, str, Floats], npt.NDArray[np.uint8]]
"""``(parameter, type, some rows)`` to stored bytes ``[rows, bytes of a row]``, in place of the format's quantiser."""


@dataclass(frozen=True)
class Tensor:
    """A parameter whose type is to be chosen, its ``shape``, and the types that its rows can take, rising in size."""

    name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """An allocation, for the writer: a type per parameter, who encodes it, the quantisation ``to`` that the rest is
    written in, and how the budget and what was chosen are told in ``contents``."""

    types: Mapping[str, str]
    encode: Encode | None
    to: str
    note: str


class Space(Protocol):
    """One format's side of the allocation."""

    recipe: str
    """Names how values are rounded: another one makes other sensitivities."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those whose type is to be chosen."""

    def size_bytes(self, tensor: Tensor, type_: str) -> int:
        """Bytes in the file, with what is lost to alignment."""

    def decoded(self, tensor: Tensor, type_: str, weight: Floats) -> Floats:
        """``weight`` as the file will hold it."""

    def chosen(self, types: Mapping[str, str], note: str) -> Chosen:
        """What the writer is told."""

    def overhead_bytes(self) -> int:
        """Bytes of the file that no choice changes."""
