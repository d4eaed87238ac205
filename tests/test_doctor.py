from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from edgestill.doctor import doctor


def test_what_is_installed_is_found() -> None:
    report = doctor()
    found = {finding.name: finding for finding in report.findings}
    assert report.ready
    assert found["onnxruntime"].available
    assert found["onnxruntime"].version
    assert found["onnxruntime"].install is None
    assert found["host"].kind == "target"


def test_what_is_missing_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without_llama(name: str, *rest: Any) -> Any:
        return None if name == "llama_cpp" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_llama)
    report = doctor()
    missing = next(finding for finding in report.findings if finding.name == "llama-cpp-python")
    assert not missing.available
    assert missing.install == "pip install 'edgestill[runtimes]'"
    assert not report.ready


def test_a_runtime_that_does_not_load_is_not_available() -> None:
    report = doctor(deep=True, loads=lambda module: "ImportError: broken" if module == "onnxruntime" else "")
    broken = next(finding for finding in report.findings if finding.name == "onnxruntime")
    assert not broken.available
    assert broken.note == "ImportError: broken"
