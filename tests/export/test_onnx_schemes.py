"""Which kind each matrix gets, by role and by name; and that what is asked for is what is stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.checkpoints import open_model
from edgestill.errors import UsageError
from edgestill.export import export
from edgestill.export.onnx import write
from edgestill.export.onnx_schemes import scheme_of
from edgestill.export.source import Source
from edgestill.quantisation_onnx import parse
from edgestill.recipe import ExportConfig
from edgestill.runtimes.onnx_reader import OnnxFile
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions

OPTIONED = [("tiny_llama", name) for name in ("int4-b16-pure", "int4-sym-pure", "int4-pure-gptq", "int8-b16-asym",
            "int8-gptq")] + [("tiny_bert", "int4-pure"), ("tiny_bert", "int4-pure-gptq")]  # fmt: skip


def _export(folder: Path, out: Path, quantisation: str, texts: list[str]) -> Artifact:
    return export(folder, out, ExportConfig(to=f"onnx:{quantisation}"), calibration=texts[100:140])


@pytest.mark.parametrize(("model", "quantisation"), OPTIONED)
def test_every_option_passes_verification(
    model: str, quantisation: str, tmp_path: Path, sentences: list[str], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    artifact = _export(folder, tmp_path / "a", quantisation, sentences)
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 48, 8)]
    reference = make_reference(folder, tmp_path / "r", texts=texts, window=48, threads=1)
    options = VerifyOptions(threads=1, device="a test", decode_tokens=4)
    found = examine(artifact.path, student=folder, references={"text": reference}, work=tmp_path, options=options)
    assert found.verdict.failures == ()


def test_a_compensated_tensor_of_other_weights_is_named(tiny_llama: Path, tmp_path: Path, sentences: list[str]) -> None:
    """The bound on codes that make up for each other is wide for a weight, not for a tensor."""
    from safetensors.numpy import load_file, save_file

    wrong = shutil.copytree(tiny_llama, tmp_path / "wrong")
    state = load_file(wrong / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    state[name] = np.ascontiguousarray(state[name][::-1])
    save_file(state, wrong / "model.safetensors", metadata={"format": "pt"})
    artifact = _export(wrong, tmp_path / "a", "int4-pure-gptq", sentences)
    reference = make_reference(tiny_llama, tmp_path / "r", texts=[" ".join(sentences[:20])], window=48, threads=1)
    options = VerifyOptions(threads=1, device="a test", decode_tokens=4)
    verdict = examine(
        artifact.path, student=tiny_llama, references={"text": reference}, work=tmp_path, options=options
    ).verdict  # fmt: skip
    found = {check.name: check for check in verdict.failures}
    assert found["weights_on_grid"].first_tensor == name


def test_the_tied_table_is_stored_once(tiny_llama: Path, tmp_path: Path, sentences: list[str]) -> None:
    artifact = _export(tiny_llama, tmp_path / "a", "int4-pure-gptq", sentences)
    file = OnnxFile(artifact.entry)
    tables = [name for name in file.tensors if "embed_tokens" in name]
    base = "model.embed_tokens.weight.int4-b32"
    assert sorted(tables) == [base, f"{base}.scales", f"{base}.zeros"]
    readers = {node.op_type for node in file.graph.node if base in node.input}
    assert readers == {"MatMulNBits", "Reshape"}  # GatherBlockQuantized reads it as rows
    assert sum(tensor.name == "model.embed_tokens.weight" for tensor in artifact.tensors()) == 1
    assert "int4-b32-gptq (29 of 29 weight matrices)" in artifact.manifest.contents


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_compensation_costs_less_than_rounding(
    model: str, tmp_path: Path, sentences: list[str], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 96, 8)]
    reference = make_reference(folder, tmp_path / "r", texts=texts, window=48, threads=1)
    from edgestill.runtimes.scoring import score

    losses = {}
    for quantisation in ("int4-pure", "int4-pure-gptq"):
        artifact = _export(folder, tmp_path / quantisation, quantisation, sentences)
        found = score(OrtSession(artifact, SessionOptions(threads=1)), reference)
        losses[quantisation] = float(np.mean(found["kl"] if "kl" in found else 1 - found["cosine"]))
    assert losses["int4-pure-gptq"] < losses["int4-pure"]


def test_two_folders_give_the_same_compensated_bytes(tiny_llama: Path, tmp_path: Path, sentences: list[str]) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "elsewhere" / "another-name")
    first = _export(tiny_llama, tmp_path / "a", "int4-gptq", sentences)
    second = _export(other, tmp_path / "b", "int4-gptq", sentences)
    assert first.manifest.artifact_id == second.manifest.artifact_id


def test_compensation_without_text_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration"):
        export(tiny_llama, tmp_path / "a", ExportConfig(to="onnx:int4-gptq"))
    assert not (tmp_path / "a").exists()


def test_types_of_single_parameters(tiny_llama: Path, tmp_path: Path) -> None:
    """Merged matrices that are stored in different ways are stored apart and give what they gave together."""
    types = {"model.layers.0.self_attn.k_proj.weight": "int8-b16", "model.layers.1.mlp.up_proj.weight": "int8-asym",
             "model.embed_tokens.weight": "int8"}  # fmt: skip
    whole = export(tiny_llama, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    draft = write(Source(open_model(tiny_llama)), tmp_path, ExportConfig(to="onnx:fp32"), types=types)
    grids = {tensor.name: tensor.grid for tensor in draft.tensors}
    assert grids["model.layers.0.self_attn.k_proj.weight"] == "int8-b16"
    assert grids["model.layers.0.self_attn.q_proj.weight"] == "float32"
    assert grids["model.layers.1.mlp.up_proj.weight"] == "int8-b32"
    assert grids["model.embed_tokens.weight"] == "int8-b32"
    shutil.copytree(whole.path, tmp_path / "b")
    (tmp_path / "model.onnx").replace(tmp_path / "b" / "model.onnx")
    ids = np.arange(5, 25)[None]
    first, second = (
        OrtSession(Artifact(path, whole.manifest), SessionOptions(threads=1)).forward(ids, np.ones_like(ids))
        for path in (whole.path, tmp_path / "b")
    )
    assert 0.995 < np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.9999999


@pytest.mark.parametrize(("name", "message"), [("int5", "int5"), ("fp16", "beside")])
def test_types_that_do_not_fit_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scheme_of(parse("int4"), "text-generation", {"model.layers.0.mlp.up_proj.weight": name})
