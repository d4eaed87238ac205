"""The lean ONNX reader against onnx's own loader, and against broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgestill.errors import BadInput
from edgestill.runtimes.onnx_reader import OnnxFile


@pytest.fixture
def model() -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(np.arange(3000, dtype=np.float32).reshape(30, 100), "w"),
        numpy_helper.from_array(np.array(7, np.int64), "scalar"),
        helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.5, -2.5]),  # not raw: as other tools write it
    ]
    infos = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [3])] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *infos, initializer=weights)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("external", [False, True])
def test_same_as_onnx(external: bool, model: onnx.ModelProto, tmp_path: Path) -> None:
    want = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=external, location="m.data", size_threshold=100)
    file = OnnxFile(tmp_path / "m.onnx")
    assert [node.op_type for node in file.graph.node] == ["Identity"]
    assert not file.graph.initializer
    assert (tmp_path / "m.data").exists() == external
    assert set(file.tensors) == set(want)
    for name, array in want.items():
        assert file.array(name).dtype == array.dtype
        np.testing.assert_array_equal(file.array(name), array)


def test_every_truncation_is_bad_input(model: onnx.ModelProto, tmp_path: Path) -> None:
    raw = model.SerializeToString()
    path = tmp_path / "m.onnx"
    for length in [*range(0, 200, 3), *range(200, len(raw) - 16, 997)]:
        path.write_bytes(raw[:length])
        with pytest.raises(BadInput, match="not a whole ONNX file"):
            OnnxFile(path)


def test_flipped_bytes_never_raise_anything_else(model: onnx.ModelProto, tmp_path: Path) -> None:
    raw = bytearray(model.SerializeToString())
    random = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    refused = 0
    for _ in range(400):
        broken = bytearray(raw)
        heads = [*range(120), *range(len(raw) - 200, len(raw))]  # where lengths and types stand
        for place in random.choice(heads, 3):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        try:
            file = OnnxFile(path)
            for name in file.tensors:
                file.array(name)
        except BadInput:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd"])
def test_external_data_stays_in_its_folder(location: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "12000"}.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "secret.data").write_bytes(bytes(12000))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="unsafe path"):
        OnnxFile(tmp_path / "inside" / "m.onnx")


def test_a_missing_tensor_is_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="no tensor 'nothing'"):
        OnnxFile(tmp_path / "m.onnx").array("nothing")
