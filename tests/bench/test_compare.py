from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgestill.bench.compare import Comparison, compare, decide, find_row
from edgestill.bench.metrics import METRICS
from edgestill.bench.records import Measurement
from edgestill.bench.statistics import summarise
from edgestill.errors import UsageError


def row(
    subject: str,
    metric: str,
    launches: list[list[float]],
    floor: float | None = 0.02,
    *,
    busy: bool = False,
    **more: Any,
) -> Measurement:
    kind = METRICS[metric].kind
    summary = summarise(launches, "median" if kind in ("speed", "energy") else "exact") if launches else None
    return Measurement(
        subject=subject, metric=metric, unit=METRICS[metric].unit, source="measured", summary=summary,
        samples=tuple(tuple(launch) for launch in launches), artifact_id="0" * 64, runtime="r", runtime_version="1",
        backend="cpu", device="d", threads=2, protocol={"noise_floor": floor}, environment={"busy": busy}, **more,
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
    found = only(compare(noisy, "teacher"))
    assert found.outcome == "inconclusive"
    assert "noise floor of 10.0%" in found.reason


def shifted(factor: float) -> list[list[float]]:
    """Launches that differ by 1 % from one to the next, the same in every subject: what pairing takes away."""
    return [[factor * (1 + drift)] * 4 for drift in (0.0, 0.01, -0.01, 0.005)]


def test_what_all_launches_share_cancels() -> None:
    rows = [row("teacher", "latency_ms", shifted(10)), row("a", "latency_ms", shifted(10.3))]
    found = only(compare(rows, "teacher"))
    assert (found.outcome, found.ratio) == ("worse", pytest.approx(1.03))
    assert found.high - found.low < 1e-9  # type: ignore[operator]


def test_equal_within_the_resolution_is_the_same_and_noise_is_not() -> None:
    base = row("teacher", "latency_ms", times(10, 1))
    assert only(compare([base, row("a", "latency_ms", times(10.01, 2))], "teacher")).outcome == "same"
    wild = [[9.0] * 5, [11.0] * 5, [10.0] * 5]
    assert only(compare([base, row("a", "latency_ms", wild)], "teacher")).outcome == "inconclusive"


def test_a_busy_machine_shows_differences_and_proves_no_equality() -> None:
    """What is 8 % apart is so there too; what looks alike need not be so on a quiet machine."""
    base, alike, other = times(10, 1), times(10.01, 2), times(10.8, 3)
    for busy, outcome, decision in ((False, "same", "pass"), (True, "inconclusive", "inconclusive")):
        rows = [row(name, "latency_ms", launches, busy=busy) for name, launches in
                (("teacher", base), ("alike", alike), ("other", other))]  # fmt: skip
        found = compare(rows, "teacher")
        assert [(c.subject, c.outcome, c.busy) for c in found] == [("alike", outcome, busy), ("other", "worse", busy)]
        assert ("busy machine" in found[0].reason) == busy
        assert [d.outcome for d in decide(found, 0.05)] == [decision, "fail"]


def test_a_single_launch_decides_nothing() -> None:
    rows = [row("teacher", "latency_ms", [[10.0] * 9]), row("a", "latency_ms", [[5.0] * 9])]
    found = only(compare(rows, "teacher"))
    assert (found.outcome, found.ratio, found.low) == ("inconclusive", 0.5, None)
    assert "a single launch" in found.reason
    assert [answer.outcome for answer in decide([found], 0.05)] == ["inconclusive"]


@pytest.mark.parametrize(
    ("metric", "value", "outcome"),
    [("latency_ms", 10.2, "pass"), ("latency_ms", 11.5, "fail"), ("latency_ms", 10.5, "inconclusive"),
     ("latency_ms", 5, "pass"), ("decode_tokens_per_s", 8.5, "fail"), ("decode_tokens_per_s", 9.9, "pass")],
)  # fmt: skip
def test_a_slowdown_is_judged_by_the_bound_of_its_interval(metric: str, value: float, outcome: str) -> None:
    found = compare([row("teacher", metric, times(10, 1)), row("a", metric, times(value, 2))], "teacher")
    (answer,) = decide(found, 0.05)
    assert (answer.outcome, answer.subject, answer.metric) == (outcome, "a", metric)


def test_a_decoder_is_judged_by_its_tokens() -> None:
    rows = [row(name, metric, times(value, seed)) for seed, (name, metric, value) in enumerate([
        ("teacher", "latency_ms", 10), ("a", "latency_ms", 20), ("teacher", "decode_tokens_per_s", 10),
        ("a", "decode_tokens_per_s", 10)])]  # fmt: skip
    assert [answer.outcome for answer in decide(compare(rows, "teacher"), 0.05)] == ["pass"]


def test_targets_are_compared_apart() -> None:
    taken = [("teacher", "host", 10), ("a", "host", 5), ("teacher", "ssh://board", 100), ("a", "ssh://board", 200)]
    rows = [row(name, "latency_ms", times(value, 3), target=target) for name, target, value in taken]
    assert [(found.target, found.outcome) for found in compare(rows, "teacher")] == [
        ("host", "better"), ("ssh://board", "worse")]  # fmt: skip


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
