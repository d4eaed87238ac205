"""Would a model of uint8 activations and int8 weights overflow on a processor that adds its products in 16 bits?

x86 processors without VNNI multiply uint8 activations by int8 weights with VPMADDUBSW: two neighbouring products are
added and *saturated* to int16. 255 * 127 * 2 does not fit, so sums are cut, silently, and only on such machines. This
check does not depend on the machine that it runs on: it takes the real quantised activations of a model and redoes the
pairs with numpy. Source: ONNX Runtime, "Quantize ONNX models" (U8S8, reduce_range); Intel SDM, VPMADDUBSW.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from .exposed import exposed_values
from .onnx_reader import OnnxFile, graph_path
from .session import Ints

__all__ = ["Saturation", "pair_saturation", "saturation"]

_LOW, _HIGH = -(1 << 15), (1 << 15) - 1
_ROWS = 24  # activations taken of each node: enough to see outliers, little enough for a model of 200 nodes
_COLUMNS, _PAIRS = 4096, 1 << 16  # taken at a time, to bound memory


@dataclass(frozen=True)
class Saturation:
    """``fraction`` of all pairs of products that saturate (exactly 0 for a safe model), ``worst_node`` by
    ``relative_error``: the norm of what saturation changes over the norm of the node's exact result. ``nodes``
    products were looked at, each with ``rows`` activation rows at most."""

    fraction: float
    worst_node: str
    relative_error: float
    nodes: int
    rows: int = _ROWS


def pair_saturation(
    levels: npt.NDArray[np.uint8], zero_point: int, codes: npt.NDArray[np.int8]
) -> tuple[int, int, float]:
    """Saturating pairs, pairs, and relative error of ``(levels [M, K] - zero_point) @ codes [K, N]``.

    Pair ``k`` is ``levels[2k] * codes[2k] + levels[2k+1] * codes[2k+1]``, the zero point being subtracted afterwards,
    as MLAS does. A pair of weights that could not saturate with the activations' largest values is not computed.
    """
    if levels.shape[1] % 2:
        levels = np.pad(levels, ((0, 0), (0, 1)))
        codes = np.pad(codes, ((0, 1), (0, 0)))
    pairs = levels.shape[0] * codes.shape[0] // 2 * codes.shape[1]
    size = np.abs(codes.astype(np.int16))
    if int((size[0::2] + size[1::2]).max(initial=0)) * 255 <= _HIGH:  # no activation could saturate these weights
        return 0, pairs, 0.0
    saturating, exact_square, lost_square = 0, 0.0, 0.0
    for start in range(0, codes.shape[1], _COLUMNS):
        count, lost, whole = _columns(levels.astype(np.int32), zero_point, codes[:, start : start + _COLUMNS])
        saturating, lost_square, exact_square = saturating + count, lost_square + lost, exact_square + whole
    return saturating, pairs, float(np.sqrt(lost_square / exact_square)) if exact_square else 0.0


def _columns(a: npt.NDArray[np.int32], zero_point: int, codes: npt.NDArray[np.int8]) -> tuple[int, float, float]:
    """For some columns: saturating pairs, squared norm of what is lost, squared norm of the exact result."""
    b = codes.astype(np.int32)
    most = a.max(axis=0, initial=0)[:, None]
    positive, negative = most * np.maximum(b, 0), most * np.minimum(b, 0)
    possible = (positive[0::2] + positive[1::2] > _HIGH) | (negative[0::2] + negative[1::2] < _LOW)
    exact = (a - zero_point).astype(np.float32) @ b.astype(np.float32)  # float is enough for a norm
    lost = np.zeros(exact.shape, np.float64)
    count = 0
    pair, column = np.nonzero(possible)
    for start in range(0, len(pair), _PAIRS):
        p, c = pair[start : start + _PAIRS], column[start : start + _PAIRS]
        sums = a[:, 2 * p] * b[2 * p, c] + a[:, 2 * p + 1] * b[2 * p + 1, c]
        row, at = np.nonzero((sums > _HIGH) | (sums < _LOW))
        count += len(row)
        np.add.at(lost, (row, c[at]), np.clip(sums[row, at], _LOW, _HIGH) - sums[row, at])
    return count, float(np.square(lost).sum()), float(np.square(exact.astype(np.float64)).sum())


@dataclass(frozen=True)
class _Product:
    """uint8 ``levels`` times int8 ``codes``, all by their names in the graph."""

    name: str
    levels: str
    zero: str
    codes: str


def _products(file: OnnxFile) -> list[_Product]:
    """MatMulIntegers, and MatMuls between a QuantizeLinear - DequantizeLinear pair and dequantised weights, which
    ONNX Runtime computes as such."""
    made = {name: node for node in file.graph.node for name in node.output}
    found = []
    for node in file.graph.node:
        if node.op_type == "MatMulInteger":
            found.append(_Product(node.name, node.input[0], node.input[2], node.input[1]))
        elif node.op_type == "MatMul":
            x, weight = made.get(node.input[0]), made.get(node.input[1])
            if x is None or weight is None or {x.op_type, weight.op_type} != {"DequantizeLinear"}:
                continue
            tensor = file.tensors.get(weight.input[0])
            if tensor is not None and tensor.dtype == np.int8 and len(x.input) > 2:
                found.append(_Product(node.name, x.input[0], x.input[2], weight.input[0]))
    return found


def saturation(artifact: Artifact, ids: Ints, attention_mask: Ints) -> Saturation | None:
    """Run ``ids [B, T]`` (right padding) through the artifact and redo each of its uint8 by int8 products in 16-bit
    pairs.

    Returns ``None`` for an artifact without such products. Raises :class:`BadInput` for a damaged file,
    :class:`MissingDependency` without onnx or onnxruntime.
    """
    file = OnnxFile(graph_path(artifact))
    nodes = _products(file)
    if not nodes:
        return None
    inside = (name for node in nodes for name in (node.levels, node.zero) if name not in file.tensors)
    wanted = list(dict.fromkeys(inside))
    found = exposed_values(artifact, ids, attention_mask, wanted)
    real = np.flatnonzero(attention_mask.reshape(-1))
    rows = real[np.linspace(0, len(real) - 1, min(_ROWS, len(real))).astype(int)]
    saturating = pairs = 0
    worst, worst_error = nodes[0].name, -1.0
    for node in nodes:
        levels = found[node.levels].reshape(-1, found[node.levels].shape[-1])
        if len(levels) == attention_mask.size:
            levels = levels[rows]
        zero = found[node.zero] if node.zero in found else file.array(node.zero)
        codes = np.asarray(file.array(node.codes), np.int8)
        count, total, error = pair_saturation(levels, int(zero.reshape(())), codes)
        saturating, pairs = saturating + count, pairs + total
        if error > worst_error:
            worst, worst_error = node.name, error
    return Saturation(saturating / pairs, worst, worst_error, len(nodes), len(rows))
