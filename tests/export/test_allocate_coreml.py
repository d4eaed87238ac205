"""Core ML in a given number of bytes: sizes learnt without writing, and what the program itself computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import ISLANDS_FILE
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, verify
from edgestill.checkpoints import open_model
from edgestill.errors import UsageError
from edgestill.export import coreml, export
from edgestill.export.allocate_coreml import CoremlSpace
from edgestill.export.source import Source
from edgestill.progress import silent
from edgestill.recipe import ExportConfig


@pytest.fixture(scope="module")
def wide_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with matrices that are large enough to be compressed."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "wide"
    shutil.copytree(tiny_bert, folder)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(folder, hidden_size=64, num_hidden_layers=1, intermediate_size=96)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", [pytest.param("iOS16", marks=pytest.mark.whole), "iOS18"])
def test_a_size_learnt_without_writing_is_the_one_written(target: str, wide_bert: Path, tmp_path: Path) -> None:
    source = Source(open_model(wide_bert))
    config = ExportConfig(to="coreml@1MB", min_target=target)  # type: ignore[arg-type]
    space = CoremlSpace(source, config, ["a good film", "the plot"], silent)
    assert len(space.tensors) > 5
    assert {tensor.types[-1] for tensor in space.tensors} == {"fp16"}
    assert any("-g16" in type_ for tensor in space.tensors for type_ in tensor.types) == (target == "iOS18")
    chooser = np.random.default_rng(3)
    types = {tensor.name: str(chooser.choice(tensor.types)) for tensor in space.tensors}
    said = space.whole_bytes(types)
    plain = config.model_copy(update={"to": "coreml:fp16"})
    chosen = space.chosen(types, "the note")
    draft = coreml.write(source, tmp_path, plain, types=types, **chosen.told)
    note = chosen.note.removeprefix("the note")
    assert note.startswith("; in float32: ")  # as in a package without a budget
    assert note in draft.contents
    assert sum(file.stat().st_size for file in (tmp_path / coreml.ENTRY).rglob("*") if file.is_file()) == said
    assert json.loads((tmp_path / ISLANDS_FILE).read_text())["source"] == "2 calibration texts"  # converted once


@pytest.mark.whole
@pytest.mark.parametrize("model", ["wide_bert", "tiny_llama"])
def test_the_package_fits_and_passes_verification(
    model: str, sentences: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    joined = [" ".join(sentences[at : at + 5]) for at in range(0, 150, 5)]
    sizes = [export(folder, tmp_path / q, ExportConfig(to=f"coreml:{q}")).model_bytes for q in ("pal3", "int8")]
    size = (sizes[0] + sizes[1]) // 2
    config = ExportConfig(to=f"coreml@{size / 1e6:.6f}MB")
    artifact = export(folder, tmp_path / "out", config, calibration=joined[:20], dev=joined[20:])
    assert 0.97 * size <= artifact.model_bytes <= size
    assert "matrices, codes of 4 bits rounded with compensation" in artifact.manifest.contents
    assert len(artifact.manifest.dtype_histogram) > 2
    step = 1 if model == "wide_bert" else 8
    texts = [" ".join(sentences[at : at + step]) for at in range(150, 190, step)]
    reference = make_reference(folder, tmp_path / "reference", texts=texts, window=48, limit=400, threads=1)
    verdict = verify(
        artifact.path, student=folder, references={"held-out": reference}, work=tmp_path / "work",
        options=VerifyOptions(threads=1, decode_tokens=4),
    )  # fmt: skip
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


def test_too_small_names_the_smallest_size(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"coreml@0\.01MB is too small: with the smallest types this model takes 0\.\d"
    ):
        export(tiny_bert, tmp_path / "small", ExportConfig(to="coreml@0.01MB"))
    assert not (tmp_path / "small").exists()
