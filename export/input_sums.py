"""What all do that watch a model's matrix products: find them, tell which read the same input, add up ``x xᵀ`` of it.

:mod:`.moments` weighs each token by its influence, which a backward pass tells; :mod:`.onnx_moments` counts all the
same, and takes the matrices a few at a time; :mod:`.onnx_inputs` keeps some of the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["InputSums", "SharedInputs", "matrices"]

Floats = npt.NDArray[np.float32]


def matrices(root: Any, kinds: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Module name -> (parameter name of its weight, module) for modules of these classes; a head that is tied to the
    embedding goes by the embedding's name, as in a model folder."""
    names = {id(value): name for name, value in root.named_parameters()}  # a shared one under its first name
    return {
        name: (names[id(module.weight)], module)
        for name, module in root.named_modules()
        if any(base.__name__ in kinds for base in type(module).__mro__)
    }


class SharedInputs:
    """Which products read the same input, as queries, keys and values do: they go by the name of the first."""

    def __init__(self) -> None:
        self.shared: dict[str, str] = {}  # parameter -> the first one with the same input
        self._last: tuple[Any, str] = (None, "")

    def first(self, name: str, given: Any) -> str:
        """The name that stands for the input ``given`` of ``name``: another than ``name`` when that read it before."""
        found = self._last[1] if given is self._last[0] else name
        self._last = (given, found)
        self.shared[name] = found
        return found

    def forget(self) -> None:
        """Between passes: a tensor may come to lie where another did."""
        self._last = (None, "")


class InputSums(SharedInputs):
    """``sum(w x xᵀ)`` by parameter name. Products that read the same input share one sum."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Any] = {}

    def add(self, name: str, rows: Any, weights: Any = None) -> None:
        """Add ``rows [n, width]``, each as often as ``weights [n]`` says (once without)."""
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        self._sums[name].addmm_((rows if weights is None else rows * weights[:, None]).T, rows)

    def means(self, counts: Mapping[str, int]) -> dict[str, Floats]:
        """Parameter name -> the sum over ``counts`` (by the name of the first) ``[width, width]``; those that share an
        input share the array. Parameters of which nothing was added are left out."""
        found = {name: (total / counts[name]).numpy() for name, total in self._sums.items()}
        return {name: found[first] for name, first in self.shared.items() if first in found}
