"""ONNX in a given number of bytes: sizes learnt without writing, and what ONNX Runtime says of the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, verify
from edgestill.checkpoints import open_model
from edgestill.errors import UsageError
from edgestill.export import export
from edgestill.export.allocate_onnx import OnnxSpace
from edgestill.export.onnx import write
from edgestill.export.onnx_file import Spool
from edgestill.export.source import Source
from edgestill.recipe import ExportConfig
from edgestill.runtimes.transports.local import LocalWorker

MODELS = ("tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_tagger")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("external_bytes", [1 << 30, 1000])
def test_a_size_learnt_without_writing_is_the_one_written(
    model: str, external_bytes: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_model(request.getfixturevalue(model))
    config = ExportConfig(to="onnx:fp32")
    space = OnnxSpace(folder, config)
    monkeypatch.setattr(Spool.file_bytes, "__kwdefaults__", {"external_bytes": external_bytes})
    chooser = np.random.default_rng(len(model))
    types = {tensor.name: str(chooser.choice(tensor.types)) for tensor in space.tensors}
    said = space.whole_bytes(types)
    space.learn({})
    write(Source(folder), tmp_path, config, types=types, external_bytes=external_bytes, **space.chosen(types, "").told)
    assert sum(file.stat().st_size for file in tmp_path.glob("model.onnx*")) == said


def test_an_ort_file_has_no_budget() -> None:
    with pytest.raises(ValueError, match=r"onnx@60MB with ort = true: the size of an \.ort file is known only when"):
        ExportConfig(to="onnx@60MB", ort=True)


def test_too_small_names_the_smallest_size_which_is_possible(tiny_bert: Path, tmp_path: Path) -> None:
    space = OnnxSpace(open_model(tiny_bert), ExportConfig(to="onnx@1MB"))
    least = space.whole_bytes({tensor.name: tensor.types[0] for tensor in space.tensors})
    with pytest.raises(UsageError, match=rf"smallest types this model takes {least / 1e6:.2f} MB"):
        _budget(tiny_bert, tmp_path / "small", least - 1, [])
    assert not (tmp_path / "small").exists()
    assert _budget(tiny_bert, tmp_path / "least", least, []).model_bytes == least


def _budget(model: Path, out: Path, size: float, sentences: list[str], work: Path | None = None) -> Artifact:
    joined = [" ".join(sentences[at : at + 5]) for at in range(0, 150, 5)]
    config = ExportConfig(to=f"onnx@{size / 1e6:.6f}MB")
    return export(model, out, config, calibration=joined[:20], dev=joined[20:], work=work)


@pytest.mark.whole
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_the_file_fits_and_passes_verification(
    model: str, sentences: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    sizes = [export(folder, tmp_path / q, ExportConfig(to=f"onnx:{q}")).model_bytes for q in ("int4-pure", "int8")]
    size = int(0.3 * sizes[0] + 0.7 * sizes[1])
    artifact = _budget(folder, tmp_path / "out", size, sentences)
    assert 0.97 * size <= artifact.model_bytes <= size
    assert "int4-b" in artifact.manifest.contents
    assert {"int8-b32", "float32"} <= artifact.manifest.dtype_histogram.keys()
    step = 1 if model == "tiny_bert" else 8
    texts = [" ".join(sentences[at : at + step]) for at in range(150, 190, step)]
    reference = make_reference(folder, tmp_path / "reference", texts=texts, window=48, limit=400, threads=1)
    verdict = verify(
        artifact.path, student=folder, references={"held-out": reference}, work=tmp_path / "work",
        options=VerifyOptions(threads=1, decode_tokens=4),
    )  # fmt: skip
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


@pytest.mark.whole
def test_it_loses_less_than_one_type_of_the_same_size(tiny_llama: Path, sentences: list[str], tmp_path: Path) -> None:
    joined = [" ".join(sentences[at : at + 5]) for at in range(0, 200, 5)]
    config = ExportConfig(to="onnx:int4-pure-gptq")
    plain = export(tiny_llama, tmp_path / "plain", config, calibration=joined[:20])
    mixed = _budget(tiny_llama, tmp_path / "mixed", plain.model_bytes, sentences)
    assert mixed.model_bytes <= plain.model_bytes
    reference = make_reference(
        tiny_llama, tmp_path / "reference", texts=joined[30:], window=64, limit=600, threads=1
    )  # fmt: skip
    losses = []
    for artifact in (plain, mixed):
        with LocalWorker(artifact.path) as worker:
            losses.append(float(np.mean(worker.score(reference, 4)["kl"])))
    assert losses[1] < losses[0]
