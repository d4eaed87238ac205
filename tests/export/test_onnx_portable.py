"""Decoders in standard ONNX operators: in ONNX's own reference implementation, in ONNX Runtime, and against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.checkpoints import load_torch
from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.quantisation_onnx import parse
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions

onnx = pytest.importorskip("onnx")
MODELS = ("tiny_llama", "tiny_gemma3", "tiny_gpt2")


def _logits(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return np.asarray(load_torch(folder)(**given).logits.numpy())


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("portable") / request.param
    return folder, export(folder, out, ExportConfig(to="onnx:fp32-portable"))


def test_it_is_a_standard_model(made: tuple[Path, Artifact]) -> None:
    model = onnx.load(made[1].entry)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]


def test_the_reference_implementation_computes_what_torch_does(made: tuple[Path, Artifact]) -> None:
    """Prefill of 13 tokens, then three more with the cache that came out, without any runtime."""
    from onnx.reference import ReferenceEvaluator

    folder, artifact = made
    evaluator = ReferenceEvaluator(onnx.load(artifact.entry))
    ids = np.random.default_rng(3).integers(3, 300, (1, 16))
    want = _logits(folder, ids, np.ones_like(ids))
    past = [spec for spec in artifact.manifest.inputs if spec.name.startswith("past")]
    cache = {spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32) for spec in past}
    for begin, end in ((0, 13), (13, 16)):
        mask = np.ones((1, end), np.int64)
        logits, *present = evaluator.run(None, {"input_ids": ids[:, begin:end], "attention_mask": mask, **cache})
        assert np.abs(logits - want[:, begin:end]).max() < 1e-4
        assert all(value.shape[2] == end for value in present)
        cache = dict(zip(cache, present, strict=True))


def test_onnx_runtime_pads_and_decodes_as_torch_does(made: tuple[Path, Artifact]) -> None:
    folder, artifact = made
    session = OrtSession(artifact, SessionOptions(threads=1))
    ids = np.random.default_rng(0).integers(3, 300, (3, 40))
    mask = (np.arange(40) < np.array([[40], [11], [1]])).astype(np.int64)
    assert np.abs(session.forward(ids, mask) - _logits(folder, ids, mask))[mask == 1].max() < 1e-4
    prompt = ids[0, :11].tolist()
    tokens = list(session.decode(prompt, 24, logits=True))
    whole = np.array([prompt + [token.id for token in tokens[:-1]]])
    want = _logits(folder, whole, np.ones_like(whole))[0, len(prompt) - 1 :]
    assert np.abs(np.stack([token.logits for token in tokens]) - want).max() < 1e-4
    assert [token.id for token in tokens] == want.argmax(-1).tolist()


def test_half_precision_has_a_half_cache_and_float_scores(tiny_gemma3: Path, tmp_path: Path) -> None:
    artifact = export(tiny_gemma3, tmp_path / "a", ExportConfig(to="onnx:fp16-portable"))
    onnx.checker.check_model(onnx.load(artifact.entry), full_check=True)
    assert {spec.dtype for spec in artifact.manifest.inputs[2:]} == {"float16"}
    assert artifact.manifest.kv_cache_bytes_per_token == 7 * 2 * 2 * 16 * 2
    ids = np.random.default_rng(0).integers(3, 300, (1, 40))
    got = OrtSession(artifact, SessionOptions(threads=1)).forward(ids, np.ones_like(ids))
    want = _logits(tiny_gemma3, ids, np.ones_like(ids))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_what_has_no_portable_graph_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="feature-extraction"):
        export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32-portable"))
    for name in ("int4-portable", "int8-dynamic-portable"):
        with pytest.raises(ValueError, match="onnx:fp32-portable"):
            parse(name)
