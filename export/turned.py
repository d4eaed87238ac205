"""Weights whose matrices are all rows by columns ``[out, in]``, also those of Conv1D, which are stored turned over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import StoredTensor
from .writer import Floats, Weights

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["LinearWeights"]


class LinearWeights(Weights):
    """:class:`edgestill.export.writer.Weights` as linear layers have them, whatever the folder's convention is.

    What is written from them is mapped back by :meth:`mapped`.
    """

    def __init__(self, model: ModelFolder) -> None:
        super().__init__(model.path)
        self._turned = model.turned

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter as a linear layer has it."""
        shape = super().shape(name)
        return shape[::-1] if name in self._turned else shape

    def __getitem__(self, name: str) -> Floats:
        """The parameter as float32, contiguous, ``[out, in]``."""
        array = super().__getitem__(name)
        return np.ascontiguousarray(array.T) if name in self._turned else array

    def mapped(self, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
        """The weight map with one more step for turned parameters, to the shape that the folder has."""
        return [
            dataclasses.replace(tensor, layout=(*tensor.layout, ("transpose",))) if tensor.name in self._turned
            else tensor
            for tensor in tensors
        ]  # fmt: skip
