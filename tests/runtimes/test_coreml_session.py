"""The Core ML sessions: the interpreter on real artifacts, the native one on a stand-in for Apple's runtime."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Artifact, open_artifact
from edgestill.errors import BadInput, MissingDependency, Unsupported
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes import coreml_session
from edgestill.runtimes.coreml_session import MilSession, NativeCoreMLSession, causal_mask, open_coreml
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import load_program
from edgestill.runtimes.session import Session, SessionOptions, open_session
from edgestill.runtimes.torch_session import TorchSession

RNG = np.random.default_rng(0)


def _batch(vocabulary: int) -> tuple[Any, Any]:
    ids = RNG.integers(5, vocabulary, (3, 14))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 1:] = 0
    return ids * mask, mask


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_llama, tmp_path_factory.mktemp("session") / "llama", ExportConfig(to="coreml:fp16"))


@pytest.fixture(scope="module")
def classifier(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_classifier, tmp_path_factory.mktemp("session") / "cls", ExportConfig(to="coreml:fp16"))


def test_classifier_like_torch(classifier: Artifact, tiny_classifier: Path) -> None:
    session = open_session(classifier.path)
    assert isinstance(session, MilSession)
    assert isinstance(session, Session)
    info = session.info()
    assert (info.runtime, info.backend, info.task) == ("coreml", "mil-interpreter", "text-classification")
    assert info.capabilities == ("forward", "score")
    ids, mask = _batch(info.vocab_size)
    got = session.forward(ids, mask)
    want = TorchSession(tiny_classifier).forward(ids, mask)
    assert got.dtype == np.float32
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert session.first_overflow is None
    assert all(row.peak > 0 for row in session.ranges if row.kind == "linear")
    with pytest.raises(Unsupported, match="does not decode"):
        next(session.decode([1], 1))
    session.close()
    with pytest.raises(BadInput, match="closed"):
        session.forward(ids, mask)


@pytest.mark.whole
def test_decoder_like_torch(llama: Artifact, tiny_llama: Path) -> None:
    session, torch_session = open_coreml(llama, SessionOptions()), TorchSession(tiny_llama)
    assert session.info().capabilities == ("forward", "decode", "score")
    ids, mask = _batch(session.info().vocab_size)
    got, want = session.forward(ids, mask), torch_session.forward(ids, mask)
    assert got.shape == want.shape
    real = mask.astype(bool)
    assert np.abs(got - want)[real].max() < 0.02 * np.abs(want).max()
    assert (got.argmax(-1) == want.argmax(-1))[real].all()
    assert not got[~real].any()
    prompt = ids[0].tolist()
    ours = list(session.decode(prompt, 24, logits=True))
    theirs = list(torch_session.decode(prompt, 24))
    assert [token.id for token in ours] == [token.id for token in theirs]
    assert all(token.seconds > 0 for token in ours)
    assert ours[0].logits is not None
    np.testing.assert_array_equal(ours[0].logits, got[0, -1])  # prefill and forward are one program
    again = [token.id for token in session.decode(prompt, 24)]
    assert again == [token.id for token in ours]  # nothing is left in the state
    with pytest.raises(BadInput, match="14 \\+ 115 tokens, the model takes 128"):
        session.decode(prompt, 115)


def test_causal_mask() -> None:
    mask = causal_mask(2, 5)
    assert mask.shape == (1, 1, 2, 5)
    np.testing.assert_array_equal(mask[0, 0] == 0, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert np.isfinite(mask.astype(np.float16)).all()


def test_damaged_artifacts(classifier: Artifact, llama: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier.path, copy)
    weights = next(copy.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(BadInput, match="does not match its sha256"):
        open_session(copy)
    with pytest.raises(BadInput, match="weight"):
        open_coreml(Artifact(copy, classifier.manifest), SessionOptions())
    shutil.rmtree(copy / "model.mlpackage")
    shutil.copytree(llama.entry, copy / "model.mlpackage")
    with pytest.raises(BadInput, match=r"not what artifact\.json says"):
        open_coreml(Artifact(copy, classifier.manifest), SessionOptions())


def test_unknown_backend_and_missing_package(classifier: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="no Core ML backend 'ALL' here"):
        MilSession(classifier, SessionOptions(backend="ALL"))

    def absent(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(MissingDependency, match="coremltools is not installed"):
        MilSession(classifier, SessionOptions())


class _Recorded:
    """Apple's MLModel, as far as we use it: answers by the interpreter, and keeps what it was asked."""

    calls: list[tuple[dict[str, tuple[str, tuple[int, ...]]], bool]]

    def __init__(self, path: str, compute_units: Any) -> None:
        self.units, self.calls = compute_units, []
        self._interpreter = Interpreter(load_program(Path(path)))

    def make_state(self) -> Any:
        return self._interpreter.new_state()

    def predict(self, data: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
        self.calls.append(({k: (str(v.dtype), v.shape) for k, v in data.items()}, state is not None))
        return {k: v.astype(np.float16) for k, v in self._interpreter.run(data, state).items()}


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    units = SimpleNamespace(ALL="all", CPU_ONLY="cpu", CPU_AND_GPU="gpu", CPU_AND_NE="ne")
    fake = SimpleNamespace(models=SimpleNamespace(MLModel=_Recorded), ComputeUnit=units)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coreml_session, "import_coremltools", lambda: fake)


@pytest.mark.usefixtures("on_a_mac")
def test_native_session_feeds_what_the_program_takes(llama: Artifact, classifier: Artifact) -> None:
    session = open_coreml(llama, SessionOptions(backend="CPU_ONLY"))
    assert isinstance(session, NativeCoreMLSession)
    assert isinstance(session, Session)
    info = session.info()
    assert (info.backend, info.capabilities) == ("CPU_ONLY", ("forward", "decode", "score", "latency"))
    model = session._model
    assert model.units == "cpu"
    mil = MilSession(llama, SessionOptions())
    assert [t.id for t in session.decode([7, 8, 9], 3)] == [t.id for t in mil.decode([7, 8, 9], 3)]
    masks = [call["causal_mask"] for call, _ in model.calls]
    assert masks == [("float16", (1, 1, 3, 3)), ("float16", (1, 1, 1, 4)), ("float16", (1, 1, 1, 5))]
    assert {call["input_ids"][0] for call, _ in model.calls} == {"int32"}
    assert all(has_state for _, has_state in model.calls)
    ids, mask = _batch(info.vocab_size)
    np.testing.assert_array_equal(session.forward(ids, mask), mil.forward(ids, mask))

    encoder = open_coreml(classifier, SessionOptions())
    assert isinstance(encoder, NativeCoreMLSession)
    assert encoder.info().backend == "ALL"
    assert encoder.forward(ids % 100 + 5, mask).shape == (3, 3)
    assert [has_state for _, has_state in encoder._model.calls] == [False] * 3
    encoder.close()
    with pytest.raises(BadInput, match="closed"):
        encoder.forward(ids % 100 + 5, mask)
    assert isinstance(open_coreml(llama, SessionOptions(backend="mil-interpreter")), MilSession)
    with pytest.raises(Unsupported, match="known: ALL"):
        open_coreml(llama, SessionOptions(backend="GPU"))


@pytest.mark.usefixtures("on_a_mac")
def test_native_load_failure_is_one_line(classifier: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: str, compute_units: Any) -> None:
        raise RuntimeError("Error compiling model\nlong trace")

    monkeypatch.setattr(_Recorded, "__init__", refuse)
    with pytest.raises(BadInput, match="Core ML can't load it: Error compiling model") as caught:
        open_coreml(classifier, SessionOptions())
    assert "\n" not in str(caught.value)


def test_reopened_artifact_gives_the_same_numbers(classifier: Artifact) -> None:
    ids, mask = _batch(100)
    first = MilSession(open_artifact(classifier.path), SessionOptions()).forward(ids, mask)
    second = MilSession(open_artifact(classifier.path), SessionOptions()).forward(ids, mask)
    np.testing.assert_array_equal(first, second)
