"""What genai_config.json says; that onnxruntime-genai opens an artifact by it stands among the peers (slow)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgestill.artifact import open_artifact
from edgestill.errors import UsageError
from edgestill.export import export
from edgestill.export.genai_config import GENAI_FILE
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gemma3", "tiny_gpt2"])
def test_it_names_what_the_graph_has_and_is_hashed(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = export(request.getfixturevalue(fixture), tmp_path / "a", ExportConfig(to="onnx:fp32", context_length=64))
    found = json.loads((artifact.path / GENAI_FILE).read_text())
    decoder = found["model"]["decoder"]
    graph = onnx.load(artifact.path / decoder["filename"]).graph
    inputs = {item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in graph.input}
    named = {decoder["inputs"]["input_ids"], decoder["inputs"]["attention_mask"]}
    for layer in range(decoder["num_hidden_layers"]):
        for key in ("past_key_names", "past_value_names"):
            name = decoder["inputs"][key] % layer
            assert inputs[name][1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
            named.add(name)
    assert named == set(inputs)
    outputs = {decoder["outputs"][key] % n for key in ("present_key_names", "present_value_names")
               for n in range(decoder["num_hidden_layers"])}  # fmt: skip
    assert outputs | {decoder["outputs"]["logits"]} == {item.name for item in graph.output}
    assert found["model"]["context_length"] == found["search"]["max_length"] == artifact.manifest.max_length == 64
    assert (found["model"]["bos_token_id"], found["model"]["eos_token_id"]) == (0, 2)
    assert GENAI_FILE in {entry.path for entry in artifact.manifest.files}
    (artifact.path / GENAI_FILE).write_text("{}")
    with pytest.raises(Exception, match=GENAI_FILE):
        open_artifact(artifact.path)


def test_a_cache_that_grows_is_not_shared(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = export(tiny_llama, tmp_path / "a", ExportConfig(to="onnx:fp32-portable"))
    assert not json.loads((artifact.path / GENAI_FILE).read_text())["search"]["past_present_share_buffer"]


def test_an_encoder_has_none(tiny_bert: Path, tmp_path: Path) -> None:
    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    assert not (artifact.path / GENAI_FILE).exists()
    with pytest.raises(UsageError, match="kv_cache of a feature-extraction model"):
        export(tiny_bert, tmp_path / "b", ExportConfig(to="onnx:fp32", kv_cache="fp16"))


def test_the_generation_config_goes_before_the_config(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    artifact = export(folder, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    assert json.loads((artifact.path / GENAI_FILE).read_text())["model"]["eos_token_id"] == [2, 1]


@pytest.mark.parametrize("to", ["onnx:fp32", "onnx:int8", "onnx:fp32-portable"])
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gemma3", "tiny_gpt2"])
def test_a_half_cache_takes_half_the_bytes(
    fixture: str, to: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    plain = export(folder, tmp_path / "a", ExportConfig(to=to))
    half = export(folder, tmp_path / "b", ExportConfig(to=to, kv_cache="fp16"))
    assert plain.manifest.kv_cache_bytes_per_token == 2 * (half.manifest.kv_cache_bytes_per_token or 0)
    past = [spec for spec in half.manifest.inputs if spec.name.startswith("past")]
    assert {spec.dtype for spec in past} == {"float16"}
    per_token = sum(spec.shape[1] * spec.shape[3] * 2 for spec in past)  # type: ignore[operator]
    assert half.manifest.kv_cache_bytes_per_token == per_token
    assert "fp16 key/value cache" in half.manifest.contents
    ids = np.random.default_rng(0).integers(3, 300, (1, 30))
    got, want = (OrtSession(artifact, SessionOptions(threads=1)).forward(ids, np.ones_like(ids))
                 for artifact in (half, plain))  # fmt: skip
    assert (got != want).any()
    # Codes of int8 activations fall the other way by the last bits of a key.
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > (0.995 if "int8" in to else 0.99999)


def test_other_caches_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="int8 cache needs scales"):
        ExportConfig(to="onnx:fp32", kv_cache="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gguf's cache is not part of its file"):
        ExportConfig(to="gguf:f16", kv_cache="fp16")
