from edgestill.bench.accuracy_table import accuracy_tables
from edgestill.bench.records import Measurement, Summary


def row(metric, summary, **context):
    return Measurement(
        subject=context.pop("subject", "onnx-int8"), metric=metric, unit="", source="measured", summary=summary,
        samples=(), artifact_id="0" * 64, runtime="onnxruntime", runtime_version="1", backend="cpu", device="here",
        threads=1, protocol={"independent_units": 9}, environment={}, **context,
    )  # fmt: skip


def test_metrics_down_and_references_across():
    percentiles = {"p1": -0.02, "p50": 0.0, "p99": 0.03}
    rows = [
        row("latency_ms", Summary(1.0, "median", 5)),
        row("kl", Summary(0.01234, "mean", 300, 0.01, 0.015), against="teacher", data="words"),
        row("kl", Summary(0.002, "mean", 300, 0.001, 0.003), against="student", data="words"),
        row("kl_max", Summary(1.5, "max", 300), against="teacher", data="words"),
        row(
            "delta_p",
            Summary(-0.001, "mean", 300, -0.002, 0.0, percentiles=percentiles),
            against="teacher",
            data="words",
        ),
        row("accuracy", Summary(0.5, "mean", 9, 0.2, 0.8), data="quiz"),
    ]
    words, quiz = accuracy_tables(rows)
    assert words.title == "onnx-int8 on words: 300 samples of 9 documents, onnxruntime"
    assert words.header == ("", "against teacher", "against student")
    assert {line[0]: line[1:] for line in words.rows} == {
        "KL mean": ("0.01234  [0.01, 0.015]", "0.002  [0.001, 0.003]"), "KL max": ("1.5", "—"),
        "Δp mean": ("-0.100%  [-0.200%, +0.000%]", "—"), "  p1": ("-2.000%", "—"), "  p50": ("+0.000%", "—"),
        "  p99": ("+3.000%", "—"),
    }  # fmt: skip
    assert (quiz.header, quiz.rows) == (("", "value"), (("accuracy", "50.0%  [20.0%, 80.0%]"),))
    assert all(len(line) <= 80 for table in (words, quiz) for line in ("  ".join(cells) for cells in table.rows))


def test_targets_have_tables_of_their_own():
    rows = [row("cosine", Summary(value, "mean", 9), data="words", target=target)
            for target, value in (("host", 0.5), ("ssh://board", 0.25))]  # fmt: skip
    here, there = accuracy_tables(rows)
    assert (here.title, there.title) == (
        "onnx-int8 on words: 9 samples, onnxruntime", "onnx-int8 on words: 9 samples, onnxruntime, ssh://board",
    )  # fmt: skip
    assert (here.rows, there.rows) == ((("cosine", "0.50000"),), (("cosine", "0.25000"),))


def test_what_is_missing_has_its_reason():
    import dataclasses

    lost = dataclasses.replace(row("kl", None, against="teacher", data="words"), reason="the worker died")
    [table] = accuracy_tables([lost])
    assert table.rows == ()
    assert table.reasons == ("teacher: the worker died",)
