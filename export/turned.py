"""Weights whose matrices are all rows by columns ``[out, in]``, also those of Conv1D, which are stored turned over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import StoredTensor
from .writer import PIECE_VALUES, Floats, Weights

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

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Floats:
        """Rows ``begin:end`` of ``[out, in]`` as float32, contiguous; of a turned parameter all are read."""
        if name not in self._turned:
            return super().rows(name, begin, end)
        return np.ascontiguousarray(super().rows(name).T[begin:end])

    def pieces(self, name: str, values: int = PIECE_VALUES) -> Iterator[Floats]:
        """A turned parameter comes whole: it is a matrix of a layer, no table."""
        if name in self._turned:
            yield self.rows(name)
        else:
            yield from super().pieces(name, values)

    def mapped(self, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
        """The weight map with one more step for turned parameters, to the shape that the folder has."""
        return [
            dataclasses.replace(tensor, layout=(*tensor.layout, ("transpose",))) if tensor.name in self._turned
            else tensor
            for tensor in tensors
        ]  # fmt: skip
