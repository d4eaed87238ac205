"""ONNX Runtime behind the session protocol."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.errors import BadInput, MissingDependency, Unsupported
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import Session, SessionOptions, open_session

ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_llama, tmp_path_factory.mktemp("ort") / "decoder", ExportConfig(to="onnx:fp32"))


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_bert, tmp_path_factory.mktemp("ort") / "encoder", ExportConfig(to="onnx:fp32"))


def test_info(decoder: Artifact, encoder: Artifact) -> None:
    info = open_session(decoder.path, ONE).info()
    assert (info.runtime, info.backend, info.task) == ("onnxruntime", "CPUExecutionProvider", "text-generation")
    assert info.capabilities == ("forward", "decode", "score", "latency")
    assert info.placement["CPUExecutionProvider"] > 10
    assert "decode" not in OrtSession(encoder, ONE).info().capabilities


def test_it_is_a_session(encoder: Artifact) -> None:
    assert isinstance(OrtSession(encoder, ONE), Session)


def test_decode_agrees_with_forward(decoder: Artifact) -> None:
    session = OrtSession(decoder, ONE)
    prompt = [4, 9, 200, 31]
    tokens = list(session.decode(prompt, 10, logits=True))
    ids = np.array([prompt + [token.id for token in tokens[:-1]]])
    logits = session.forward(ids, np.ones_like(ids))[0, len(prompt) - 1 :]
    assert [token.id for token in tokens] == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(np.stack([token.logits for token in tokens]), logits, atol=1e-4)
    assert all(token.seconds > 0 for token in tokens)
    assert tokens[0].logits is not tokens[1].logits


def test_two_decodes_do_not_share_a_cache(decoder: Artifact) -> None:
    session = OrtSession(decoder, ONE)
    first = session.decode([4, 9], 6)
    start = [next(first).id, next(first).id]
    other = [token.id for token in session.decode([100, 3, 7], 6)]
    assert start + [token.id for token in first] == [token.id for token in session.decode([4, 9], 6)]
    assert other == [token.id for token in session.decode([100, 3, 7], 6)]


def test_bad_requests(decoder: Artifact, encoder: Artifact) -> None:
    session = OrtSession(decoder, ONE)
    with pytest.raises(BadInput, match="130 tokens"):
        session.decode([1] * 100, 30)
    with pytest.raises(BadInput, match="prompt is empty"):
        session.decode([], 3)
    with pytest.raises(Unsupported, match="does not decode"):
        OrtSession(encoder, ONE).decode([1], 3)
    with pytest.raises(Unsupported, match="NoSuchProvider"):
        OrtSession(encoder, SessionOptions(backend="NoSuchProvider"))
    with pytest.raises(BadInput, match="graph_optimization"):
        OrtSession(encoder, SessionOptions(extra={"graph_optimization": "most"}))
    session.close()
    with pytest.raises(BadInput, match="closed"):
        session.forward(np.ones((1, 2), np.int64), np.ones((1, 2), np.int64))


def test_graph_optimisation_changes_no_result(encoder: Artifact) -> None:
    ids = np.arange(5, 25)[None]
    results = [
        OrtSession(encoder, SessionOptions(threads=1, extra=extra)).forward(ids, np.ones_like(ids))
        for extra in ({"graph_optimization": "none"}, {"session.x64quantprecision": "1"})
    ]
    np.testing.assert_allclose(*results, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_broken_model(content: bytes | None, encoder: Artifact, tmp_path: Path) -> None:
    broken = Artifact(shutil.copytree(encoder.path, tmp_path / "b"), encoder.manifest)
    broken.entry.write_bytes(encoder.entry.read_bytes()[:9000] if content is None else content)
    with pytest.raises(BadInput, match=r"model\.onnx"):
        OrtSession(broken, ONE)


def test_missing_runtime(encoder: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as caught:
        OrtSession(encoder, ONE)
    assert "edgestill[runtimes]" in caught.value.hint


def test_it_needs_numpy_and_onnxruntime_only(encoder: Artifact) -> None:
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from edgestill.runtimes.session import open_session\n"
        f"session = open_session(Path({str(encoder.path)!r}))\n"
        "session.forward(np.ones((1, 4), np.int64), np.ones((1, 4), np.int64))\n"
        "assert not {'torch', 'transformers', 'pydantic', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
