"""ONNX's side of the allocation: codes of four and eight bits in blocks of a row, or float32.

The graph of a mixed choice has other nodes than a plain one (queries, keys and values of one type are one product), so
a size is learnt by drawing the graph with weights that are not read and codes that are not searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..grids import Affine, dequantise_affine
from ..quantisation_onnx import parse
from .allocate_space import Chosen, Tensor, for_two_uses
from .compensate import DAMPING
from .onnx import draw
from .onnx_compensation import fit, in_half
from .onnx_file import Ledger
from .onnx_graph import Graph, Kind
from .onnx_schemes import scheme_of
from .turned import LinearWeights
from .writer import context_length

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["OnnxSpace"]

Floats = npt.NDArray[np.float32]

_FLOAT = "fp32"
# Rising in size. Eight bits round to nearest: there is nothing to make up for.
_TYPES = ("int4-b128-gptq", "int4-b64-gptq", "int4-b32-gptq", "int4-b16-gptq", "int8-b128-sym", "int8-b32-sym", _FLOAT)


class OnnxSpace:
    """The matrices of ``model`` that its graph multiplies by or looks up."""

    recipe = "onnx-blocks-1"
    how = "4 bits rounded with compensation"

    def __init__(self, model: ModelFolder, config: ExportConfig) -> None:
        self._model, self._config, self._moments = model, config, _Known({})
        self._length = context_length(model, config)
        self._weights = _Unread(model)
        self._kinds = scheme_of(parse(_FLOAT), model.task, {name: name for name in _TYPES}).types
        graph, _ = self._drawn({})
        names = dict.fromkeys(tensor.name for tensor in graph.tensors if tensor.scales is not None)
        self.tensors = [Tensor(name, self._weights.shape(name), self._able(name)) for name in names]

    def _able(self, name: str) -> tuple[str, ...]:
        """Types whose blocks divide the rows, and those with blocks of 32, of which the last is filled up."""
        width = self._weights.shape(name)[1]
        return tuple(type_ for type_, kind in self._kinds.items() if kind.block_of(width) == kind.block)

    def learn(self, moments: Mapping[str, Floats]) -> None:
        """See :class:`.allocate_space.Space`."""
        tied = self._model.embeddings_path
        self._moments = _Known(
            {name: for_two_uses(each, DAMPING) if name == tied else each for name, each in moments.items()}
        )

    def size_bytes(self, tensor: Tensor, type_: str) -> int:
        """See :class:`.allocate_space.Space`: codes, scales and packed zero points."""
        kind, (rows, width) = self._kinds[type_], tensor.shape
        if kind.way == "float":
            return 4 * rows * width
        blocks = -(-width // kind.block)
        scale = 2 if in_half(self._weights.peak(tensor.name), kind) else 4
        middles = 0 if kind.symmetric else rows * -(-blocks * kind.bits // 8)
        return rows * blocks * kind.block * kind.bits // 8 + rows * blocks * scale + middles

    def decoded(self, tensor: Tensor, type_: str, weight: Floats) -> Floats:
        """See :class:`.allocate_space.Space`."""
        kind, width = self._kinds[type_], tensor.shape[1]
        if kind.way == "float":
            return weight
        padded = np.pad(weight, ((0, 0), (0, -width % kind.block)))
        moment = self._moments.of(tensor.name) if kind.fit == "gptq" else None
        return np.ascontiguousarray(dequantise_affine(fit(padded, kind, kind.block, moment))[:, :width])

    def whole_bytes(self, types: Mapping[str, str]) -> int:
        """See :class:`.allocate_space.Space`."""
        return self._drawn(types)[1]

    def chosen(self, types: Mapping[str, str], note: str) -> Chosen:
        """See :class:`.allocate_space.Space`."""
        return Chosen(types, f"onnx:{_FLOAT}", note, {"moments": self._moments})

    def _drawn(self, types: Mapping[str, str]) -> tuple[Graph, int]:
        """A graph of these types (of none: of ``int8``), and the bytes of its file."""
        spool = Ledger()
        scheme = scheme_of(parse(_FLOAT if types else "int8"), self._model.task, types)
        graph = _Sketch(self._weights, scheme, spool)
        shell, *_ = draw(graph, self._model, self._config, self._length)
        return graph, spool.file_bytes(shell)


class _Known:
    """Moments that were measured already, as the writer asks for them."""

    def __init__(self, moments: Mapping[str, Floats]) -> None:
        self._moments = moments

    def of(self, name: str) -> Floats | None:
        """See :class:`.onnx_graph.InputMoments`."""
        return self._moments.get(name)


class _Unread(LinearWeights):
    """Weights of the right shapes and largest magnitudes, which is all that a size depends on."""

    def __init__(self, model: ModelFolder) -> None:
        super().__init__(model)
        self._read = LinearWeights(model)
        self._peaks: dict[str, float] = {}

    def peak(self, name: str) -> float:
        """The largest magnitude of a parameter; read once."""
        if name not in self._peaks:
            parts = self._read.pieces(name)
            self._peaks[name] = max((float(np.abs(part).max(initial=0.0)) for part in parts), default=0.0)
        return self._peaks[name]

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Floats:
        """Rows that are alike and take no memory, of a matrix; what is small is read."""
        shape = self.shape(name)
        if len(shape) != 2:
            return self._read.rows(name, begin, end)
        count = len(range(shape[0])[begin:end])
        return np.broadcast_to(np.float32(self.peak(name)), (count, shape[1]))


class _Sketch(Graph):
    """A graph whose codes are not searched."""

    weights: _Unread

    def quantised(self, names: Sequence[str], kind: Kind, block: int, moment: Floats | None) -> Iterator[Affine]:
        """Codes of the right shape; scales that float16 holds where the real ones would be such."""
        rows, width = sum(self.weights.shape(name)[0] for name in names), self.weights.shape(names[0])[1]
        blocks = -(-width // block)
        half = kind.half_scales and in_half(max(map(self.weights.peak, names)), kind)
        zero = np.uint8(0)
        yield Affine(
            np.broadcast_to(zero, (rows, blocks * block)),
            np.full((rows, blocks), 1 if half else 1 / 3, np.float32),
            np.broadcast_to(zero, (rows, blocks)),
            kind.bits,
            block,
        )
