from __future__ import annotations

from typing import Any

import pytest

from edgestill.artifact import Task
from edgestill.bench.metrics import METRICS
from edgestill.bench.pick import Candidate, pareto_front, pick
from edgestill.bench.records import Check, Measurement, Summary, Verdict
from edgestill.errors import UsageError


def row(subject: str, metric: str, value: float | None, **more: Any) -> Measurement:
    summary = None if value is None else Summary(value, "median", 1)
    return Measurement(
        subject=subject, metric=metric, unit=METRICS[metric].unit, source="measured", summary=summary, samples=(),
        artifact_id="0" * 64, runtime="onnxruntime", runtime_version="1", backend="cpu", device="d", threads=2,
        protocol={}, environment={}, **more,
    )  # fmt: skip


def verdict(subject: str, level: str = "device_verified") -> Verdict:
    checks = (Check("cosine", "faithful", level != "failed", 0.5, 0.99, "at_least"),)
    return Verdict("0" * 64, subject, level, checks, "onnxruntime", "1.32.0", "cpu", "d")  # type: ignore[arg-type]


def facts(name: str, size: float, spearman: float, latency: float | None) -> list[Measurement]:
    return [
        row(name, "model_bytes", size),
        row(name, "spearman", spearman, against="teacher", data="x"),
        row(name, "spearman", 0.1, against="student", data="x"),  # never the teacher's number
        row(name, "latency_ms", latency, reason=None if latency else "only interpreted here"),
    ]


TEACHER = [row("teacher", "model_bytes", 90e6), row("teacher", "latency_ms", 20.0)]
ONE = [Candidate("a", "onnx"), Candidate("b", "onnx")]
TASK: Task = "feature-extraction"


def test_the_smaller_of_two_equally_accurate_ones() -> None:
    rows = [*TEACHER, *facts("a", 60e6, 0.910, 10.0), *facts("b", 20e6, 0.905, 10.0)]
    choice = pick(ONE, rows, [verdict("a"), verdict("b")], task=TASK)
    assert choice.name == "b"
    assert choice.sentence == (
        "Ship b: 20.0 MB, 4.5× smaller than the teacher; Spearman to the teacher 0.9050 on x; 10.00 ms, 2.0× as fast "
        "as the teacher in onnxruntime; verified in onnxruntime 1.32.0."
    )
    assert choice.front == ("a", "b")


def test_accuracy_is_not_traded_for_size() -> None:
    rows = [*facts("a", 60e6, 0.91, 10.0), *facts("b", 10e6, 0.85, 5.0)]
    assert pick(ONE, rows, [verdict("a"), verdict("b")], task=TASK).name == "a"


def test_a_failed_artifact_is_never_shipped_however_small() -> None:
    rows = [*facts("a", 60e6, 0.91, 10.0), *facts("b", 10e6, 0.95, 1.0)]
    choice = pick(ONE, rows, [verdict("a"), verdict("b"), verdict("b", "failed")], task=TASK)
    assert choice.name == "a"
    assert choice.rejected == {"b": "failed verification (cosine)"}
    assert "b" not in choice.front


def test_an_unverified_or_gated_artifact_is_never_shipped() -> None:
    rows = [*facts("a", 60e6, 0.91, 10.0), *facts("b", 10e6, 0.91, 1.0)]
    choice = pick(ONE, rows, [verdict("b")], task=TASK, blocked={"b": "fails the gate on size_bytes"})
    assert choice.name is None
    assert choice.sentence == "Nothing to ship: a was not verified (and 1 more can't be shipped)."
    assert choice.rejected == {"a": "was not verified", "b": "fails the gate on size_bytes"}


def test_what_ran_here_is_preferred_and_each_format_has_its_own_choice() -> None:
    candidates = [Candidate("a", "onnx"), Candidate("c", "coreml")]
    rows = [*facts("a", 60e6, 0.91, 10.0), *facts("c", 10e6, 0.91, None)]
    choice = pick(candidates, rows, [verdict("a"), verdict("c", "program_verified")], task=TASK)
    assert choice.name == "a"
    assert choice.by_format == {"onnx": "a", "coreml": "c"}
    alone = pick(candidates[1:], rows, [verdict("c", "program_verified")], task=TASK)
    assert alone.name == "c"
    assert "not yet on a device" in alone.sentence


def test_generation_is_judged_by_kl_and_decoded_tokens() -> None:
    rows = [row("teacher", "model_bytes", 270e6), row("teacher", "decode_tokens_per_s", 20.0)]
    for name, size, kl, rate in (("a", 200e6, 0.300, 30.0), ("b", 80e6, 0.330, 60.0), ("c", 50e6, 0.9, 90.0)):
        rows += [row(name, "model_bytes", size), row(name, "kl", kl, against="teacher"),
                 row(name, "decode_tokens_per_s", rate)]  # fmt: skip
    candidates = [Candidate(name, "gguf") for name in "abc"]
    choice = pick(candidates, rows, [verdict(name) for name in "abc"], task="text-generation")
    assert choice.name == "b"
    assert "KL to the teacher 0.33 nats/token; 60 tokens/s, 3.0× as fast as the teacher" in choice.sentence


def test_the_front_is_that_of_a_double_loop() -> None:
    import random

    chooser = random.Random(0)
    points = {str(i): [chooser.randint(0, 9) for _ in range(3)] for i in range(60)}
    expected = []
    for name, point in points.items():
        beaten = False
        for other in points.values():
            no_worse = other[0] <= point[0] and other[1] <= point[1] and other[2] <= point[2]
            beaten = beaten or (no_worse and other != point)
        if not beaten:
            expected.append(name)
    assert list(pareto_front(points)) == expected


def test_nothing_to_choose_from() -> None:
    with pytest.raises(UsageError, match="no artifact"):
        pick([], [], [], task=TASK)
