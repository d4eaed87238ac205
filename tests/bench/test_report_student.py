"""The student card: what stands in its tables and charts, and that nothing in it is markup."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.bench.calibration import reliability
from edgestill.bench.fidelity import Estimate, expected_calibration_error, mean_estimate
from edgestill.bench.records import Measurement, Summary
from edgestill.bench.report import DistillFacts, ModelFacts, RunFacts, build_report
from edgestill.bench.report.context import panels
from edgestill.bench.report.plots import reliability_chart
from edgestill.bench.report.student import calibration_plots, cost_rows, student_tables
from edgestill.bench.robustness import NoiseRow
from edgestill.runtimes.session import SessionInfo

INFO = SessionInfo("torch", "2.13.0", "cpu", "text-generation", (), 100, 64)
MODEL = ModelFacts("teacher", "llama", 100, 4, 32, 100, 400, "aa" * 32, "Apache-2.0")
CURVE = [
    {"step": 0, "tokens": 0, "dev": {"kl": 3.0}},
    *({"step": n, "tokens": 50 * n, "loss": 3.0 / n, "forward_kl": 3.0 / n, "learning_rate": 1e-3} for n in (1, 2, 3)),
    {"step": 3, "tokens": 150, "dev": {"kl": 0.5}},
]
COST = {"teacher_forward_tokens": 12_345, "teacher_generated_tokens": 0, "student_forward_tokens": 150}


def measured(subject: str, estimate: Estimate, data: str = "words") -> Measurement:
    return estimate.measurement(
        subject=subject, artifact_id="0" * 64, info=INFO, device="d", threads=1, environment={},
        against=None if subject == "teacher" else "teacher", data=data,
    )  # fmt: skip


def rows(data: str = "words") -> list[Measurement]:
    rng = np.random.default_rng(0)
    found = []
    for subject, sharp in (("teacher", 1.0), ("student", 2.0), ("untrained-cut", 4.0)):
        confidence = rng.uniform(0.1, 1, 300)
        right = rng.random(300) < confidence**sharp
        found.append(measured(subject, expected_calibration_error(confidence, right), data))
        found.append(measured(subject, mean_estimate("next_token_accuracy", right), data))
        if subject != "teacher":
            found.append(measured(subject, Estimate("kl", Summary(sharp / 10, "mean", 300, 0.1, 0.5)), data))
    return found


def run(**more: Any) -> RunFacts:
    noise = [
        NoiseRow(subject, kind, "words", metric, value, 120, value - 0.01, value + 0.01)
        for kind, worse in (("clean", 0.0), ("typos", 0.2), ("case", 0.1))
        for subject, metric, value in (
            ("teacher", "next_token_accuracy", 0.6 - worse), ("student", "next_token_accuracy", 0.5 - worse),
            ("student", "kl", 0.3 + worse),
        )
    ]  # fmt: skip
    values: dict[str, Any] = {
        "name": "tiny", "task": "text-generation", "teacher": MODEL,
        "student": dataclasses.replace(MODEL, name="student", layers=2), "artifacts": [], "recipe_text": "",
        "recipe_sha256": "cc" * 32, "noise": noise,
        "distill": DistillFacts({"forward_kl": 1.0}, 3, 1.5, 150, (0, 3), 4, {"kl": 3.0}, {"kl": 0.5}, CURVE, COST),
    }  # fmt: skip
    return RunFacts(**{**values, **more})


def test_three_models_side_by_side() -> None:
    fidelity, noise = student_tables(run(), rows())
    assert [name for name, _ in fidelity.rows] == ["teacher", "student", "untrained cut"]
    assert fidelity.columns == ("KL to teacher · words", "Next token right · words", "ECE · words")
    assert fidelity.rows[0][1][0] == ("—", ""), "a teacher has no distance to itself"
    assert fidelity.rows[1][1][0] == ("0.2", "0.1 – 0.5")
    assert [name for name, _ in noise.rows] == ["clean", "typos", "case"]
    assert noise.columns == ("KL to teacher · student", "Next token right · teacher", "Next token right · student")
    assert noise.rows[1][1] == (("0.5", "0.49 – 0.51"), ("40.0%", "39.0% – 41.0%"), ("30.0%", "29.0% – 31.0%"))
    assert "n = 120" in noise.note


def test_an_encoder_that_read_the_same_tokens_says_so() -> None:
    figures = (("clean", "spearman", 0.9), ("case", "spearman", 0.9), ("typos", "self_cosine", 0.8))
    noise = [NoiseRow("student", kind, "w", metric, value, 20) for kind, metric, value in figures]
    [table] = student_tables(run(noise=noise), [])
    cells = dict(table.rows)
    assert cells["case"][1] == ("same tokens", "")
    assert cells["clean"][1] == ("—", "")
    assert cells["typos"] == (("—", ""), ("0.8000", ""))


def test_the_reliability_chart_draws_each_point_where_it_belongs() -> None:
    svg = reliability_chart({"student": [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)]}, label="r")
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]+)"', svg)[0].split()]
    (left, bottom), (x, y), (right, top) = points
    assert (x - left) / (right - left) == pytest.approx(0.5, abs=0.01)
    assert (y - bottom) / (top - bottom) == pytest.approx(0.25, abs=0.01)
    assert bottom > top, "accuracy rises upwards"
    assert svg.count('class="end"') == 3
    assert reliability_chart({}, label="r") == ""


def test_calibration_plots_show_the_measured_curves() -> None:
    [plot] = calibration_plots(run(), rows())
    assert plot.names == ("teacher", "student", "untrained-cut")
    assert "of the next token" in plot.caption
    student = next(r for r in rows() if r.subject == "student" and r.metric == "ece")
    assert student.summary is not None
    assert f"student {student.summary.value:.2%}" in plot.caption
    confidence = np.array(student.samples[0])
    assert (
        student.protocol["reliability"]["counts"] == reliability(confidence, confidence, scheme="equal_mass").counts
    )  # 300 examples: 15 bins of 20


def test_training_curves_are_over_tokens() -> None:
    charts = {panel.title: panel.svg for panel in panels(run())}
    assert set(charts) == {"forward kl", "learning rate", "dev kl"}
    assert ">tokens<" in charts["forward kl"]
    assert ">150<" in charts["dev kl"]
    assert list(charts)[-1] == "dev kl"
    old = [{key: value for key, value in row.items() if key != "tokens"} for row in CURVE]
    distill = dataclasses.replace(run().distill, curve=old)  # type: ignore[type-var]
    assert ">step<" in panels(run(distill=distill))[0].svg


def test_cost_is_in_tokens_of_both() -> None:
    assert dict(cost_rows(run())) == {
        "optimiser steps": "3", "tokens learnt from": "150", "tokens that the teacher read": "12,345",
        "tokens that the student read": "150", "training time": "2 s",
    }  # fmt: skip
    assert cost_rows(run(distill=None)) == []


def test_report_and_card_say_the_same(tmp_path: Path) -> None:
    files = build_report(run(), rows(), [], [], tmp_path)
    page, card = files.html.read_text(), files.card.read_text()
    for text in (page, card):
        assert "Robustness on words" in text
        assert "39.0% – 41.0%" in text
        assert "12,345" in text
    assert page.count('class="model ') == 3
    assert "| typos | 0.5 (0.49 – 0.51) |" in card
    again = build_report(run(), rows(), [], [], tmp_path)
    assert again.html.read_text() == page


def test_names_of_data_sets_are_text(tmp_path: Path) -> None:
    bad = "<script>x</script>|`"
    noise = [dataclasses.replace(row, data=bad) for row in run().noise]
    files = build_report(run(noise=noise), rows(bad), [], [], tmp_path)
    assert "<script>" not in files.html.read_text()
    assert "<script>" not in files.card.read_text()
    assert "\\|" in files.card.read_text()


def test_no_student_no_card(tmp_path: Path) -> None:
    files = build_report(run(student=None, distill=None, noise=()), [], [], [], tmp_path)
    assert "Student card" not in files.html.read_text()
    assert "Student card" not in files.card.read_text()
