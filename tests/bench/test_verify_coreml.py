"""Core ML artifacts of every kind of storage pass verification, and one with a wrong weight is seen to fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.coreml_session import MIL_BACKEND

OPTIONS = VerifyOptions(threads=1, device="a test", decode_tokens=4, backend=MIL_BACKEND)
WRONG = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def wide_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of width 64: all matrices are large enough to be compressed, rows have two blocks of 32."""
    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("models") / "wide-bert")
    vocabulary = BertConfig.from_pretrained(folder).vocab_size
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(wide_bert: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(wide_bert, tmp_path_factory.mktemp("bert") / "r", texts=sentences[:16], threads=1)


def _verdict(artifact: Path, student: Path, reference: Path, work: Path) -> Any:
    return examine(artifact, student=student, references={"text": reference}, work=work, options=OPTIONS).verdict


def _failures(verdict: Any) -> dict[str, Any]:
    return {check.name: check for check in verdict.failures}


CASES = (("pal4-g16", "pal4-g16"), ("sparse50-int8", "sparse50-int8-channel"))


@pytest.mark.whole
@pytest.mark.parametrize(("quantisation", "grid"), CASES)
def test_it_passes(quantisation: str, grid: str, wide_bert: Path, reference: Path, tmp_path: Path) -> None:
    artifact = export(wide_bert, tmp_path / "a", ExportConfig(to=f"coreml:{quantisation}"))
    assert {tensor.name: tensor.grid for tensor in artifact.tensors()}[WRONG] == grid
    verdict = _verdict(artifact.path, wide_bert, reference, tmp_path / "work")
    assert _failures(verdict) == {}
    assert verdict.level == "program_verified"
    checks = {check.name for check in verdict.checks}
    assert checks >= {"weights_on_grid", "dtype_histogram", "faithful", "padding_parity", "cosine_to_student"}


@pytest.mark.whole
def test_lengths_to_choose_from_in_int4(wide_bert: Path, reference: Path, tmp_path: Path) -> None:
    """Texts are padded to the next length of the program, masked inside it."""
    config = ExportConfig(to="coreml:int4", shapes=[16, 40, 64])
    artifact = export(wide_bert, tmp_path / "a", config)
    assert (artifact.manifest.shapes, artifact.manifest.minimum_runtime) == ("enumerated", {"ios": "18"})
    assert {tensor.name: tensor.grid for tensor in artifact.tensors()}[WRONG] == "int4-b32"
    assert _failures(_verdict(artifact.path, wide_bert, reference, tmp_path / "work")) == {}


@pytest.mark.whole
def test_a_wrong_weight_in_int4_is_named(wide_bert: Path, reference: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(wide_bert, tmp_path / "changed")
    state = load_file(changed / "model.safetensors")
    state[WRONG] = (state[WRONG] * np.float32(1.1)).astype(np.float32)
    save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
    artifact = export(changed, tmp_path / "a", ExportConfig(to="coreml:int4"))
    found = _failures(_verdict(artifact.path, wide_bert, reference, tmp_path / "work"))
    assert found["weights_on_grid"].first_tensor == WRONG


@pytest.mark.whole
def test_a_decoder_in_int4(tiny_llama: Path, sentences: list[str], tmp_path: Path) -> None:
    """Its state and its quantised matrices together: prefill against decode, and the loss."""
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 48, 8)]
    reference = make_reference(tiny_llama, tmp_path / "r", texts=texts, window=48, threads=1)
    artifact = export(tiny_llama, tmp_path / "a", ExportConfig(to="coreml:int4", context_length=96))
    assert "int4-b32" in artifact.manifest.dtype_histogram
    verdict = _verdict(artifact.path, tiny_llama, reference, tmp_path / "work")
    assert _failures(verdict) == {}
    assert {check.name for check in verdict.checks} >= {"decode_parity", "kl_to_student", "weights_on_grid"}
