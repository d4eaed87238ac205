"""GGUF export of tiny models: weights, metadata and numbers, checked without the exporter's own tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgestill.artifact import Artifact
from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.grids import dequantise
from edgestill.recipe import ExportConfig
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.payload import open_payload

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

Export = Callable[[Path, str], Artifact]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export once per model and quantisation."""
    root, made = tmp_path_factory.mktemp("artifacts"), dict[tuple[Path, str], Artifact]()

    def get(model: Path, quantisation: str) -> Artifact:
        key = (model, quantisation)
        if key not in made:
            made[key] = export(model, root / f"{model.name}-{quantisation}", ExportConfig(to=f"gguf:{quantisation}"))
        return made[key]

    return get


def _metadata(artifact: Artifact) -> dict[str, object]:
    with GgufFile(artifact.entry) as file:
        return file.metadata


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_classifier"])
def test_every_weight_comes_back_bit_equal_from_f32(
    model: str, artifact_of: Export, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    artifact = artifact_of(folder, "f32")
    payload = open_payload(artifact)
    decoded = {tensor.name: payload.decode(tensor) for tensor in artifact.tensors()}
    truth = load_file(folder / "model.safetensors")
    assert decoded.keys() == truth.keys()
    for name, weight in truth.items():
        np.testing.assert_array_equal(decoded[name], weight, err_msg=name)


def test_rotary_rows_are_interleaved_in_the_file(tiny_llama: Path, artifact_of: Export) -> None:
    """Within a head of 16 rows, row i and row i + 8 become neighbours: a double loop says it."""
    weight = load_file(tiny_llama / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    with GgufFile(artifact_of(tiny_llama, "f32").entry) as file:
        stored = dequantise("f32", file.raw("blk.1.attn_k.weight"), (32, 64))
    for head in range(2):
        for i in range(8):
            np.testing.assert_array_equal(stored[head * 16 + 2 * i], weight[head * 16 + i])
            np.testing.assert_array_equal(stored[head * 16 + 2 * i + 1], weight[head * 16 + i + 8])


@pytest.mark.parametrize(("quantisation", "bound"), [("f16", 5e-4), ("q8_0", 8e-3), ("q4_k_m", 0.06), ("q4_0", 0.12)])
def test_quantised_weights_decode_close_to_the_float_ones(
    quantisation: str, bound: float, tiny_llama: Path, artifact_of: Export
) -> None:
    artifact = artifact_of(tiny_llama, quantisation)
    payload = open_payload(artifact)
    truth = load_file(tiny_llama / "model.safetensors")
    for tensor in artifact.tensors():
        weight = truth[tensor.name]
        error = np.linalg.norm(payload.decode(tensor) - weight) / np.linalg.norm(weight)
        assert error <= bound, tensor


def test_metadata_is_what_llama_cpp_reads(tiny_llama: Path, artifact_of: Export) -> None:
    artifact = artifact_of(tiny_llama, "f16")
    found = _metadata(artifact)
    expected = {
        "general.architecture": "llama", "general.license": "apache-2.0", "general.file_type": 1,
        "llama.block_count": 4, "llama.context_length": 128, "llama.embedding_length": 64,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert "im_start" in str(found["tokenizer.chat_template"])
    types = list(found["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    assert types[:3] == [3, 3, 3]  # control
    assert set(types[3:]) == {1}
    assert artifact.manifest.kv_cache_bytes_per_token == 2 * 4 * 2 * 16 * 2


def test_an_encoder_says_how_it_pools(tiny_bert: Path, tiny_classifier: Path, artifact_of: Export) -> None:
    found = _metadata(artifact_of(tiny_bert, "f16"))
    assert found["bert.pooling_type"] == 1
    assert found["bert.attention.causal"] is False
    assert found["tokenizer.ggml.model"] == "bert"
    heads = _metadata(artifact_of(tiny_classifier, "f16"))
    assert heads["bert.pooling_type"] == 4
    assert heads["bert.classifier.output_labels"] == ["bad", "fair", "good"]


def test_contents_say_what_fell_back(tiny_llama: Path, artifact_of: Export) -> None:
    """Rows of 64 and 128 are no whole K blocks, so nothing in this "Q4_K_M" is q4_k."""
    manifest = artifact_of(tiny_llama, "q4_k_m").manifest
    assert "q4_k" not in manifest.dtype_histogram
    assert manifest.contents.startswith("Q4_K_M: 38 tensors")
    assert "29 fell back" in manifest.contents
    assert "not divisible by 256" in manifest.contents
    assert sum(row.tensors for row in manifest.dtype_histogram.values()) == 38
    assert "fell back" not in artifact_of(tiny_llama, "q8_0").manifest.contents


def test_the_same_model_gives_the_same_bytes_from_any_folder(
    tiny_llama: Path, artifact_of: Export, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(tiny_llama, tmp_path / "another name")
    again = export(elsewhere, tmp_path / "out", ExportConfig(to="gguf:q8_0"))
    assert again.manifest.artifact_id == artifact_of(tiny_llama, "q8_0").manifest.artifact_id
    assert str(tmp_path).encode() not in again.entry.read_bytes()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def _changed(model: Path, target: Path, **config: object) -> Path:
    folder = shutil.copytree(model, target)
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


def test_what_llama_cpp_would_compute_wrongly_is_refused(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    relu = _changed(tiny_bert, tmp_path / "relu", hidden_act="relu")
    with pytest.raises(Unsupported, match="activation = 'relu'"):
        export(relu, tmp_path / "out", ExportConfig(to="gguf:f16"))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    scaled = _changed(tiny_llama, tmp_path / "dynamic", rope_parameters=rope)
    with pytest.raises(Unsupported, match="dynamic"):
        export(scaled, tmp_path / "out", ExportConfig(to="gguf:f16"))
    assert not (tmp_path / "out").exists()


def test_context_length_of_the_recipe_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = export(tiny_llama, tmp_path / "short", ExportConfig(to="gguf:f16", context_length=64))
    assert _metadata(artifact)["llama.context_length"] == 64
    assert artifact.manifest.max_length == 64
