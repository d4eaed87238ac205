"""Core ML export: what is in the package, bytes that repeat, numbers against torch for every architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.artifact import Artifact, open_artifact
from edgestill.checkpoints import load_torch, open_model
from edgestill.errors import EdgestillError, Unsupported, UsageError
from edgestill.export import coreml_convert, coreml_package, export
from edgestill.export.source import Source
from edgestill.export.writer import Weights
from edgestill.files import list_files
from edgestill.recipe import ExportConfig
from edgestill.runtimes.coreml_session import causal_mask
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import load_program
from edgestill.runtimes.payload import open_payload

RNG = np.random.default_rng(0)


def _saved(folder: Path, model: Any, package: Path) -> Interpreter:
    coreml_package.write_package(model, package, description="test", license=None)
    return Interpreter(load_program(package))


@pytest.fixture(scope="module")
def bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_bert, tmp_path_factory.mktemp("coreml") / "fp16", ExportConfig(to="coreml:fp16"))


@pytest.fixture(scope="module")
def short_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama's first layer."""
    folder = tmp_path_factory.mktemp("models") / "short-llama"
    shutil.copytree(tiny_llama, folder)
    model = load_torch(folder)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_int8(short_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = ExportConfig(to="coreml:int8", context_length=64)
    return export(short_llama, tmp_path_factory.mktemp("coreml") / "int8", config)


def test_encoder_artifact(bert: Artifact, tiny_bert: Path) -> None:
    manifest = open_artifact(bert.path).manifest
    assert manifest.entry == "model.mlpackage"
    assert manifest.minimum_runtime == {"ios": "16"}
    assert (manifest.shapes, manifest.max_length, manifest.pooling_in_graph) == ("dynamic", 64, True)
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    assert set(manifest.dtype_histogram) == {"float16"}
    program = load_program(bert.entry)
    assert program.opset == "CoreML6"
    assert {n: (t.dtype, t.shape) for n, t in program.inputs.items()} == {
        "input_ids": ("int32", (1, None)),
        "attention_mask": ("int32", (1, None)),
    }
    assert bert.model_bytes > 2 * open_model(tiny_bert).parameters
    assert (bert.path / "tokenizer.json").exists()


def test_every_weight_is_mapped_and_reads_back(bert: Artifact, tiny_bert: Path) -> None:
    weights, reader = Weights(tiny_bert), open_payload(bert)
    mapped = {tensor.name: tensor for tensor in bert.tensors()}
    assert set(mapped) == set(weights)
    for name, tensor in mapped.items():
        assert tensor.grid == "float16"
        want = weights[name].astype(np.float16).astype(np.float32)
        np.testing.assert_allclose(reader.decode(tensor), want, rtol=0, atol=2.0**-24, err_msg=name)
    assert reader.histogram() == dict(bert.manifest.dtype_histogram)


def test_two_exports_from_two_folders_are_equal(bert: Artifact, tiny_bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "somewhere else" / "model"
    shutil.copytree(tiny_bert, copy)
    again = export(copy, tmp_path / "out", ExportConfig(to="coreml:fp16"))
    assert again.manifest.artifact_id == bert.manifest.artifact_id
    for path in list_files(bert.path):
        assert (again.path / path).read_bytes() == (bert.path / path).read_bytes(), path


@pytest.mark.whole
def test_an_export_after_one_that_failed_is_equal(
    bert: Artifact, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools goes on with the numbers of a conversion that broke off; bytes must not depend on it."""

    def breaks_off(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr("coremltools.converters.mil.backend.mil.load.load", breaks_off)
        with pytest.raises(EdgestillError, match="broken off"):
            export(tiny_bert, tmp_path / "failed", ExportConfig(to="coreml:fp16"))
    again = export(tiny_bert, tmp_path / "again", ExportConfig(to="coreml:fp16"))
    assert again.manifest.artifact_id == bert.manifest.artifact_id


def test_package_names_no_place_and_no_date(bert: Artifact) -> None:
    text = (bert.entry / "Data/com.apple.CoreML/model.mlmodel").read_bytes()
    assert b"conversion_date" not in text
    for word in (str(bert.path).encode(), b"/tmp", b".py"):
        assert word not in text
    manifest = json.loads((bert.entry / "Manifest.json").read_text())
    assert manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] == "com.apple.CoreML/model.mlmodel"


def test_padding_is_masked_inside_the_graph(bert: Artifact) -> None:
    """An app with fixed shapes pads: what stands in the padding must not count, and nothing becomes NaN."""
    interpreter = Interpreter(load_program(bert.entry))
    ids = RNG.integers(5, 130, (1, 9))
    short = interpreter.run({"input_ids": ids, "attention_mask": np.ones((1, 9))})["sentence_embedding"]
    for filler in (0, 77):
        padded = np.concatenate([ids, np.full((1, 23), filler)], 1)
        mask = (np.arange(32) < 9)[None].astype(np.int32)
        long = interpreter.run({"input_ids": padded, "attention_mask": mask})["sentence_embedding"]
        np.testing.assert_allclose(long, short, atol=1e-3)
    assert interpreter.first_overflow is None


def test_decoder_artifact(llama_int8: Artifact, short_llama: Path) -> None:
    manifest = llama_int8.manifest
    assert manifest.minimum_runtime == {"ios": "18"}
    assert manifest.max_length == 64
    assert manifest.kv_cache_bytes_per_token == 2 * 2 * 1 * 2 * 16  # K and V, float16, 1 layer, 2 heads of 16
    program = load_program(llama_int8.entry)
    assert {n: (t.dtype, t.shape) for n, t in program.states.items()} == dict.fromkeys(
        ("key_cache", "value_cache"), ("float16", (1, 1, 2, 64, 16))
    )
    quantised = manifest.dtype_histogram["int8-channel"]
    weights = Weights(short_llama)
    large = [weights.shape(name) for name in weights if np.prod(weights.shape(name)) > 2048]
    assert quantised.tensors == len(large) == 6  # embeddings (the tied head reads the same), q, o, gate, up, down
    assert quantised.parameters == sum(int(np.prod(shape)) for shape in large)
    scales = 2 * sum(shape[0] for shape in large)  # one float16 a row
    assert quantised.size_bytes == quantised.parameters + scales
    assert "int8-channel" in manifest.contents


def test_int8_reads_back_as_the_interpreter_computes(llama_int8: Artifact, short_llama: Path) -> None:
    weights, reader = Weights(short_llama), open_payload(llama_int8)
    interpreter = Interpreter(load_program(llama_int8.entry))
    grids = {tensor.name: tensor.grid for tensor in llama_int8.tensors()}
    assert grids["model.embed_tokens.weight"] == "int8-channel"
    for tensor in llama_int8.tensors():
        got, want = reader.decode(tensor), weights[tensor.name]
        np.testing.assert_array_equal(got, interpreter._constants[tensor.stored], err_msg=tensor.name)
        if tensor.grid == "int8-channel":
            step = np.abs(want).max(axis=1, keepdims=True) / 127
            # half a step, 127 times the rounding of the scale, and the rounding of the product, all to float16
            assert (np.abs(got - want) <= step * (0.5 + 127 * 2.0**-11) + np.abs(want) * 2.0**-10).all(), tensor.name


def test_two_int8_decoders_are_equal(llama_int8: Artifact, short_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(short_llama, copy)
    again = export(copy, tmp_path / "out", ExportConfig(to="coreml:int8", context_length=64))
    assert again.manifest.artifact_id == llama_int8.manifest.artifact_id


def test_context_longer_than_the_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="context_length 4096 is more than the model's 128"):
        export(tiny_llama, tmp_path / "out", ExportConfig(to="coreml:fp16", context_length=4096))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_the_conversion_changed_is_an_error(bert: Artifact, tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny_bert, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.layer.2.output.dense.weight"] = tensors["encoder.layer.2.output.dense.weight"] * 1.01
    save_file(tensors, copy / "model.safetensors")
    program = load_program(bert.entry)
    with pytest.raises(EdgestillError, match=r"1 weights are not .* first encoder\.layer\.2\.output\.dense\.weight"):
        coreml_package.map_weights(program, Weights(copy), list(Weights(copy)))


def test_dynamic_rotary_scaling_is_refused(tiny_llama: Path) -> None:
    folder, model = open_model(tiny_llama), load_torch(tiny_llama)
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(Unsupported, match="rotary scaling 'dynamic'"):
        coreml_convert.convert_decoder(Source(folder), model, 64)


def _random(model: Any) -> Any:
    """All weights random, so that no norm or bias hides behind ones and zeros."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


ENCODERS = {
    "roberta": {"max_position_embeddings": 50, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 50, "type_vocab_size": 1},
    "electra": {"embedding_size": 16, "max_position_embeddings": 48},
    "mpnet": {"max_position_embeddings": 50},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 48},
}


@pytest.mark.whole
@pytest.mark.parametrize("architecture", list(ENCODERS))
def test_encoder_architectures(architecture: str, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    pooling = {"roberta": "cls", "electra": "last"}.get(architecture, "mean")
    facts = json.loads((folder / "edgestill.json").read_text())
    (folder / "edgestill.json").write_text(json.dumps({**facts, "pooling": pooling, "max_length": 48}))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes = ENCODERS[architecture] if architecture == "distilbert" else {**common, **ENCODERS[architecture]}
    config = AutoConfig.for_model(architecture, vocab_size=vocabulary, pad_token_id=1, **sizes)
    bare = {} if architecture in ("electra", "distilbert") else {"add_pooling_layer": False}
    _random(AutoModel.from_config(config, **bare)).save_pretrained(folder)
    described, model = open_model(folder), load_torch(folder)
    ids = RNG.integers(5, vocabulary, (2, 40))
    mask = np.ones_like(ids)
    mask[1, 11:] = 0
    ids[1, 11:] = 1
    with torch.no_grad():
        want = model(torch.tensor(ids), torch.tensor(mask)).numpy()
    interpreter = _saved(
        folder, coreml_convert.convert_encoder(Source(described), model, (48,)).model, tmp_path / "m.mlpackage"
    )
    for row in range(2):
        feed = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        got = interpreter.run(feed)["sentence_embedding"][0]
        assert np.abs(got - want[row]).max() < 3e-3, row
        assert got @ want[row] > 0.99999
    assert interpreter.first_overflow is None


@pytest.mark.parametrize("fixture", ["tiny_gemma3", "tiny_gpt2"])
def test_a_decoder_without_a_program_is_told_which_have_one(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(Unsupported, match="no stateful program of") as caught:
        export(request.getfixturevalue(fixture), tmp_path / "a", ExportConfig(to="coreml:fp16"))
    assert "decoders that have one: llama, qwen2, qwen3;" in caught.value.hint
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_decoder_architectures(architecture: str, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = AutoConfig.for_model(
        architecture, vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=False,
        **({"head_dim": 16} if architecture == "qwen3" else {}),
    )  # fmt: skip
    _random(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    described, model = open_model(folder), load_torch(folder)
    ids = RNG.integers(5, vocabulary, (1, 30))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits[0].numpy()
    made = coreml_convert.convert_decoder(Source(described), model, 40).model
    interpreter = _saved(folder, made, tmp_path / "m.mlpackage")
    state = interpreter.new_state()
    parts = []
    for begin, end in ((0, 17), (17, 18), (18, 25), (25, 30)):  # prefill, a token, several at once
        feed: dict[str, Any] = {"input_ids": ids[:, begin:end], "causal_mask": causal_mask(end - begin, end)}
        parts.append(interpreter.run(feed, state)["logits"][0])
    got = np.concatenate(parts)
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.9
