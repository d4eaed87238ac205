"""Models and disks that an export can't work with: one clear line in every format, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.architectures import ARCHITECTURES
from edgestill.errors import BadInput, EdgestillError, ResourceExhausted, Unsupported
from edgestill.export import export
from edgestill.files import hash_tree
from edgestill.recipe import ExportConfig

FORMATS = ("onnx:int8", "gguf:q8_0", "coreml:fp16")


def _copy(model: Path, out: Path) -> Path:
    shutil.copytree(model, out)
    return out


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _refused(model: Path, out: Path, to: str, error: type[EdgestillError], **options: Any) -> EdgestillError:
    """The error of an export, which is one line with a hint and leaves what stood there as it was."""
    out.mkdir(parents=True)
    (out / "old").write_text("what stood there")
    before = hash_tree(out.parent)
    with pytest.raises(error) as caught:
        export(model, out, ExportConfig(to=to, **options))
    assert hash_tree(out.parent) == before, "something was left behind"
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


@contextlib.contextmanager
def _files_end_at(size_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``size_bytes``: what a disk that gets full looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["onnx:fp32", "onnx:int4", "gguf:f16", "gguf:q8_0", "coreml:fp16"])
def test_a_disk_that_gets_full_leaves_nothing(to: str, tiny_llama: Path, tmp_path: Path) -> None:
    with _files_end_at(60_000):
        error = _refused(tiny_llama, tmp_path / "work" / "out", to, ResourceExhausted)
    assert "writ" in error.message


def test_a_disk_that_gets_full_while_converting_to_ort(tiny_bert: Path, tmp_path: Path) -> None:
    whole = export(tiny_bert, tmp_path / "whole", ExportConfig(to="onnx:int8"))
    graph = whole.entry.stat().st_size
    with _files_end_at(graph + 8_000):  # the graph fits, its .ort, which is larger, does not
        _refused(tiny_bert, tmp_path / "work" / "out", "onnx:int8", ResourceExhausted, ort=True)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, to: str, tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = _copy(tiny_bert, tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["encoder.layer.1.output.dense.weight"][3, 4] = value
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    error = _refused(model, tmp_path / "work" / "out", to, BadInput)
    assert "encoder.layer.1.output.dense.weight holds NaN or infinite weights" in str(error)


@pytest.mark.parametrize("to", FORMATS)
def test_a_tokenizer_with_more_tokens_than_the_model(to: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = _copy(tiny_llama, tmp_path / "model")
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": rows + 6, "content": "<|more|>"})
    path.write_text(json.dumps(spec))
    error = _refused(model, tmp_path / "work" / "out", to, BadInput)
    assert f"the tokenizer has id {rows + 6}, the model {rows} tokens" in str(error)


def test_a_tokenizer_with_fewer_tokens_than_the_model_is_fine(tiny_llama: Path, tmp_path: Path) -> None:
    """Tables are filled up to a round number; the rest are rows that no text reaches."""
    model = _copy(tiny_llama, tmp_path / "model")
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text())
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    del spec["model"]["vocab"][last]
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair).replace(" ", "") != last]
    path.write_text(json.dumps(spec))
    artifact = export(model, tmp_path / "out", ExportConfig(to="onnx:int8"))
    assert artifact.manifest.vocab_size == len(spec["model"]["vocab"]) + 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_tokenizer_that_is_none(content: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = _copy(tiny_llama, tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    assert "is not a tokenizer" in str(_refused(model, tmp_path / "work" / "out", "onnx:int8", BadInput))


@pytest.mark.parametrize("to", ["onnx:int8", "gguf:q8_0"])
def test_a_missing_chat_template_is_said(to: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    model = _copy(tiny_llama, tmp_path / "model")
    with_one = export(model, tmp_path / "with", ExportConfig(to=to))
    assert "chat template" not in with_one.manifest.contents
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    without = export(model, tmp_path / "without", ExportConfig(to=to))
    assert without.manifest.contents.endswith("; no chat template")
    encoder = export(tiny_bert, tmp_path / "encoder", ExportConfig(to=to))
    assert "chat template" not in encoder.manifest.contents


@pytest.mark.parametrize("to", FORMATS)
def test_an_unknown_architecture_is_told_the_known_ones(to: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = _copy(tiny_llama, tmp_path / "model")
    _edit(model / "config.json", model_type="mamba")
    error = _refused(model, tmp_path / "work" / "out", to, Unsupported)
    assert "unsupported architecture 'mamba'" in str(error)
    assert all(name in error.hint for name in ARCHITECTURES)


def test_rows_that_an_onnx_block_does_not_divide_are_said_with_their_size(tiny_llama: Path, tmp_path: Path) -> None:
    """Hidden 64, intermediate 128: blocks of 128 fit the rows of down_proj alone, which int4-pure stores like the
    others."""
    contents = export(tiny_llama, tmp_path / "out", ExportConfig(to="onnx:int4-b128-pure")).manifest.contents
    config = json.loads((tiny_llama / "config.json").read_text())
    hidden, wide, layers = 64, 128, 4
    kv = hidden // 2  # 2 of 4 heads
    rows = config["vocab_size"] + layers * (hidden + 2 * kv + hidden + 2 * wide)
    assert f"({rows * hidden / 2 / 1e6:,.2f} MB): rows not divisible by 128" in contents
    assert "fell back to blocks of 32" in contents
    assert (
        "fell back" not in export(tiny_llama, tmp_path / "b", ExportConfig(to="onnx:int4-b64-pure")).manifest.contents
    )


def test_rows_that_a_k_quant_does_not_divide_are_said_with_their_size(tiny_llama: Path, tmp_path: Path) -> None:
    manifest = export(tiny_llama, tmp_path / "out", ExportConfig(to="gguf:q4_k_m")).manifest
    sizes = {name: row.size_bytes for name, row in manifest.dtype_histogram.items()}
    named = [name for name in sizes if f" to {name}, " in manifest.contents]
    assert named
    for name in named:
        assert f"to {name}, {sizes[name] / 1e6:,.2f} MB" in manifest.contents
