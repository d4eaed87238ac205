"""Artifacts of every decoder family pass verification, and one with a defect of its family is seen to fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.export import export
from edgestill.recipe import ExportConfig

OPTIONS = VerifyOptions(threads=1, device="a test", decode_tokens=6)
FAMILIES = ("tiny_gemma3", "tiny_gpt2")
TO = ("onnx:fp32", "onnx:fp16", "onnx:fp32-portable", "onnx:fp16-portable", "onnx:int8", "onnx:int4",
      "onnx:int8-dynamic", "gguf:f32", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:q4_0")  # fmt: skip


@pytest.fixture(scope="module")
def references(sentences: list[str], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The float model's own words, by family."""
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 64, 8)]
    out = tmp_path_factory.mktemp("references")
    return {name: make_reference(request.getfixturevalue(name), out / name, texts=texts, window=48, threads=1)
            for name in FAMILIES}  # fmt: skip


def _examine(model: Path, student: Path, to: str, reference: Path, work: Path) -> Any:
    artifact = export(model, work / "artifact", ExportConfig(to=to))
    return examine(artifact.path, student=student, references={"text": reference}, work=work / "work", options=OPTIONS)


@pytest.mark.whole
@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_passes(family: str, to: str, references: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(family)
    verdict = _examine(folder, folder, to, references[family], tmp_path).verdict
    # What 4 bits cost a random model says nothing; that the artifact is what it says it is must hold all the same.
    failures = [check for check in verdict.failures if check.question != "loss" or not to.endswith("q4_0")]
    assert not failures, [(check.name, check.value, check.limit, check.reason) for check in failures]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("tiny_gemma3", {"sliding_window": 9}),
        ("tiny_gemma3", {"query_pre_attn_scalar": 20}),
        ("tiny_gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 2e4}}}),
        ("tiny_gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("tiny_gpt2", {"layer_norm_epsilon": 0.1}),
    ],
)
def test_a_defect_of_the_graph_is_seen(
    family: str, change: dict[str, Any], references: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The graph is written from a config that says something else than the student's."""
    student = request.getfixturevalue(family)
    wrong = shutil.copytree(student, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, **change}))
    verdict = _examine(wrong, student, "onnx:fp32", references[family], tmp_path).verdict
    assert any(check.question == "faithful" for check in verdict.failures)
