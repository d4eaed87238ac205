from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgestill.bench.metrics import METRICS
from edgestill.bench.predict_calibration import Calibration, Ratio, calibrate, load_calibration, save_calibration
from edgestill.bench.predict_work import Work
from edgestill.bench.records import Measurement, Summary
from edgestill.errors import BadInput, UsageError

WORKS = {
    "gguf": Work("llama.cpp", "text-generation", 100, 100, 0, 120, 64),
    "onnx": Work("onnxruntime", "text-generation", 200, 200, 0, 220, 64),
}


def row(subject: str, metric: str, values: list[float], busy: bool = False) -> Measurement:
    return Measurement(
        subject, metric, METRICS[metric].unit, "measured", Summary(values[0], "median", len(values)),
        tuple((value,) for value in values), "0" * 64, "r", "1", "cpu", "d", 1, {"length": 16, "new_tokens": 8},
        {"busy": busy},
    )  # fmt: skip


def test_at_equal_speed_twice_the_bytes_is_twice_the_bandwidth() -> None:
    rows = [row("gguf", "decode_tokens_per_s", [50, 50, 50]), row("onnx", "decode_tokens_per_s", [50, 50, 50])]
    found = calibrate(WORKS, rows, machine="here")
    [ratio] = found.ratios
    assert (ratio.engine, ratio.what, ratio.subjects) == ("onnxruntime", "decode", 1)
    assert math.exp(ratio.log_ratio) == pytest.approx(2.0)
    carried = found.ratio("onnxruntime", "decode")
    assert carried is not None
    assert carried[0] == pytest.approx(2.0)
    assert carried[1] > 0.01  # other devices differ
    assert found.ratio("onnxruntime", "prefill") is None
    assert not found.busy


def test_launches_that_differ_are_doubt_and_a_busy_machine_is_said() -> None:
    rows = [row("gguf", "decode_tokens_per_s", [50, 60, 40]), row("onnx", "decode_tokens_per_s", [50, 50, 50], True)]
    found = calibrate(WORKS, rows, machine="here")
    assert found.ratios[0].variance > 0.005
    assert found.busy


def test_one_runtime_alone_is_no_comparison() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        calibrate(WORKS, [row("onnx", "decode_tokens_per_s", [50, 50])], machine="here")


def test_written_read_and_damaged(tmp_path: Path) -> None:
    calibration = Calibration("a 'machine'", True, (Ratio("onnxruntime", "decode", -0.2, 0.01, 2),))
    path = save_calibration(calibration, tmp_path / "calibration.json")
    assert load_calibration(path) == calibration
    assert load_calibration(tmp_path / "none.json") is None
    for damage in ("{", "[]", "{}", path.read_text().replace("-0.2", '"x"'), path.read_text().replace("0.01", "-1")):
        path.write_text(damage)
        with pytest.raises(BadInput):
            load_calibration(path)
