from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgestill.bench.records import read_measurements
from edgestill.bench_import import ImportRequest, import_results
from edgestill.errors import BadInput
from edgestill.show import show

NOTE = {"tool": "xcode-coreml-performance-report", "model": "a.mlpackage", "device": "iPhone 15 Pro",
        "prediction_ms": [2.0, 2.5, 3.0]}  # fmt: skip


def test_rows_are_added_once_and_a_bad_file_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = tmp_path / "a 'note'.json", tmp_path / "m.jsonl"
    good.write_text(json.dumps(NOTE))
    result = import_results(ImportRequest((good,), out=out))
    assert read_measurements(out) == list(result.measurements)
    import_results(ImportRequest((good,), out=out))
    assert len(read_measurements(out)) == 1
    (tmp_path / "bad.json").write_text("{}")
    before = out.read_bytes()
    with pytest.raises(BadInput):
        import_results(ImportRequest((good, tmp_path / "bad.json"), device="other", out=out))
    assert out.read_bytes() == before
    show(result)
    told = capsys.readouterr().err
    assert "measured by xcode" in told
    assert "iPhone 15 Pro" in told
