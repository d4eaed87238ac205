"""GGUF's side of the allocation: GGML's types, rounded with compensation."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..grids import dequantise, ggml_grid, ggml_size, quantise
from ..progress import silent
from ..quantisation_gguf import FILE_TYPES
from .allocate_space import TIED_DAMPING, Chosen, Tensor
from .compensate import DAMPING, Prepared, prepare
from .compensate_ggml import encode_ggml, layout_of
from .gguf_layout import place
from .writer import Weights

if TYPE_CHECKING:
    from ..recipe import ExportConfig
    from .source import Source

__all__ = ["GgufSpace"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 32
_FLOAT = "f16"
# Rising in size; where two have the same size, the better one.
_OF_32 = ("iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", _FLOAT)
_OF_256 = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q4_1", "q5_k", "q6_k", "q8_0", _FLOAT)


class GgufSpace:
    """The matrices of a model whose rows are whole blocks."""

    recipe = "ggml-compensated-1"
    how = "rounded with compensation"

    def __init__(self, source: Source, config: ExportConfig) -> None:
        self._source, self._config = source, config
        model = source.folder
        self._moments: Mapping[str, Floats] = {}
        weights = Weights(model.path)
        self._placed = place(model, {name: weights.shape(name) for name in weights})
        self.tensors = [
            Tensor(item.name, item.stored_shape, _OF_256 if item.stored_shape[-1] % 256 == 0 else _OF_32)
            for item in self._placed
            if item.is_matrix and len(item.shape) == 2 and item.stored_shape[-1] % 32 == 0 and not item.skip_rows
        ]
        self._prepared: tuple[tuple[str, int], Prepared] | None = None

    def learn(self, moments: Mapping[str, Floats]) -> None:
        """See :class:`.allocate_space.Space`."""
        self._moments = moments

    def size_bytes(self, tensor: Tensor, type_: str) -> int:
        """See :class:`.allocate_space.Space`."""
        return _aligned(ggml_size(type_, tensor.shape))

    def decoded(self, tensor: Tensor, type_: str, weight: Floats) -> Floats:
        """See :class:`.allocate_space.Space`."""
        return dequantise(type_, self.encode(tensor.name, type_, weight), weight.shape)

    def encode(self, name: str, type_: str, rows: Floats) -> Bytes:
        """Bytes of some rows of a parameter, whatever their order."""
        if type_ == _FLOAT:
            return quantise(_FLOAT, rows)
        key = (name, layout_of(type_).width)
        if self._prepared is None or self._prepared[0] != key:
            moment = self._moments.get(name)
            damping = TIED_DAMPING if name == self._source.folder.embeddings_path else DAMPING
            self._prepared = (key, prepare(np.eye(rows.shape[1]) if moment is None else moment, key[1], damping))
        return encode_ggml(type_, rows, self._prepared[1])

    def chosen(self, types: Mapping[str, str], note: str) -> Chosen:
        """See :class:`.allocate_space.Space`. The file's own type is the one that most bytes are of."""
        sizes: Counter[str] = Counter()
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        for name, type_ in types.items():
            sizes[type_] += ggml_size(type_, shapes[name])
        most = max(sizes, key=lambda type_: (sizes[type_], type_)) if sizes else _FLOAT
        base = next(name for name, kind in FILE_TYPES.items() if kind.grid == most and not kind.needs_importance)
        return Chosen(types, f"gguf:{base}", note, {"encode": self.encode})

    def whole_bytes(self, types: Mapping[str, str]) -> int:
        """See :class:`.allocate_space.Space`."""
        return self._overhead_bytes + sum(self.size_bytes(tensor, types[tensor.name]) for tensor in self.tensors)

    @cached_property
    def _overhead_bytes(self) -> int:
        """What no choice changes: measured on a file in float16, which takes no quantising."""
        from . import gguf

        plain = self._config.model_copy(update={"to": f"gguf:{_FLOAT}"})
        with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
            draft = gguf.write(self._source, Path(scratch), plain, (), silent)
            whole = (Path(scratch) / draft.entry).stat().st_size
        return whole - sum(_aligned(prod(tensor.shape) * ggml_grid(_FLOAT).size_bytes) for tensor in self.tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
