"""The mixture of each file type: our files against those that ``llama_model_quantize`` makes, byte for byte."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgestill.checkpoints import ModelFolder, open_model
from edgestill.errors import BadInput, Unsupported, UsageError
from edgestill.export import export, gguf
from edgestill.export.gguf_importance import importance_matrix
from edgestill.export.gguf_layout import Placed
from edgestill.export.gguf_types import Mixture, needs_importance, storage_order, tensor_types
from edgestill.export.source import Source
from edgestill.grids import GGML_GRIDS, dequantise
from edgestill.progress import silent
from edgestill.quantisation_gguf import FILE_TYPES
from edgestill.recipe import ExportConfig
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.llamacpp_api import engine

pytest.importorskip("llama_cpp")

QUANTISED = [name for name, kind in FILE_TYPES.items() if kind.grid not in ("f32", "f16", "bf16")]
PLAIN = [name for name in QUANTISED if not FILE_TYPES[name].needs_importance]


class _Imatrix(ctypes.Structure):
    """``struct llama_model_imatrix_data``."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_override``."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def llama_quantise(
    source: Path,
    target: Path,
    file_type: str,
    importance: dict[str, np.ndarray] | None = None,
    overrides: dict[str, str] | None = None,
) -> int:
    """llama.cpp's own quantiser, from a float32 file; its return code."""
    api = engine()
    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, FILE_TYPES[file_type].number
    if importance:
        rows = (_Imatrix * (len(importance) + 1))()
        for row, (name, values) in zip(rows, importance.items(), strict=False):
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(rows, type(params.imatrix))
    if overrides:
        patterns = (_Override * (len(overrides) + 1))()
        for row, (pattern, grid) in zip(patterns, overrides.items(), strict=False):
            row.pattern, row.type = pattern.encode(), GGML_GRIDS[grid].number
        params.tt_overrides = ctypes.cast(patterns, type(params.tt_overrides))
    return int(api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))


def make_llama(tiny: Path, folder: Path, **changes: Any) -> Path:
    """A random Llama with the tokenizer of the tiny one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(1)
    old = json.loads((tiny / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**old, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_once() -> Iterator[None]:
    """The proof of a tokenizer takes a second in a process of its own, and is not what is tested here."""
    known: dict[Path, Any] = {}
    prove = gguf.tokenizer_metadata

    def once(model: ModelFolder, *arguments: Any) -> Any:
        if model.path not in known:
            known[model.path] = prove(model, *arguments)
        return known[model.path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "tokenizer_metadata", once)
        yield


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``whole``: rows of 256, 16 layers, tied; ``wide``: few key-value heads and a head of its own; ``odd``: rows of
    96 and 160, so that everything of 256 falls back; ``strange``: rows of 72, which 32 does not divide either."""
    root = tmp_path_factory.mktemp("mixtures")
    whole = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4}
    odd = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 9, "num_attention_heads": 3}
    return {
        "whole": make_llama(tiny_llama, root / "whole", **whole),
        "wide": make_llama(tiny_llama, root / "wide", **{**whole, "num_hidden_layers": 9, "num_key_value_heads": 1},
                           tie_word_embeddings=False),
        "odd": make_llama(tiny_llama, root / "odd", **odd, num_key_value_heads=3),
        "strange": make_llama(tiny_llama, root / "strange", **{**odd, "intermediate_size": 72}, num_key_value_heads=1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def floats(models: dict[str, Path], tiny_bert: Path, tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory
           ) -> dict[str, Path]:  # fmt: skip
    """The float32 file of each model."""
    root = tmp_path_factory.mktemp("floats")
    every = {**models, "bert": tiny_bert, "classifier": tiny_classifier}
    return {name: export(path, root / name, ExportConfig(to="gguf:f32")).entry for name, path in every.items()}


@pytest.mark.whole
@pytest.mark.parametrize("file_type", PLAIN)
@pytest.mark.parametrize("name", ["whole", "wide", "odd", "strange", "bert", "classifier"])
def test_the_file_is_the_one_that_llama_cpp_makes(
    name: str, file_type: str, models: dict[str, Path], floats: dict[str, Path], request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = models[name] if name in models else request.getfixturevalue(f"tiny_{name}")
    theirs = tmp_path / "theirs.gguf"
    code = llama_quantise(floats[name], theirs, file_type)
    if code:  # Q1_0 has blocks of 128 and nothing to fall back to
        assert file_type == "q1_0"
        with pytest.raises(Unsupported, match="q1_0"):
            export(model, tmp_path / "ours", ExportConfig(to=f"gguf:{file_type}"))
        return
    ours = export(model, tmp_path / "ours", ExportConfig(to=f"gguf:{file_type}")).entry
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("file_type", QUANTISED)
def test_llama_cpp_refuses_without_an_importance_matrix_what_we_do(
    file_type: str, floats: dict[str, Path], tmp_path: Path
) -> None:
    code = llama_quantise(floats["whole"], tmp_path / "x.gguf", file_type)
    nothing_fits = file_type == "q1_0"  # blocks of 128, and the head of this one is narrower
    assert (code != 0) == (FILE_TYPES[file_type].needs_importance or nothing_fits)


# GGML sorts the neighbours in its large code books before it quantises: half a minute.
SLOW = ("iq1_m", "iq1_s", "iq2_m", "iq2_s", "iq2_xs")
WEIGHED = ["q4_0-imatrix", "q5_0-imatrix", "q4_k_m-imatrix", "iq4_xs-imatrix", "iq3_m-imatrix", "iq3_xxs", "iq3_xs",
           "q2_k_s", "iq2_xxs", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("name", ["wide", "odd"])
@pytest.mark.parametrize("quantisation", WEIGHED)
def test_with_an_importance_matrix_the_tensors_are_those_of_llama_cpp(
    quantisation: str, name: str, models: dict[str, Path], floats: dict[str, Path], sentences: list[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    texts = sentences[:5]
    config = ExportConfig(to=f"gguf:{quantisation}")
    artifact = export(models[name], tmp_path / "ours", config, calibration=texts)
    importance = importance_matrix(Source(open_model(models[name])), texts)
    stored = {t.name: t.stored for t in artifact.tensors()}
    weights = {stored[n]: importance.weights(n) for n in importance.values}
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantise(floats[name], theirs, config.parsed.base, importance=weights) == 0  # type: ignore[arg-type]
    with GgufFile(artifact.entry) as a, GgufFile(theirs) as b:
        assert {n: t.grid for n, t in a.tensors.items()} == {n: t.grid for n, t in b.tensors.items()}
        for tensor in b.tensors:
            np.testing.assert_array_equal(a.raw(tensor), b.raw(tensor), err_msg=tensor)
        assert a.metadata["quantize.imatrix.entries_count"] == len(weights)
        assert a.metadata["quantize.imatrix.chunks_count"] == 5


@pytest.mark.parametrize("to", ["gguf:iq3_xxs", "gguf:q4_k_m-imatrix"])
def test_no_calibration_text_is_said(to: str, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="needs calibration texts") as caught:
        export(models["wide"], tmp_path / "a", ExportConfig(to=to))
    assert "calibration = 200" in (caught.value.hint or "")


def test_an_embedding_that_is_only_looked_up_has_no_importance(
    models: dict[str, Path], sentences: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    source = Source(open_model(models["wide"]))
    with pytest.raises(Unsupported, match=r"embed_tokens\.weight can't be iq2_xxs"):
        gguf.write(source, tmp_path / "a", ExportConfig(to="gguf:q4_0"), sentences[:2], silent,
                   types={"model.embed_tokens.weight": "iq2_xxs"})  # fmt: skip


def _write(model: Path, folder: Path, to: str, types: dict[str, str]) -> Path:
    folder.mkdir()
    config = ExportConfig(to=to)
    draft = gguf.write(Source(open_model(model)), folder, config, (), silent, types=types)
    return folder / draft.entry


TYPES = {
    "model.layers.1.self_attn.v_proj.weight": "q4_0",
    "model.layers.1.mlp.down_proj.weight": "q3_k",
    "model.layers.11.self_attn.v_proj.weight": "f16",
    "model.embed_tokens.weight": "iq4_nl",
}
STORED = {
    "blk.1.attn_v.weight": "q4_0", "blk.1.ffn_down.weight": "q3_k", "blk.11.attn_v.weight": "f16",
    "token_embd.weight": "iq4_nl",
}  # fmt: skip


def test_types_per_tensor_are_taken_exactly_and_by_llama_cpp_alike(
    models: dict[str, Path], floats: dict[str, Path], tmp_path: Path
) -> None:
    ours = _write(models["whole"], tmp_path / "ours", "gguf:q4_k_m", TYPES)
    with GgufFile(ours) as file:
        assert {name: file.tensors[name].grid for name in STORED} == STORED
    patterns = {f"^{re.escape(name)}$": grid for name, grid in STORED.items()}
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantise(floats["whole"], theirs, "q4_k_m", overrides=patterns) == 0
    assert ours.read_bytes() == theirs.read_bytes()


def test_types_per_tensor_in_a_float_file(models: dict[str, Path], tmp_path: Path) -> None:
    path = _write(models["odd"], tmp_path / "ours", "gguf:f16", {"model.layers.0.mlp.up_proj.weight": "q5_1"})
    with GgufFile(path) as file:
        grids = {tensor.grid for name, tensor in file.tensors.items() if name != "blk.0.ffn_up.weight"}
        assert file.tensors["blk.0.ffn_up.weight"].grid == "q5_1"
    assert grids == {"f16", "f32"}


@pytest.mark.parametrize(
    ("types", "kind", "words"),
    [
        ({"model.layers.0.mlp.up.weight": "q4_0"}, UsageError, "no matrix of this model"),
        ({"model.norm.weight": "q4_0"}, UsageError, "no matrix of this model"),
        ({"model.layers.0.mlp.up_proj.weight": "q4_9"}, UsageError, "unknown GGUF type 'q4_9'"),
        ({"model.layers.0.mlp.up_proj.weight": "q4_k"}, Unsupported, "rows of 96 values.*take q5_0"),
    ],
)
def test_a_type_that_can_not_be_is_refused(
    types: dict[str, str], kind: type[Exception], words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        _write(models["odd"], tmp_path / "ours", "gguf:q4_0", types)


def test_weights_that_are_not_finite_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for to in ("gguf:f16", "gguf:q4_k_m"):
        with pytest.raises(BadInput, match=f"{name} holds NaN"):
            export(folder, tmp_path / "out", ExportConfig(to=to))
    weights[name][3, 5] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unsupported, match="too large for f16"):
        export(folder, tmp_path / "out", ExportConfig(to="gguf:f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rows_are_read_in_pieces_as_whole(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                           ) -> None:  # fmt: skip
    """Pieces of a few rows (whole heads where rows move) give the bytes that whole tensors give."""
    whole = export(models["odd"], tmp_path / "whole", ExportConfig(to="gguf:q5_1"))
    monkeypatch.setattr(gguf, "_PIECE_VALUES", 500)
    pieces = export(models["odd"], tmp_path / "pieces", ExportConfig(to="gguf:q5_1"))
    assert whole.manifest.artifact_id == pieces.manifest.artifact_id


def test_the_order_is_by_layer_as_a_number() -> None:
    names = ["blk.10.a", "blk.2.b", "output.weight", "blk.2.a", "blk.0.z"]
    assert storage_order(names) == ["output.weight", "blk.0.z", "blk.2.a", "blk.2.b", "blk.10.a"]


def test_the_70b_llama_gets_more_for_its_values() -> None:
    placed = [Placed(f"v{i}", f"blk.{i}.attn_v.weight", (256, 1024)) for i in range(80)]
    grids = tensor_types(placed, Mixture("q4_k_s", "llama", 80, gqa=8))
    assert set(grids.values()) == {"q5_k"}
    assert not needs_importance("token_embd.weight", "iq2_xxs", "iq2_xxs")


def test_a_decoded_tensor_is_near_the_float_one(models: dict[str, Path], tmp_path: Path) -> None:
    path = export(models["whole"], tmp_path / "a", ExportConfig(to="gguf:q5_k_m")).entry
    truth = load_file(models["whole"] / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    with GgufFile(path) as file:
        found = file.tensors["blk.3.ffn_up.weight"]
        assert found.grid == "q5_k"
        values = dequantise("q5_k", file.raw("blk.3.ffn_up.weight"), found.shape)
    assert np.linalg.norm(values - truth) <= 0.04 * np.linalg.norm(truth)
