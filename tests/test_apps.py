"""Samples beside exported artifacts: written for what passed, refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.commands import ExportRequest, export_verified
from edgestill.errors import Unsupported, UsageError
from edgestill.stages import Observer


class Listener(Observer):
    def __init__(self) -> None:
        self.done: list[str] = []
        self.same: list[str] = []

    def finished(self, name: str, seconds: float, note: str) -> None:
        self.done.append(name)

    def unchanged(self, name: str, title: str, note: str) -> None:
        self.same.append(name)


def test_samples_stand_beside_the_artifacts(tiny_bert: Path, tmp_path: Path) -> None:
    request = ExportRequest(tiny_bert, ("onnx:fp32",), tmp_path / "out", threads=1, app=("python", "kotlin"))
    listener = Listener()
    result = export_verified(request, listener)
    assert result.exit_code == 0
    sample = tmp_path / "out/app/onnx-fp32/python/sample.py"
    assert '"../../../artifacts/onnx-fp32"' in sample.read_text()
    assert (tmp_path / "out/app/onnx-fp32/kotlin/Sample.kt").is_file()
    assert not list((tmp_path / "out/artifacts").rglob("*.py"))
    again = Listener()
    export_verified(request, again)
    assert {name for name in again.same if name.startswith("app:")} == {"app:onnx-fp32:python", "app:onnx-fp32:kotlin"}

    elsewhere = ExportRequest(
        tiny_bert, ("onnx:fp32",), tmp_path / "out", threads=1, app=("swift",), app_out=tmp_path / "elsewhere"
    )
    third = Listener()
    export_verified(elsewhere, third)
    assert (tmp_path / "elsewhere/onnx-fp32/swift/Sample.swift").is_file()
    assert "export:onnx-fp32" in third.same, "a sample is no reason to export anew"


def test_what_can_not_be_is_said_before_the_work(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no kotlin sample for gguf"):
        export_verified(ExportRequest(tiny_bert, ("gguf:f16",), tmp_path / "out", app=("kotlin",)), Observer())
    with pytest.raises(UsageError, match="no sample in 'rust'"):
        export_verified(ExportRequest(tiny_bert, ("onnx:fp32",), tmp_path / "out", app=("rust",)), Observer())
    assert not (tmp_path / "out").exists()
