"""Several artifacts from one load: what is shared, how long it is held, and that nobody can tell from the bytes."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill import checkpoints, torch_models
from edgestill.artifact import Artifact
from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.errors import BadInput, EdgestillError
from edgestill.export import export, writer
from edgestill.export.onnx_moments import Moments
from edgestill.export.source import Source
from edgestill.recipe import ExportConfig


def counting(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Any]:
    """The real function, and what it was called with."""
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(where, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[0])
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, call)
    return calls


@pytest.fixture
def texts(sentences: list[str]) -> tuple[list[str], list[str]]:
    """Calibration and dev texts, longer than any row of a measurement: where one is cut shows."""
    joined = [" ".join(sentences[at : at + 25]) for at in range(0, 200, 25)]
    return joined[:5], joined[5:]


def _shared(
    model: Path, out: Path, configs: list[ExportConfig], texts: tuple[list[str], list[str]]
) -> dict[str, Artifact]:
    source, made = Source(open_model(model)), {}
    for config in source.in_turn(configs):
        made[config.variant] = export(source, out / config.variant, config, calibration=texts[0], dev=texts[1])
    assert source._loaded is None or source._loaded() is None, "nothing is held when all are made"
    return made


def _alone(
    model: Path, out: Path, configs: list[ExportConfig], texts: tuple[list[str], list[str]]
) -> dict[str, Artifact]:
    return {
        config.variant: export(model, out / config.variant, config, calibration=texts[0], dev=texts[1])
        for config in configs
    }


def _same(some: dict[str, Artifact], others: dict[str, Artifact]) -> None:
    assert some.keys() == others.keys()
    for name, artifact in some.items():
        files = [{file.path: file.sha256 for file in one.manifest.files} for one in (artifact, others[name])]
        assert files[0] == files[1], name
        assert artifact.manifest.contents == others[name].manifest.contents
        assert artifact.manifest.lineage == others[name].manifest.lineage
        assert [file.path for file in artifact.shipped] == [file.path for file in others[name].shipped]


def test_one_load_makes_the_same_bytes(
    tiny_bert: Path, tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    asked = ("gguf:q8_0", "onnx:int4-b32-gptq", "onnx:int8-static", "gguf:q4_0-imatrix")
    configs = [ExportConfig(to=to) for to in asked]
    alone = _alone(tiny_bert, tmp_path / "alone", configs, texts)
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "another cache"))
    loads = counting(monkeypatch, torch_models, "load_torch")
    checks = counting(monkeypatch, writer, "check_model")
    hashes = counting(monkeypatch, checkpoints, "hash_tree")
    _same(_shared(tiny_bert, tmp_path / "shared", configs, texts), alone)
    assert (len(loads), len(checks), len(hashes)) == (1, 1, 1)


@pytest.mark.whole
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_all_formats_from_one_load_are_the_same_bytes(
    model: str, tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Core ML is traced from modules that others have run and rounded before."""
    folder = request.getfixturevalue(model)
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    asked = ["onnx:fp32", "coreml:fp16", "onnx:int4-b32-gptq", "onnx:int8-static", "gguf:q4_0-imatrix", "gguf:f16"]
    if model == "tiny_bert":
        size = export(folder, tmp_path / "size", ExportConfig(to="coreml:int8")).model_bytes
        asked += ["gguf@0.05MB", "onnx@0.09MB", f"coreml@{size / 1e6:.6f}MB"]
    configs = [ExportConfig(to=to) for to in asked]
    apart = _alone(folder, tmp_path / "apart", configs, texts)
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "another cache"))
    loads = counting(monkeypatch, torch_models, "load_torch")
    _same(_shared(folder, tmp_path / "shared", configs, texts), apart)
    assert len(loads) == 1


def test_core_ml_changes_a_twin(tiny_bert: Path, tiny_llama: Path) -> None:
    """What is wrapped for a trace shares the weights, and leaves the model as all others need it."""
    import torch

    from edgestill.export.coreml_programs import DecoderProgram, EncoderProgram

    for folder, program in ((tiny_bert, EncoderProgram), (tiny_llama, DecoderProgram)):
        described, model = open_model(folder), load_torch(folder)
        ids = torch.arange(5, 17)[None]

        def say(model: Any = model, ids: Any = ids) -> Any:
            with torch.inference_mode():
                said = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            return said if isinstance(said, torch.Tensor) else said.logits

        before, kept = say(), {name: value.data_ptr() for name, value in model.named_parameters()}
        attention = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
        wrapped = program(described, model, 32)  # type: ignore[abstract]
        assert {value.data_ptr() for value in wrapped.parameters()} == set(kept.values()), "no weight is copied"
        assert torch.equal(before, say())
        assert {name: value.data_ptr() for name, value in model.named_parameters()} == kept
        after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
        assert attention == after
        assert "edgestill_coreml" not in after


def test_the_model_is_held_while_a_later_artifact_needs_it(tiny_bert: Path) -> None:
    source = Source(open_model(tiny_bert))
    asked = ["gguf:f16", "coreml:fp16", "onnx:fp32", "onnx@1MB", "onnx:int8-static", "gguf:q4_0-imatrix"]
    order = []
    seen: weakref.ref[Any] | None = None
    for config in source.in_turn([ExportConfig(to=to) for to in asked]):
        order.append(config.to)
        if config.parsed.runs_model:
            assert seen is None or seen() is source.torch()[0]
            seen = weakref.ref(source.torch()[0])
        else:
            assert seen is not None
            gc.collect()
            assert seen() is None, "what needs no model is written without one in memory"
    assert order == ["onnx@1MB", "coreml:fp16", "onnx:int8-static", "gguf:q4_0-imatrix", "gguf:f16", "onnx:fp32"]


def test_without_more_to_come_it_lives_as_long_as_its_users(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = counting(monkeypatch, torch_models, "load_torch")
    source = Source(open_model(tiny_bert))
    model, _root = source.torch()
    assert source.torch()[0] is model
    held = weakref.ref(model)
    del model, _root
    gc.collect()
    assert held() is None
    with source.keeping():
        held = weakref.ref(source.torch()[0])
        assert source.torch()[0] is held()
    gc.collect()
    assert held() is None
    assert len(loads) == 2


def test_moments_are_taken_once_for_all_budgets(tiny_llama: Path, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgestill.export import moments

    taken = counting(monkeypatch, moments, "input_moments")
    source = Source(open_model(tiny_llama))
    configs = [ExportConfig(to=to) for to in ("gguf@1MB", "onnx@1MB", "coreml:fp16")]
    found = [source.moments(texts[0], 256, 8) for _ in source.in_turn(configs)]
    assert len(taken) == 2, "one for both budgets; what comes after them is not to hold it"
    assert found[0] is found[1]
    for name, moment in found[0].items():
        np.testing.assert_array_equal(moment, found[2][name])


def test_where_one_caller_had_its_text_cut_is_not_left_to_the_next(tiny_llama: Path, texts: Any) -> None:
    fresh = Source(open_model(tiny_llama)).inputs(texts[0], 4096, 64)
    source = Source(open_model(tiny_llama))
    Moments(source, texts[0], max_length=16)
    source.tokenizer(texts[0], truncation=True, max_length=9, padding="max_length")
    found = source.inputs(texts[0], 4096, 64)
    np.testing.assert_array_equal(found.ids, fresh.ids)
    assert len(found.ids) > len(texts[0])
    assert source.tokenizer(texts[0][0]) == load_tokenizer(tiny_llama)(texts[0][0])


def test_a_model_that_changes_in_between_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_bert, tmp_path / "a model"))
    source = Source(open_model(folder))
    export(source, tmp_path / "first", ExportConfig(to="onnx:fp32"))
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    with pytest.raises(BadInput, match="a model changed while artifacts were made of it"):
        export(source, tmp_path / "second", ExportConfig(to="onnx:fp16"))
    assert not (tmp_path / "second").exists()
    assert (tmp_path / "first/artifact.json").is_file()


def test_a_refused_artifact_leaves_the_model_as_it_was(tiny_bert: Path, tmp_path: Path, texts: Any) -> None:
    """One that fails in the middle of a measurement, and then one that is made from the same load."""
    source = Source(open_model(tiny_bert))
    static = ExportConfig(to="onnx:int8-static")

    def stop(message: str, fraction: float | None = None) -> None:
        if message.startswith("choosing"):
            raise EdgestillError("stopped")

    configs = [ExportConfig(to="gguf@0.05MB"), static]
    with source.keeping():
        model = source.torch()[0]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for config in configs:
            with pytest.raises(EdgestillError, match="stopped"):
                export(source, tmp_path / "x", config, calibration=texts[0], dev=texts[1], progress=stop)
        assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        shared = export(source, tmp_path / "a", static, calibration=texts[0], dev=texts[1])
    alone = export(tiny_bert, tmp_path / "b", static, calibration=texts[0], dev=texts[1])
    assert shared.manifest.artifact_id == alone.manifest.artifact_id
