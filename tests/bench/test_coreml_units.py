"""The comparison on a Mac, with a stand-in for Apple's ``predict``: it was not run on a Mac."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.bench.coreml_units import compare_units
from edgestill.bench.limits import faithful_for
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes import coreml_session
from edgestill.runtimes.coreml_session import COMPUTE_UNITS, NativeCoreMLSession, open_coreml
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import load_program
from edgestill.runtimes.session import SessionOptions


class _Unit:
    """Apple's ``MLModel``, as far as we use it. The GPU is right, the CPU a last bit off, the Neural Engine wrong, and
    all together do not load."""

    def __init__(self, path: str, compute_units: str) -> None:
        if compute_units == "all":
            raise RuntimeError("Error compiling model\nlong trace")
        self._unit, self._interpreter = compute_units, Interpreter(load_program(Path(path)))

    def predict(self, data: Mapping[str, Any]) -> dict[str, Any]:
        said = self._interpreter.run(data)
        change = {"gpu": 1.0, "cpu": 1 + 2.0**-11, "ne": -1.0}[self._unit]
        return {name: value * np.float32(change) for name, value in said.items()}


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    units = SimpleNamespace(ALL="all", CPU_ONLY="cpu", CPU_AND_GPU="gpu", CPU_AND_NE="ne")
    fake = SimpleNamespace(models=SimpleNamespace(MLModel=_Unit), ComputeUnit=units)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coreml_session, "import_coremltools", lambda: fake)


@pytest.fixture(scope="module")
def classifier(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_classifier, tmp_path_factory.mktemp("units") / "cls", ExportConfig(to="coreml:fp16"))


@pytest.mark.usefixtures("on_a_mac")
def test_each_unit_is_judged_alone(classifier: Artifact) -> None:
    opened = []

    @contextlib.contextmanager
    def open_on(backend: str) -> Iterator[Any]:
        session = open_coreml(classifier, SessionOptions(backend=backend))
        opened.append((backend, isinstance(session, NativeCoreMLSession)))
        yield session
        session.close()

    limits = faithful_for(classifier.manifest, frozenset({"float16"}))
    ids = np.arange(5, 17, dtype=np.int64)
    checks = {check.name: check for check in compare_units("text-classification", ids, limits, open_on)}
    assert opened == [("mil-interpreter", False), ("CPU_AND_GPU", True), ("CPU_AND_NE", True), ("CPU_ONLY", True)]
    assert set(checks) == {f"compute_unit_{unit.lower()}" for unit in COMPUTE_UNITS}
    assert {name: check.passed for name, check in checks.items()} == {
        "compute_unit_all": False, "compute_unit_cpu_and_gpu": True, "compute_unit_cpu_only": True,
        "compute_unit_cpu_and_ne": False,
    }  # fmt: skip
    assert checks["compute_unit_cpu_and_gpu"].value == pytest.approx(0, abs=1e-12)
    small, large = checks["compute_unit_cpu_only"].value, checks["compute_unit_cpu_and_ne"].value
    assert small is not None
    assert large is not None
    assert 0 < small < 1e-6 < limits.divergence < large
    assert "Core ML can't load it: Error compiling model" in checks["compute_unit_all"].reason
    assert "12 tokens, Core ML on CPU_ONLY" in checks["compute_unit_cpu_only"].reason
