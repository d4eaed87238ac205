"""Exact int8 sums where answers count, and the way around the runtime's defect with shared constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import open_artifact
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.precision import PRECISE, scoring_options, scoring_protocol
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.unshared import external_folder, unshared_graph


@pytest.fixture(scope="session")
def artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose int8 weights share a zero point."""
    out = tmp_path_factory.mktemp("precision") / "int8"
    return export(tiny_bert, out, ExportConfig(to="onnx:int8-dynamic-per-channel")).path


def test_only_onnx_gets_the_option(artifact: Path, tiny_bert: Path) -> None:
    assert scoring_options(artifact, 1) == SessionOptions(1, None, {PRECISE: "1"})
    assert scoring_options(tiny_bert, 3, "x") == SessionOptions(3, "x")
    assert PRECISE in scoring_protocol("onnxruntime")["int8_sums"]
    assert scoring_protocol("torch") == {}


def test_every_node_gets_its_own_constants_and_says_the_same(artifact: Path) -> None:
    import onnx
    import onnxruntime

    opened = open_artifact(artifact)
    graph = unshared_graph(opened)
    model = onnx.load_from_string(graph)
    integers = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    read = [name for node in model.graph.node for name in node.input if name in integers]
    assert len(read) == len(set(read)) > 4
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*external_folder(opened))
    ids = np.arange(8, dtype=np.int64).reshape(1, 8) + 5
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = {item.name: item.type for item in session.get_inputs()}
    feed = {name: (ids if name == "input_ids" else np.ones_like(ids) * (name == "attention_mask")).astype(
        np.int32 if "int32" in kind else np.int64) for name, kind in names.items()}  # fmt: skip
    said = session.run(None, feed)[0]
    whole = OrtSession(opened, scoring_options(artifact, 1))
    original = whole._session.run(None, feed)[0]
    np.testing.assert_array_equal(said, original)
