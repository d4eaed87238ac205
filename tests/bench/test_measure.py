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
        self.turns: list[str] = []

    def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
        self.launches.append(folder.name)
        return FakeWorker(self, folder.name, options)


class FakeWorker:
    load_seconds = 0.25
    prepare_seconds = 0.5
    stable = True
    joules: float | None = None
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
        self.bench.turns.append(self.name)
        if self.joules is not None:
            self.joules += 2.0 * repeats
        return [self.bench.seconds[self.name]] * repeats

    def time_decode(
        self, prompt_ids: Any, new_tokens: int, *, repeats: int, warmup: int, max_seconds: float
    ) -> list[dict[str, Any]]:
        seconds = self.bench.seconds[self.name]
        return [{"first_s": 4 * seconds, "tokens_s": [seconds] * (new_tokens - 1)}] * repeats

    def memory(self) -> dict[str, Any]:
        return {
            "baseline_anonymous": 30, "load_anonymous": 70, "peak_anonymous": 100, "peak_file_backed": 50,
            "peak_rss": 180, "run_anonymous": 100,
        }  # fmt: skip

    def sensors(self) -> dict[str, Any] | None:
        if self.joules is None:
            return {"reasons": {"energy_j": "a virtual machine", "temperature_c": "no thermal zone"}}
        return {"energy_j": {"package-0": self.joules}, "temperature_c": {"a": 40.0, "b": 55.5}, "reasons": {}}


def run(
    tmp_path: Path, bench: Bench, task: str = "feature-extraction", config: BenchConfig = CONFIG, **forms: str
) -> list[Measurement]:
    subjects = [
        Subject(name, make_artifact(tmp_path / name, forms.get(name, "onnx"), name.encode())) for name in bench.seconds
    ]
    return measure_speed(subjects, config, ids=IDS, task=task, open_worker=bench, environment=ENVIRONMENT)


ENVIRONMENT = {"system": "Linux", "machine": "x86_64", "cpu": "Test CPU", "cores_usable": 2}


def of(rows: list[Measurement], subject: str, metric: str) -> Measurement:
    return next(row for row in rows if (row.subject, row.metric) == (subject, metric))


def test_samples_are_kept_by_launch_in_the_metric_s_unit(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.002, "b": 0.004}))
    latency = of(rows, "b", "latency_ms")
    assert [set(launch) for launch in latency.samples] == [{4.0}, {4.0}]
    assert all(len(launch) >= CONFIG.repeats for launch in latency.samples)  # quick inferences are repeated
    assert latency.summary is not None
    assert (latency.summary.value, latency.summary.statistic) == (4.0, "median")
    assert of(rows, "a", "import_ms").samples == ((500.0,), (500.0,))
    assert (latency.target, latency.source) == ("host", "measured")
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


def test_subjects_work_in_turns_there_and_back(tmp_path: Path) -> None:
    """After first inferences and warm-ups, the turns of a round go through the subjects and back."""
    bench = Bench({"a": 0.01, "b": 0.01, "c": 0.01})
    run(tmp_path, bench, config=CONFIG.model_copy(update={"launches": 1, "most_launches": None, "repeats": 6}))
    turns = bench.turns[6 : 6 + 12]  # 3 subjects, no control: first inferences and warm-ups, then 4 turns of each
    assert turns == ["a", "b", "c", "c", "b", "a"] * 2 or turns[:3] == turns[5:2:-1] == turns[6:9]
    assert sorted(turns[:3]) == ["a", "b", "c"]


def test_one_after_the_other_where_memory_does_not_hold_all(tmp_path: Path) -> None:
    subjects = [Subject(name, make_artifact(tmp_path / name, payload=name.encode())) for name in ("a", "b")]
    bench = Bench({"a": 0.002, "b": 0.004})
    rows = measure_speed(subjects, CONFIG, ids=IDS, task="feature-extraction", open_worker=bench,
                         environment=ENVIRONMENT, together=False)  # fmt: skip
    assert of(rows, "b", "latency_ms").samples == ((4.0,) * 5, (4.0,) * 5)
    assert "one process after the other" in of(rows, "b", "latency_ms").protocol["order"]


def test_launches_go_on_only_while_it_is_noisy(tmp_path: Path) -> None:
    more = CONFIG.model_copy(update={"most_launches": 6})
    steady = of(run(tmp_path / "steady", Bench({"a": 0.01, "b": 0.01}), config=more), "a", "latency_ms")
    assert (steady.protocol["launches"], len(steady.samples)) == (2, 2)

    class Wild(Bench):
        def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
            self.seconds = {name: 0.01 * (1 + (7 * len(self.launches)) % 5) for name in self.seconds}
            return super().__call__(folder, options, cold=cold)

    class Frozen(Wild):
        """A worker keeps the speed that it was born with."""

        def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
            worker = super().__call__(folder, options, cold=cold)
            worker.bench = Bench(dict(self.seconds))
            return worker

    noisy = of(run(tmp_path / "noisy", Frozen({"a": 0.01, "b": 0.01}), config=more), "a", "latency_ms")
    assert (noisy.protocol["launches"], len(noisy.samples)) == (6, 6)
    assert noisy.protocol["noise_floor"] > 0.1


def test_each_row_has_its_own_metrics_noise_floor(tmp_path: Path) -> None:
    bench = Bench({"a": 0.01}, task="text-generation", capabilities=("forward", "decode", "latency"))
    rows = run(tmp_path, bench, task="text-generation")
    assert set(of(rows, "a", "latency_ms").protocol["noise_floors"]) >= {"latency_ms", "load_ms", "decode_tokens_per_s"}
    assert of(rows, "a", "load_ms").protocol["noise_floor"] == pytest.approx(0)


def test_percentiles_are_proved_or_not_stated(tmp_path: Path) -> None:
    few = CONFIG.model_copy(update={"percentiles": (90, 99), "repeats": 5, "launches": 2})
    rows = run(tmp_path / "b", Bench({"a": 0.01}), config=few)
    p90 = of(rows, "a", "latency_p90_ms")
    assert p90.summary is not None
    assert (p90.summary.value, p90.summary.high, p90.summary.level) == (10, 10, 0.99)
    assert p90.summary.n >= 662  # as many inferences are made as the 99th percentile needs
    assert of(rows, "a", "latency_p99_ms").summary is not None

    class Slow(FakeWorker):
        def time_forward(self, *args: Any, repeats: int, **more: Any) -> list[float]:
            return super().time_forward(*args, repeats=min(repeats, 3), **more)  # time was over

    class Cut(Bench):
        def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
            return Slow(self, folder.name, options)

    cut = of(run(tmp_path / "c", Cut({"a": 0.01}), config=few), "a", "latency_p90_ms")
    assert cut.summary is None
    assert "the 90th percentile needs 64" in str(cut.reason)


def test_energy_and_temperature_where_there_are_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = run(tmp_path / "none", Bench({"a": 0.01}))
    assert of(none, "a", "energy_per_run_j").reason == "a virtual machine"
    assert of(none, "a", "temperature_c").reason == "no thermal zone"
    monkeypatch.setattr(FakeWorker, "joules", 1.0)
    rows = run(tmp_path / "some", Bench({"a": 0.01}))
    values = {row.metric: row.summary.value for row in rows if row.summary}
    assert values["energy_per_run_j"] == pytest.approx(2.0)
    assert values["temperature_c"] == 55.5
    assert of(rows, "a", "frequency_mhz").summary is None


def test_sustained_speed_is_the_last_quarter_over_the_first(tmp_path: Path) -> None:
    class Hot(FakeWorker):
        def time_forward(self, *args: Any, repeats: int, **more: Any) -> list[float]:
            return [0.1] * 40 + [0.2] * 40 if repeats > 10_000 else super().time_forward(*args, repeats=repeats, **more)

    class Oven(Bench):
        def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> FakeWorker:
            return Hot(self, folder.name, options)

    rows = run(tmp_path, Oven({"a": 0.01}), config=CONFIG.model_copy(update={"sustained_seconds": 10.0}))
    ratio = of(rows, "a", "sustained_speed_ratio")
    assert ratio.summary is not None
    assert ratio.summary.value == pytest.approx(0.5)
    assert len(of(rows, "a", "sustained_latency_ms").samples[0]) == 80


def test_decode_speed_by_depth_and_a_depth_that_does_not_fit(tmp_path: Path) -> None:
    bench = Bench({"a": 0.01}, task="text-generation", capabilities=("forward", "decode", "latency"))
    config = CONFIG.model_copy(update={"depths": (0, 32, 4096)})
    rows = run(tmp_path, bench, task="text-generation", config=config)
    found = {row.context: row for row in rows if row.metric == "decode_at_depth_tokens_per_s"}
    assert list(found) == [0, 32, 4096]
    assert found[0].summary is not None
    assert found[0].summary.value == pytest.approx(100)
    assert "depth 4096 needs 4100" in str(found[4096].reason)


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
    assert set(of(rows, "a", "token_latency_ms").samples[0]) == {10.0}  # every token's time


def test_memory_has_the_baseline_of_the_runtime_subtracted(tmp_path: Path) -> None:
    rows = run(tmp_path, Bench({"a": 0.001}))
    values = {row.metric: row.summary.value for row in rows if row.summary}
    assert values["peak_anonymous_bytes"] == 70
    assert values["peak_memory_bytes"] == 120
    assert values["baseline_bytes"] == 30
    assert (values["load_memory_bytes"], values["run_memory_bytes"]) == (40, 70)
    assert values["peak_rss_bytes"] == 180


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
    assert of(rows, "teacher", "latency_ms").protocol["noise_floor"] is None
    assert "single launch" in of(rows, "teacher", "latency_ms").protocol["noise_floor_reason"]
    assert values["peak_rss_bytes"] > values["peak_anonymous_bytes"]
    assert of(rows, "teacher", "latency_ms").runtime == "torch"


def test_a_real_worker_that_finds_a_damaged_artifact(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "a")
    (folder / "model.bin").write_bytes(b"changed")
    rows = measure_speed([Subject("a", folder)], CONFIG, ids=IDS, task="feature-extraction", environment=ENVIRONMENT)
    assert {row.summary for row in rows} == {None}
    assert all("model.bin" in str(row.reason) for row in rows)
