from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Histogram, Manifest, seal_artifact
from edgestill.bench.measure import WARMUP, Subject, measure_size, measure_speed, timed_input
from edgestill.bench.records import Measurement, read_measurements, write_measurements
from edgestill.errors import BadInput, WorkerError
from edgestill.recipe import BenchConfig
from edgestill.runtimes.session import SessionInfo, SessionOptions

IDS = np.arange(16, dtype=np.int64).reshape(1, 16)
CONFIG = BenchConfig(launches=2, repeats=5, length=16, new_tokens=4, max_seconds=5)


def make_artifact(folder: Path, form: str = "onnx", payload: bytes = b"x" * 500) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(payload)
    (folder / "tokenizer.json").write_bytes(b"t" * 100)
    manifest = Manifest(
        format=form, quantisation="int8", task="feature-extraction", entry="model.bin", inputs=(), outputs=(),  # type: ignore[arg-type]
        shapes="dynamic", max_length=64, vocab_size=100, contents="int8", minimum_runtime={}, lineage={},
        dtype_histogram={"int8": Histogram(2, 400, 400), "float32": Histogram(1, 100, 100)},
    )  # fmt: skip
    seal_artifact(folder, manifest)
    return folder


class Bench:
    """Stands in for the processes: notes every launch, and answers with times that are known."""

    def __init__(self, seconds: dict[str, float], **info: Any) -> None:
        self.seconds, self.facts = seconds, info
        self.launches: list[str] = []
        self.calls: list[tuple[str, str, int]] = []

    def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
        self.launches.append(folder.name)
        return FakeWorker(self, folder.name, options)


class FakeWorker:
    load_seconds = 0.25
    cold_load_seconds: float | None = None
    cold_reason: str | None = "a memory file system"

    def __init__(self, bench: Bench, name: str, options: SessionOptions) -> None:
        self.bench, self.name, self.options = bench, name, options

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def info(self) -> SessionInfo:
        facts: dict[str, Any] = {
            "runtime": "onnxruntime", "version": "9.9", "backend": "CPU", "task": "feature-extraction",
            "capabilities": ("forward", "latency"), "vocab_size": 100, "max_length": 64, **self.bench.facts,
        }  # fmt: skip
        return SessionInfo(**facts)

    def time_forward(self, ids: Any, mask: Any, *, repeats: int, warmup: int, max_seconds: float) -> list[float]:
        self.bench.calls.append((self.name, "forward", warmup))
        if self.bench.seconds[self.name] < 0:
            raise WorkerError("the worker died: Aborted\nGGML_ASSERT failed", hint="see above")
        assert ids.shape == mask.shape == (1, 16)
        assert mask.all()
        return [self.bench.seconds[self.name]] * repeats

    def time_decode(
        self, prompt_ids: Any, new_tokens: int, *, repeats: int, warmup: int, max_seconds: float
    ) -> list[dict[str, Any]]:
        seconds = self.bench.seconds[self.name]
        return [{"first_s": 4 * seconds, "tokens_s": [seconds] * (new_tokens - 1)}] * repeats

    def memory(self) -> dict[str, Any]:
        return {
            "baseline_anonymous": 30, "load_anonymous": 70, "peak_anonymous": 100, "peak_file_backed": 50,
            "peak_rss": 180,
        }  # fmt: skip


def run(tmp_path: Path, bench: Bench, task: str = "feature-extraction", **forms: str) -> list[Measurement]:
    subjects = [
        Subject(name, make_artifact(tmp_path / name, forms.get(name, "onnx"), name.encode())) for name in bench.seconds
    ]
    return measure_speed(subjects, CONFIG, ids=IDS, task=task, open_worker=bench, environment=ENVIRONMENT)


ENVIRONMENT = {"system": "Linux", "machine": "x86_64", "cpu": "Test CPU", "cores_usable": 2}


def of(rows: list[Measurement], subject: str, metric: str) -> Measurement:
    return next(row for row in rows if (row.subject, row.metric) == (subject, metric))


def test_samples_are_kept_by_launch_in_the_metric_s_unit(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.002, "b": 0.004}))
    latency = of(rows, "b", "latency_ms")
    assert latency.samples == ((4.0,) * 5, (4.0,) * 5)
    assert latency.summary is not None
    assert (latency.summary.value, latency.summary.n, latency.summary.statistic) == (4.0, 10, "median")
    assert latency.summary.percentiles == {}
    assert of(rows, "a", "load_ms").samples == ((250.0,), (250.0,))
    assert len(of(rows, "a", "first_inference_ms").samples) == 2
    assert latency.device == "Test CPU (Linux x86_64, 2 cores)"
    assert latency.protocol["noise_floor"] == pytest.approx(0.0)


def test_every_launch_is_a_process_of_its_own(tmp_path: Path) -> None:
    bench = Bench({"a": 0.001, "b": 0.001})
    run(tmp_path, bench)
    # 2 speed launches each, 2 of the control (a), a cold load and a memory launch each
    assert sorted(bench.launches) == ["a"] * 6 + ["b"] * 4
    assert ("a", "forward", 0) in bench.calls, "the first inference must be taken cold"
    assert ("a", "forward", WARMUP) in bench.calls


def test_a_load_that_was_not_cold_is_not_called_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = of(run(tmp_path / "warm", Bench({"a": 0.001})), "a", "load_cold_ms")
    assert (warm.summary, warm.reason) == (None, "not cold: a memory file system")
    monkeypatch.setattr(FakeWorker, "cold_load_seconds", 0.25)
    cold = of(run(tmp_path / "cold", Bench({"a": 0.001})), "a", "load_cold_ms")
    assert cold.summary is not None
    assert cold.summary.value == 250


def test_generation_has_prefill_decode_and_first_token(tmp_path: Path) -> None:
    bench = Bench({"a": 0.01}, task="text-generation", capabilities=("forward", "decode", "latency"))
    rows = run(tmp_path, bench, task="text-generation")
    values = {row.metric: row.summary.value for row in rows if row.summary}
    assert values["time_to_first_token_ms"] == pytest.approx(40)
    assert values["prefill_tokens_per_s"] == pytest.approx(16 / 0.04)
    assert values["decode_tokens_per_s"] == pytest.approx(100)


def test_memory_has_the_baseline_of_the_runtime_subtracted(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.001}))
    values = {row.metric: row.summary.value for row in rows if row.summary}
    assert values["peak_anonymous_bytes"] == 70
    assert values["peak_memory_bytes"] == 120
    assert values["baseline_bytes"] == 30


def test_a_worker_that_dies_costs_its_subject_the_numbers_and_no_other(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"good": 0.001, "dies": -1}))
    assert of(rows, "good", "latency_ms").summary is not None
    for row in rows:
        if row.subject == "dies":
            assert row.summary is None
            assert row.reason == "the worker died: Aborted GGML_ASSERT failed"
            assert "\n" not in row.reason


def test_a_program_that_is_only_interpreted_has_no_latency(tmp_path: Path) -> None:
    bench = Bench({"p": 0.001}, capabilities=("forward", "score"), backend="mil-interpreter", runtime="coreml")
    rows = run(tmp_path, bench, p="coreml")
    assert rows
    for row in rows:
        assert row.summary is None
        assert "mil-interpreter" in str(row.reason)
        assert row.protocol["noise_floor"] is None
        assert row.protocol["noise_floor_reason"] == "no subject can be timed on this machine"


def test_an_input_that_is_too_long_is_not_timed(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.001}, max_length=8))
    assert of(rows, "a", "latency_ms").reason == "takes at most 8 tokens, the timed run needs 16"


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.001}))
    write_measurements(tmp_path / "m.jsonl", rows)
    assert read_measurements(tmp_path / "m.jsonl") == rows


def test_sizes_come_from_the_files(tmp_path: Path) -> None:
    artifact = Subject("a", make_artifact(tmp_path / "a"))
    model = tmp_path / "teacher"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"w" * 2000)
    (model / "config.json").write_bytes(b"{}")
    rows = measure_size([artifact, Subject("teacher", model, "model", parameters=500)], environment=ENVIRONMENT)
    values = {(row.subject, row.metric): row.summary.value for row in rows if row.summary}
    assert values == {
        ("a", "size_bytes"): 600, ("a", "model_bytes"): 500, ("a", "bits_per_weight"): 8.0,
        ("a", "download_bytes"): 26.0,
        ("teacher", "size_bytes"): 2002, ("teacher", "model_bytes"): 2000, ("teacher", "bits_per_weight"): 32.0,
    }  # fmt: skip


def test_the_timed_input_is_real_text_without_padding() -> None:
    assert timed_input([[5, 6, 7], [8, 9]], 2, 4).tolist() == [[5, 6, 7, 8], [9, 5, 6, 7]]
    with pytest.raises(BadInput, match="no token"):
        timed_input([], 1, 4)


@pytest.mark.slow
def test_a_real_model_in_real_processes(tiny_bert: Path) -> None:
    config = BenchConfig(launches=1, repeats=4, length=16, max_seconds=2, threads=1)
    rows = measure_speed([Subject("teacher", tiny_bert, "model")], config, ids=IDS, task="feature-extraction")
    values = {row.metric: row.summary.value for row in rows if row.summary}
    assert 0 < values["latency_ms"] < 1000
    assert values["load_ms"] > 0
    assert values["peak_anonymous_bytes"] > 0
    assert of(rows, "teacher", "latency_ms").protocol["noise_floor"] >= 0
    assert of(rows, "teacher", "latency_ms").runtime == "torch"


def test_a_real_worker_that_finds_a_damaged_artifact(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / "model.bin").write_bytes(b"changed")
    rows = measure_speed([Subject("a", folder)], CONFIG, ids=IDS, task="feature-extraction", environment=ENVIRONMENT)
    assert {row.summary for row in rows} == {None}
    assert all("model.bin" in str(row.reason) for row in rows)
