"""The streaming ONNX writer against onnx's own serialisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgestill.export.onnx_file import Spool


def _shell() -> onnx.ModelProto:
    infos = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [3])] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", *infos)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("external_bytes", [10**9, 0])
def test_tensors_come_back(external_bytes: int, tmp_path: Path) -> None:
    arrays = {
        "w": np.array([1, 2, 3], np.float32), "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "turned": np.arange(3000).astype(np.int8).reshape(30, 100).T, "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.uint8),
    }  # fmt: skip
    spool = Spool(tmp_path)
    for name, array in arrays.items():
        spool.add(name, array)
    spool.write(_shell(), tmp_path / "model.onnx", external_bytes=external_bytes)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (tmp_path / "model.onnx.data").exists() == (external_bytes == 0)
    for tensor in model.graph.initializer:
        got = numpy_helper.to_array(tensor)
        assert got.dtype == arrays[tensor.name].dtype
        np.testing.assert_array_equal(got, arrays[tensor.name])
    assert [tensor.name for tensor in model.graph.initializer] == list(arrays)


def test_constants_are_kept_once_and_names_are_used_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.constant(np.array([1, 2])) == spool.constant(np.array([1, 2]))
    assert spool.constant(np.array([1, 2])) != spool.constant(np.array([[1, 2]]))
    spool.add("w", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="twice"):
        spool.add("w", np.zeros(3, np.float32))
    spool.close()
    assert not list(tmp_path.iterdir())


def test_a_tensor_comes_in_pieces_and_must_be_complete(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    spool.stream("w", np.float32, (4, 3), (whole[at : at + 3] for at in (0, 3)))
    with pytest.raises(ValueError, match="came as 24 bytes, 48 are"):
        spool.stream("short", np.float32, (4, 3), [whole[:2]])
    spool.write(_shell(), tmp_path / "model.onnx")
    (tensor,) = onnx.load(tmp_path / "model.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), whole)
