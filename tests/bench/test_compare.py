from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgestill.bench.compare import Comparison, compare, find_row
from edgestill.bench.metrics import METRICS
from edgestill.bench.records import Measurement
from edgestill.bench.statistics import summarise
from edgestill.errors import UsageError


def row(subject: str, metric: str, launches: list[list[float]], floor: float | None = 0.02, **more: Any) -> Measurement:
    kind = METRICS[metric].kind
    summary = summarise(launches, "median" if kind == "speed" else "exact") if launches else None
    return Measurement(
        subject=subject, metric=metric, unit=METRICS[metric].unit, source="measured", summary=summary,
        samples=tuple(tuple(launch) for launch in launches), artifact_id="0" * 64, runtime="r", runtime_version="1",
        backend="cpu", device="d", threads=2, protocol={"noise_floor": floor}, environment={}, **more,
    )  # fmt: skip


def times(center: float, seed: int) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    return [[float(x) for x in generator.normal(center, center * 0.005, 20)] for _ in range(3)]


def only(rows: list[Comparison]) -> Comparison:
    assert len(rows) == 1
    return rows[0]


def test_half_the_latency_is_better_with_its_interval() -> None:
    found = only(compare([row("teacher", "latency_ms", times(10, 1)), row("a", "latency_ms", times(5, 2))], "teacher"))
    assert found.outcome == "better"
    assert found.ratio == pytest.approx(0.5, rel=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.ratio < found.high  # type: ignore[operator]


def test_more_tokens_a_second_is_better_too() -> None:
    rows = [row("teacher", "decode_tokens_per_s", times(50, 1)), row("a", "decode_tokens_per_s", times(100, 2))]
    assert only(compare(rows, "teacher")).outcome == "better"
    assert only(compare(rows, "a")).outcome == "worse"


def test_a_difference_below_the_noise_floor_means_nothing() -> None:
    rows = [row("teacher", "latency_ms", times(10, 1)), row("a", "latency_ms", times(9.5, 2))]
    assert only(compare(rows, "teacher")).outcome == "better"
    noisy = [row(r.subject, "latency_ms", [list(x) for x in r.samples], floor=0.10) for r in rows]
    assert only(compare(noisy, "teacher")).outcome == "same"


def test_sizes_are_exact() -> None:
    found = only(compare([row("teacher", "model_bytes", [[100.0]]), row("a", "model_bytes", [[25.0]])], "teacher"))
    assert (found.ratio, found.low, found.outcome) == (0.25, None, "better")


def test_what_was_not_measured_is_unknown_with_the_reason() -> None:
    rows = [row("teacher", "latency_ms", times(10, 1)), row("p", "latency_ms", [], reason="only interpreted here")]
    found = only(compare(rows, "teacher"))
    assert (found.outcome, found.ratio, found.reason) == ("unknown", None, "only interpreted here")
    assert only(compare(rows, "p")).reason == "p: only interpreted here"


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(UsageError, match="'techer'") as caught:
        compare([row("teacher", "latency_ms", times(10, 1))], "techer")
    assert "teacher" in caught.value.hint


def test_rows_are_found_by_reference_and_data() -> None:
    rows = [row("a", "kl", [[1.0]], against="student", data="x"), row("a", "kl", [[2.0]], against="teacher", data="y")]
    assert find_row(rows, "a", "kl", against="teacher") is rows[1]
    assert find_row(rows, "a", "kl", data="x") is rows[0]
    assert find_row(rows, "b", "kl") is None
