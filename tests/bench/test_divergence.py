"""A defect put into one layer of a graph, all weights right: the verdict names that layer."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import ARTIFACT_FILE, open_artifact, seal_artifact
from edgestill.bench.divergence import first_divergence, relative_error
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.recipe import ExportConfig

OPTIONS = VerifyOptions(threads=1, device="a test", decode_tokens=4)
IDS = np.arange(5, 37)


@pytest.fixture(scope="module")
def artifact_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, to: str) -> Path:
        if (model, to) not in made:
            out = tmp_path_factory.mktemp("divergence") / "a"
            made[model, to] = export(request.getfixturevalue(model), out, ExportConfig(to=to)).path
        return made[model, to]

    return get


def damaged(artifact: Path, out: Path, change: Callable[[Any], None]) -> Path:
    """A copy of ``artifact`` whose graph went through ``change``, with fitting hashes."""
    import onnx

    folder = Path(shutil.copytree(artifact, out))
    model = onnx.load(folder / "model.onnx")
    change(model.graph)
    onnx.save(model, folder / "model.onnx")
    manifest = open_artifact(folder, check=False).manifest
    (folder / ARTIFACT_FILE).unlink()
    return seal_artifact(folder, dataclasses.replace(manifest)).path


def node(graph: Any, *words: str) -> Any:
    (found,) = [n for n in graph.node if all(word in n.name for word in words)]
    return found


def another_epsilon(graph: Any) -> None:
    norm = node(graph, "layers.1.post_attention_layernorm")
    (epsilon,) = [a for a in norm.attribute if a.name == "epsilon"]
    epsilon.f = 30.0


def gate_for_up(graph: Any) -> None:
    """The activation goes to the other of the two matrices: both say the same as before, in the wrong place."""
    gate, up = ([n for n in graph.node if f"layers.1.mlp.{name}" in n.name][-1] for name in ("gate_proj", "up_proj"))
    gate.output[0], up.output[0] = up.output[0], gate.output[0]


def another_scale(graph: Any) -> None:
    attention = [n for n in graph.node if n.op_type == "GroupQueryAttention"][1]
    (scale,) = [a for a in attention.attribute if a.name == "scale"]
    scale.f *= 3


@pytest.mark.parametrize("to", ["onnx:fp32", "onnx:int8", "onnx:int4", "onnx:fp16"])
@pytest.mark.parametrize(
    ("change", "part"),
    [(another_epsilon, ".post_attention_layernorm"), (gate_for_up, ".mlp"), (another_scale, ".self_attn")],
)
def test_the_layer_with_the_defect_is_named(
    change: Callable[[Any], None], part: str, to: str, artifact_of: Callable[[str, str], Path], tiny_llama: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = damaged(artifact_of("tiny_llama", to), tmp_path / "a", change)
    found = first_divergence(open_artifact(folder), tiny_llama, IDS)
    assert found is not None
    assert found.name == f"model.layers.1{part}"
    assert found.before == "model.layers.0"
    assert found.error > 2 * found.limit


@pytest.mark.parametrize(
    ("model", "to"),
    [
        ("tiny_llama", "onnx:fp32"), ("tiny_llama", "onnx:int4"), ("tiny_llama", "onnx:int8-dynamic"),
        ("tiny_llama", "onnx:fp16"), ("tiny_llama", "onnx:fp32-portable"), ("tiny_gemma3", "onnx:fp32"),
        ("tiny_gpt2", "onnx:int8"), ("tiny_bert", "onnx:fp32"), ("tiny_bert", "onnx:int8-dynamic"),
    ],
)  # fmt: skip
def test_a_good_graph_shows_every_block(
    model: str, to: str, artifact_of: Callable[[str, str], Path], request: pytest.FixtureRequest
) -> None:
    artifact = open_artifact(artifact_of(model, to))
    assert first_divergence(artifact, request.getfixturevalue(model), IDS) is None


def test_a_defect_of_an_encoder(artifact_of: Callable[[str, str], Path], tiny_bert: Path, tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        norms: Iterator[Any] = (n for n in graph.node if "LayerNormalization" in n.op_type)
        (epsilon,) = [a for a in list(norms)[4].attribute if a.name == "epsilon"]
        epsilon.f = 30.0  # embeddings, two of layer 0, two of layer 1: its second

    folder = damaged(artifact_of("tiny_bert", "onnx:fp32"), tmp_path / "a", change)
    found = first_divergence(open_artifact(folder), tiny_bert, IDS % 30)
    assert found is not None
    assert found.name.startswith("encoder.layer.1")


@pytest.mark.parametrize("change", [another_epsilon, gate_for_up])
def test_the_verdict_says_it(
    change: Callable[[Any], None], artifact_of: Callable[[str, str], Path], tiny_llama: Path, sentences: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 64, 8)]
    reference = make_reference(tiny_llama, tmp_path / "r", texts=texts, window=48, threads=1)
    folder = damaged(artifact_of("tiny_llama", "onnx:fp32"), tmp_path / "a", change)
    verdict = examine(
        folder, student=tiny_llama, references={"text": reference}, work=tmp_path / "w", options=OPTIONS
    ).verdict
    failed = {check.name: check for check in verdict.failures}
    assert "weights_on_grid" not in failed
    assert failed["faithful"].first_tensor.startswith("model.layers.1.")
    assert "after model.layers.0 agrees" in failed["faithful"].reason


def test_a_graph_that_can_not_be_looked_into_is_said(
    artifact_of: Callable[[str, str], Path], tiny_llama: Path, tmp_path: Path
) -> None:
    def change(graph: Any) -> None:
        graph.node[3].op_type = "NoSuchOperator"

    folder = damaged(artifact_of("tiny_llama", "onnx:fp32"), tmp_path / "a", change)
    with pytest.raises(BadInput, match="inner values can't be read"):
        first_divergence(open_artifact(folder), tiny_llama, IDS)


def test_the_error_is_a_mean_over_tokens() -> None:
    expected = np.array([[3.0, 4.0], [3000.0, 4000.0]], np.float32)
    found = expected + np.array([[0.5, 0.0], [0.0, 0.0]], np.float32)
    assert relative_error(found, expected) == pytest.approx(0.05)
