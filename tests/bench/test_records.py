import dataclasses
import json

import pytest

from edgestill.artifact import Artifact, append_verdict
from edgestill.bench.records import (
    Check,
    Measurement,
    Summary,
    Verdict,
    read_measurements,
    read_verdicts,
    verdict_from_json,
    write_measurements,
)
from edgestill.errors import BadInput

ROW = Measurement(
    subject="onnx-int4", metric="latency_ms", unit="ms", source="measured",
    summary=Summary(2.0, "median", 3, 1.0, 3.0, percentiles={"p90": 2.9}), samples=((1.0, 2.0), (3.0,)),
    artifact_id="a", runtime="onnxruntime", runtime_version="1.32", backend="CPUExecutionProvider", device="here",
    threads=2, protocol={"repeats": 3}, environment={"cpu": "x"}, placement={"cpu": 7},
)  # fmt: skip
CHECKS = (Check("weights", "integrity", False, 2.0, 1.0, first_tensor="w"), Check("x", "loss", True))
VERDICT = Verdict("a", "onnx-int4", "failed", CHECKS, "onnxruntime", "1.32", "cpu", "here")


def test_measurements_survive_a_round_trip(tmp_path):
    path = tmp_path / "measurements.jsonl"
    nothing = dataclasses.replace(ROW, summary=None, samples=(), reason="off the Mac")
    write_measurements(path, [ROW, nothing])
    assert read_measurements(path) == [ROW, nothing]
    assert len(path.read_text().splitlines()) == 2


def test_equal_measurements_give_equal_bytes(tmp_path):
    write_measurements(tmp_path / "a", [ROW])
    write_measurements(tmp_path / "b", [dataclasses.replace(ROW)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"subject": 1}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "measurements.jsonl"
    write_measurements(path, [ROW])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match=r"measurements\.jsonl:2"):
        read_measurements(path)
    with pytest.raises(BadInput, match=r"measurements\.jsonl:1"):
        read_verdicts(path)


def test_verdicts_are_appended_and_read_back(tmp_path):
    artifact = Artifact(tmp_path, manifest=None)
    append_verdict(artifact, dataclasses.asdict(VERDICT))
    append_verdict(artifact, dataclasses.asdict(dataclasses.replace(VERDICT, level="device_verified")))
    first, second = read_verdicts(tmp_path / "verdicts.jsonl")
    assert first == VERDICT
    assert not first.passed
    assert [check.name for check in first.failures] == ["weights"]
    assert second.passed
    assert verdict_from_json(json.loads(json.dumps(dataclasses.asdict(VERDICT)))) == VERDICT
