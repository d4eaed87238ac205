"""What is in an ONNX artifact: its description, its files, their determinism."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, open_artifact
from edgestill.checkpoints import open_model
from edgestill.errors import BadInput, ResourceExhausted, UsageError
from edgestill.export import export, writer
from edgestill.export.onnx import write
from edgestill.export.source import Source
from edgestill.files import hash_file
from edgestill.quantisation import QUANTISATIONS
from edgestill.recipe import ExportConfig
from edgestill.runtimes.onnx_reader import OnnxFile
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.payload_onnx import histogram
from edgestill.runtimes.session import SessionOptions


def _export(folder: Path, out: Path, quantisation: str = "fp32", **more: int) -> Artifact:
    return export(folder, out, ExportConfig(to=f"onnx:{quantisation}", **more))


@pytest.mark.parametrize("quantisation", QUANTISATIONS["onnx"])
def test_two_folders_give_the_same_bytes(quantisation: str, tiny_llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "elsewhere" / "another-name")
    first = _export(tiny_llama, tmp_path / "a", quantisation)
    second = _export(other, tmp_path / "deep" / "b", quantisation)
    assert first.manifest.artifact_id == second.manifest.artifact_id
    raw = first.entry.read_bytes()
    assert not any(str(path).encode() in raw for path in (tmp_path, tiny_llama, Path.cwd()))


def test_manifest_of_a_decoder(tiny_llama: Path, tmp_path: Path) -> None:
    manifest = open_artifact(_export(tiny_llama, tmp_path / "a").path).manifest
    assert manifest.format == "onnx"
    assert manifest.task == "text-generation"
    assert manifest.kv_cache_bytes_per_token == 2 * 4 * 2 * 16 * 4  # key and value, layers, KV heads, head, float32
    assert [spec.name for spec in manifest.inputs][:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert manifest.outputs[0].shape == ("batch", "length", 320)
    assert manifest.lineage["model_id"] == open_model(tiny_llama).model_id
    assert {file.path for file in manifest.files} >= {"model.onnx", "tokenizer.json", "chat_template.jinja",
                                                      "config.json", "tensors.json"}  # fmt: skip


def test_manifest_of_an_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    manifest = _export(tiny_bert, tmp_path / "a").manifest
    assert (manifest.pooling, manifest.normalize, manifest.pooling_in_graph) == ("mean", True, True)
    assert [(spec.name, spec.shape) for spec in manifest.outputs] == [("sentence_embedding", ("batch", 32))]
    assert manifest.kv_cache_bytes_per_token is None


@pytest.mark.parametrize(("quantisation", "oldest"), [("fp16", "1.20"), ("int8", "1.23"), ("int8-dynamic", "1.23")])
def test_minimum_runtime(quantisation: str, oldest: str, tiny_bert: Path, tmp_path: Path) -> None:
    minimum = _export(tiny_bert, tmp_path / "a", quantisation).manifest.minimum_runtime
    assert minimum == {"onnxruntime": oldest, "opset": "18", "ir": "9"}


def test_labels_travel(tiny_classifier: Path, tmp_path: Path) -> None:
    assert _export(tiny_classifier, tmp_path / "a").manifest.labels == ("bad", "fair", "good")


def test_sizes_shrink_in_order(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = [_export(tiny_llama, tmp_path / q, q).model_bytes for q in ("fp32", "fp16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_external_data_above_a_limit(tiny_llama: Path, tmp_path: Path) -> None:
    """The same tensors in a file of their own, for models that protobuf can't hold, with the same result."""
    whole = _export(tiny_llama, tmp_path / "a", "int8")
    split = shutil.copytree(whole.path, tmp_path / "split")
    (split / "model.onnx").unlink()
    write(Source(open_model(tiny_llama)), split, ExportConfig(to="onnx:int8"), external_bytes=1000)
    assert (split / "model.onnx.data").stat().st_size > 100_000
    assert (split / "model.onnx").stat().st_size < 60_000
    assert histogram(OnnxFile(split / "model.onnx")) == whole.manifest.dtype_histogram
    ids = np.arange(5, 15)[None]
    results = [
        OrtSession(Artifact(path, whole.manifest), SessionOptions(threads=1)).forward(ids, np.ones_like(ids))
        for path in (whole.path, split)
    ]
    np.testing.assert_array_equal(*results)


def test_context_length(tiny_llama: Path, tmp_path: Path) -> None:
    short = _export(tiny_llama, tmp_path / "a", context_length=32)
    assert short.manifest.max_length == 32
    ids = np.full((1, 33), 5)
    with pytest.raises(BadInput, match="33 tokens"):
        OrtSession(short, SessionOptions(threads=1)).forward(ids, np.ones_like(ids))
    with pytest.raises(UsageError, match="context_length 999"):
        _export(tiny_llama, tmp_path / "b", context_length=999)


def test_a_full_disk_is_said_before_the_work(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ResourceExhausted, match="MB are free"):
        _export(tiny_llama, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failed_export_leaves_what_was_there(tiny_llama: Path, tmp_path: Path) -> None:
    before = hash_file(_export(tiny_llama, tmp_path / "a").entry)
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        _export(broken, tmp_path / "a")
    assert hash_file(tmp_path / "a" / "model.onnx") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "broken"]


def test_file_is_valid_onnx_without_tool_traces(tiny_bert: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(_export(tiny_bert, tmp_path / "a", "int4").entry)
    assert model.producer_name == "edgestill"
    assert not model.metadata_props
    assert not model.doc_string
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18, "com.microsoft": 1}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
