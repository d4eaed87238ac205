"""What a format lets the allocation choose from: which tensors, in which types and sizes, and what they decode to.

A format is four answers: the types that each matrix can take, what a matrix decodes to in one of them, how many bytes
the whole model takes in a choice of types, and what its writer is told. Each writer finds its codes in one place that
can be replaced: the allocation puts its own rounding there, and to learn a size, one that rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Chosen", "Encode", "Space", "Tensor", "for_two_uses"]

Floats = npt.NDArray[np.float32]
Encode = Callable[[str, str, Floats], npt.NDArray[np.uint8]]
"""``(parameter, type, some rows)`` to stored bytes ``[rows, bytes of a row]``, in place of the format's quantiser."""

# An output layer that is the embedding too is also looked up: less is compensated, for what is right for one use is an
# error for the other. Of 0.01, 0.1 and 1, 0.1 was best on SmolLM2 (0.0112, 0.0101 and 0.0108 nats in Q5_0).
TIED_DAMPING = 0.1


@dataclass(frozen=True)
class Tensor:
    """A matrix whose type is to be chosen, its ``shape [out, in]``, and the types that it can take, rising in size."""

    name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """An allocation, for the writer: a type per parameter, the quantisation ``to`` that the rest is written in, what
    else the writer is ``told``, and how the budget and what was chosen are told in ``contents``."""

    types: Mapping[str, str]
    to: str
    note: str
    told: Mapping[str, Any]


class Space(Protocol):
    """One format's side of the allocation."""

    recipe: str
    """Names how values are rounded: another one makes other sensitivities."""
    how: str
    """The same in words, for ``contents``."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those whose type is to be chosen."""

    def learn(self, moments: Mapping[str, Floats]) -> None:
        """What goes into each product, by parameter (:mod:`.moments`); comes before anything is decoded. A matrix that
        is in no product, such as an embedding that is only looked up, has none."""

    def size_bytes(self, tensor: Tensor, type_: str) -> int:
        """Bytes of a tensor's values in the file."""

    def decoded(self, tensor: Tensor, type_: str, weight: Floats) -> Floats:
        """``weight [out, in]`` as the file will hold it."""

    def whole_bytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the model with a type for each tensor: exactly what the writer will make."""

    def chosen(self, types: Mapping[str, str], note: str) -> Chosen:
        """What the writer is told."""


def for_two_uses(moment: Floats, damping: float) -> Floats:
    """``moment`` damped as :data:`TIED_DAMPING` says, for a routine that adds ``damping`` of the mean by itself."""
    matrix = np.array(moment, np.float32)
    matrix[np.diag_indices_from(matrix)] += (TIED_DAMPING - damping) * float(np.mean(np.diag(matrix)))
    return matrix
