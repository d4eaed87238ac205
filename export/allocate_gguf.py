"""GGUF's side of the allocation: GGML's types, rounded with compensation."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..grids import dequantise, ggml_grid, ggml_size, quantise
from ..progress import silent
from ..quantisation_gguf import FILE_TYPES
from .allocate_space import Chosen, Tensor
from .compensate import DAMPING, Prepared, prepare
from .compensate_ggml import encode_ggml, layout_of
from .gguf_layout import place
from .writer import Weights

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["GgufSpace"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 32
_FLOAT = "f16"
# Rising in size; where two have the same size, the better one.
_OF_32 = ("iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", _FLOAT)
_OF_256 = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q4_1", "q5_k", "q6_k", "q8_0", _FLOAT)
# An output layer that is the embedding too is also looked up: less is compensated, for what is right for one use is an
# error for the other. Of 0.01, 0.1 and 1, 0.1 was best on SmolLM2 (0.0112, 0.0101 and 0.0108 nats in Q5_0).
_TIED_DAMPING = 0.1


class GgufSpace:
    """The matrices of ``model`` whose rows are whole blocks. ``moments`` are those of the inputs of each, by parameter
    (:mod:`.moments`); a matrix that is in no product, such as an embedding that is only looked up, has none."""

    recipe = "ggml-compensated-1"

    def __init__(self, model: ModelFolder, config: ExportConfig, moments: Mapping[str, Floats]) -> None:
        self._model, self._config, self._moments = model, config, moments
        weights = Weights(model.path)
        self._placed = place(model, {name: weights.shape(name) for name in weights})
        self.tensors = [
            Tensor(item.name, item.shape, _OF_256 if item.shape[-1] % 256 == 0 else _OF_32)
            for item in self._placed
            if item.is_matrix and len(item.shape) == 2 and item.shape[-1] % 32 == 0 and not item.skip_rows
        ]
        self._prepared: tuple[tuple[str, int], Prepared] | None = None

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
            damping = _TIED_DAMPING if name == self._model.embeddings_path else DAMPING
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
        return Chosen(types, self.encode, f"gguf:{base}", note)

    def overhead_bytes(self) -> int:
        """See :class:`.allocate_space.Space`: measured on a file in float16, which takes no quantising."""
        from . import gguf

        plain = self._config.model_copy(update={"to": f"gguf:{_FLOAT}"})
        with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
            draft = gguf.write(self._model, Path(scratch), plain, (), silent)
            whole = (Path(scratch) / draft.entry).stat().st_size
        return whole - sum(_aligned(prod(tensor.shape) * ggml_grid(_FLOAT).size_bytes) for tensor in self.tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
