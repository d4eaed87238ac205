import pytest

from edgestill.bench.gates import gates_exit_code, judge
from edgestill.bench.records import Measurement, Summary
from edgestill.errors import RecipeError
from edgestill.recipe import GateConfig


def row(metric="kl", value=0.1, low=None, high=None, **changes):
    facts = {
        "subject": "onnx-int4", "unit": "", "source": "measured", "samples": (), "artifact_id": "0",
        "runtime": "onnxruntime", "runtime_version": "1", "backend": "cpu", "device": "here", "threads": 1,
        "protocol": {}, "environment": {}, "summary": Summary(value, "mean", 10, low, high),
    }  # fmt: skip
    return Measurement(metric=metric, **{**facts, **changes})


@pytest.mark.parametrize(
    ("gate", "low", "high", "outcome", "code"),
    [
        (GateConfig(max=0.2), 0.05, 0.15, "pass", 0),
        (GateConfig(max=0.12), 0.05, 0.15, "inconclusive", 3),
        (GateConfig(max=0.04), 0.05, 0.15, "fail", 1),
        (GateConfig(min=0.05), 0.05, 0.15, "pass", 0),
        (GateConfig(min=0.12), 0.05, 0.15, "inconclusive", 3),
        (GateConfig(min=0.2), 0.05, 0.15, "fail", 1),
        (GateConfig(max=0.1), None, None, "pass", 0),
        (GateConfig(max=0.09), None, None, "fail", 1),
    ],
)
def test_the_bound_of_the_interval_decides(gate, low, high, outcome, code):
    results = judge([row(low=low, high=high)], {"kl": gate})
    assert [r.outcome for r in results] == [outcome]
    assert gates_exit_code(results) == code
    assert bool(results[0].reason) == (outcome != "pass")


def test_two_limits_are_two_results_and_failure_wins():
    results = judge([row(low=0.05, high=0.15)], {"kl": GateConfig(min=0.12, max=0.01)})
    assert [r.outcome for r in results] == ["inconclusive", "fail"]
    assert gates_exit_code(results) == 1


def test_teacher_counts_where_both_were_taken():
    rows = [row(value=0.1, against="student"), row(value=0.3, against="teacher")]
    assert [r.value for r in judge(rows, {"kl": GateConfig(max=0.2)})] == [0.3]


def test_baselines_are_judged_only_when_named():
    rows = [row(), row(subject="teacher", runtime="torch", value=9.0)]
    assert {r.subject for r in judge(rows, {"kl": GateConfig(max=0.2)})} == {"onnx-int4"}
    named = judge(rows, {"kl": GateConfig(max=0.2)}, subjects=["teacher"])
    assert [(r.subject, r.outcome) for r in named] == [("teacher", "fail")]


def test_what_can_not_be_taken_is_told_with_its_reason():
    rows = [row("latency_ms", summary=None, reason="a program that is only interpreted has no latency")]
    (result,) = judge(rows, {"latency_ms": GateConfig(max=5)})
    assert (result.outcome, result.reason) == ("not_measured", "a program that is only interpreted has no latency")
    assert gates_exit_code([result]) == 0


def test_a_gate_that_nothing_answers_is_inconclusive():
    (result,) = judge([row("kl")], {"cosine": GateConfig(min=0.9)})
    assert (result.subject, result.outcome) == ("onnx-int4", "inconclusive")
    (result,) = judge([], {"cosine": GateConfig(min=0.9)})
    assert gates_exit_code([result]) == 3


def test_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError, match="top1_agreement"):
        judge([row()], {"top1_agrement": GateConfig(min=0.9)})


@pytest.mark.parametrize(
    ("launches", "low", "outcome"), [(1, 1.0, "inconclusive"), (5, None, "inconclusive"), (5, 1.0, "pass")]
)
def test_a_time_that_was_taken_once_decides_nothing(launches, low, outcome):
    """Launches differ by themselves; what was taken alone in a run of several has its own interval."""
    once = row(
        "latency_ms", summary=Summary(2.0, "median", 9, low, low and 3.0), samples=((2.0,) * 9,),
        protocol={"launches": launches},
    )  # fmt: skip
    (result,) = judge([once], {"latency_ms": GateConfig(max=5)})
    assert (result.outcome, result.value) == (outcome, 2.0)
    assert ("raise" in result.reason) == (outcome == "inconclusive")
