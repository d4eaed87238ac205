"""Large tables go through the ONNX writer some rows at a time: the codes are those of the whole, memory is not."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.errors import BadInput, Unsupported
from edgestill.export.onnx_compensation import fit
from edgestill.export.onnx_file import Spool
from edgestill.export.onnx_graph import Graph, pack_bits
from edgestill.export.onnx_schemes import Scheme, scheme_of
from edgestill.export.writer import PIECE_VALUES, Weights
from edgestill.grids import quantise_affine
from edgestill.quantisation_onnx import parse

SHAPE = (40_000, 72)  # eleven pieces, and rows that blocks of 32 do not divide


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose only parameter is one table of 11.5 MB."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    save_file({"table": random.normal(size=SHAPE).astype(np.float32)}, folder / "model.safetensors")
    return folder


def _graph(folder: Path, out: Path, scheme: Scheme) -> Graph:
    return Graph(Weights(folder), scheme, Spool(out))


def _stored(graph: Graph) -> dict[str, np.ndarray[Any, Any]]:
    spool = graph._spool
    spool._stream.flush()
    raw = spool._path.read_bytes()
    return {
        name: np.frombuffer(raw, entry.dtype, int(np.prod(entry.shape)), entry.offset).reshape(entry.shape)
        for name, entry in spool._entries.items()
    }


@pytest.mark.parametrize("name", ["int8", "int4-pure", "int4-b16-sym-pure", "int8-b128-asym"])
def test_codes_of_pieces_are_those_of_the_whole_table(name: str, table: Path, tmp_path: Path) -> None:
    assert SHAPE[0] * SHAPE[1] > 10 * PIECE_VALUES
    scheme = scheme_of(parse(name), "text-generation")
    kind = scheme.kind("embedding", "table")
    graph = _graph(table, tmp_path, scheme)
    graph.embed("ids", "table")
    stored = _stored(graph)
    (tensor,) = graph.tensors
    block = kind.block_of(SHAPE[1])
    whole = np.pad(graph.weights["table"], ((0, 0), (0, -SHAPE[1] % block)))
    grid = (
        fit(whole, kind, block, None) if kind.half_scales
        else quantise_affine(whole, bits=kind.bits, block=block, symmetric=kind.symmetric)
    )  # fmt: skip
    codes = pack_bits(grid.codes.reshape(SHAPE[0], -1, block), kind.bits)
    np.testing.assert_array_equal(stored[tensor.stored], codes)
    np.testing.assert_array_equal(stored[tensor.scales or ""].astype(np.float32), grid.scales)
    if tensor.zero_points:
        np.testing.assert_array_equal(stored[tensor.zero_points], pack_bits(grid.zero_points, kind.bits))
    else:
        assert kind.symmetric


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4-pure", "int4-b32-pure"])
def test_memory_follows_a_piece_and_not_the_table(name: str, table: Path, tmp_path: Path) -> None:
    graph = _graph(table, tmp_path, scheme_of(parse(name), "text-generation"))
    tracemalloc.start()
    try:
        graph.embed("ids", "table")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    codes = 1 << 20 if name in ("fp32", "fp16") else 3 << 20  # scales and zero points of all rows are kept to the end
    assert peak < 8 * 4 * PIECE_VALUES + codes
    assert peak < 4 * SHAPE[0] * SHAPE[1]


def test_a_float_matrix_is_turned_piece_by_piece(table: Path, tmp_path: Path) -> None:
    graph = _graph(table, tmp_path, scheme_of(parse("fp16"), "text-generation"))
    tracemalloc.start()
    try:
        graph.linear("x", ["table"], role="head")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * 4 * SHAPE[0] * SHAPE[1]
    np.testing.assert_array_equal(_stored(graph)["table"], graph.weights["table"].T.astype(np.float16))


def test_a_weight_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"table": np.full((4, 32), 70_000, np.float32)}, tmp_path / "model.safetensors")
    graph = _graph(tmp_path, tmp_path, scheme_of(parse("fp16"), "text-generation"))
    with pytest.raises(Unsupported, match="table holds weights too large for fp16"):
        graph.embed("ids", "table")
    with pytest.raises(Unsupported, match="table holds weights too large for fp16"):
        graph.linear("x", ["table"], role="head")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(value: float, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    array = np.zeros((4, 32), np.float32)
    array[2, 5] = value
    save_file({"table": array}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert weights.rows("table", 0, 2).shape == (2, 32)
    with pytest.raises(BadInput, match="table holds NaN or infinite weights"):
        weights["table"]
