"""Inner values of a graph: what numpy computes, also of weights beside the graph and of a cache in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgestill.artifact import Artifact, open_artifact
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.exposed import exposed_values

IDS = np.array([[5, 9, 2], [7, 7, 1]], np.int64)
MASK = np.ones_like(IDS)


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = ExportConfig(to="onnx:fp32", kv_cache="fp16")
    return export(tiny_llama, tmp_path_factory.mktemp("exposed") / "a", config)


def test_the_first_value_is_the_embeddings_rows(artifact: Artifact, tiny_llama: Path) -> None:
    from safetensors.numpy import load_file

    table = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    values = exposed_values(artifact, IDS, MASK)
    assert any(value.shape == (2, 3, 64) and np.array_equal(value, table[IDS]) for value in values.values())
    assert values["logits"].shape == (2, 3, len(table))


def test_only_what_is_wanted_comes_back_and_weights_may_lie_beside(artifact: Artifact, tmp_path: Path) -> None:
    whole = exposed_values(artifact, IDS, MASK)
    name = next(name for name, value in whole.items() if value.ndim == 3 and value.dtype == np.float32)
    model = onnx.load(artifact.entry)
    folder = tmp_path / "b"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    found = exposed_values(Artifact(folder, artifact.manifest), IDS, MASK, [name], threads=1)
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name], whole[name])
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_weights_outside_the_folder_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    model = onnx.load(artifact.entry)
    folder = tmp_path / "b"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="unsafe path"):
        exposed_values(Artifact(folder, artifact.manifest), IDS, MASK)


def test_a_value_that_is_not_there_is_one_line(artifact: Artifact) -> None:
    with pytest.raises(BadInput, match="inner values can't be read") as caught:
        exposed_values(open_artifact(artifact.path), IDS, MASK, ["no such value"])
    assert "\n" not in caught.value.message
