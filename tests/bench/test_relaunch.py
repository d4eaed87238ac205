"""A launch that a broken link cut leaves no number and is taken again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Histogram, Manifest, seal_artifact
from edgestill.bench.measure import Subject, measure_speed
from edgestill.bench.records import Measurement
from edgestill.bench.relaunch import ATTEMPTS, load_of, relaunching
from edgestill.errors import LinkLost, ResourceExhausted
from edgestill.recipe import BenchConfig
from edgestill.runtimes.session import SessionInfo, SessionOptions

IDS = np.arange(8, dtype=np.int64).reshape(1, 8)
CONFIG = BenchConfig(launches=3, repeats=4, length=8, max_seconds=5)


class Device:
    """Answers with the number of its launch as the time; breaks the link at chosen calls of all."""

    def __init__(self, breaks: set[int] = frozenset(), full: str = "") -> None:  # type: ignore[assignment]
        self.breaks, self.full, self.calls, self.launches = breaks, full, 0, 0

    def __call__(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> Any:
        self.launches += 1
        if folder.name == self.full:
            raise ResourceExhausted("board x: 2 MB are free", hint="free some room there")
        return Worker(self, self.launches)


class Worker:
    load_seconds, prepare_seconds, stable = 1.0, 1.0, True
    cold_load_seconds: float | None = None
    cold_reason: str | None = "no"

    def __init__(self, device: Device, launch: int) -> None:
        self.device, self.launch = device, launch
        self.machine_load = {"others_fraction": 0.5, "busy": True}
        self.launch_facts = {"worker": "native (i8mm)"}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def info(self) -> SessionInfo:
        return SessionInfo("llama.cpp", "1", "cpu", "feature-extraction", ("forward", "latency"), 100, 64)

    def time_forward(self, ids: Any, mask: Any, *, repeats: int, warmup: int, max_seconds: float) -> list[float]:
        self.device.calls += 1
        if self.device.calls in self.device.breaks:
            raise LinkLost("the link to board x broke", hint="check its power")
        return [float(self.launch)] * repeats

    def memory(self) -> dict[str, Any]:
        return {"baseline_anonymous": 1, "peak_anonymous": 2, "peak_file_backed": 3, "peak_rss": 9}

    def sensors(self) -> None:
        return None


def run(tmp_path: Path, device: Device, *names: str) -> list[Measurement]:
    subjects = []
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(name.encode())
        manifest = Manifest(
            format="gguf", quantisation="q8_0", task="feature-extraction", entry="model.bin", inputs=(), outputs=(),
            shapes="dynamic", max_length=64, vocab_size=100, contents="", minimum_runtime={}, lineage={},
            dtype_histogram={"Q8_0": Histogram(1, 1, 1)},
        )  # fmt: skip
        seal_artifact(tmp_path / name, manifest)
        subjects.append(Subject(name, tmp_path / name))
    environment = {"system": "Linux", "machine": "aarch64", "cpu": "x", "cores_usable": 4}
    return measure_speed(
        subjects,
        CONFIG,
        ids=IDS,
        task="feature-extraction",
        open_worker=device,
        environment=environment,
        together=False,
    )


def of(rows: list[Measurement], subject: str, metric: str) -> Measurement:
    return next(row for row in rows if (row.subject, row.metric) == (subject, metric))


def test_a_cut_launch_leaves_nothing_and_is_repeated(tmp_path: Path) -> None:
    whole = run(tmp_path, quiet := Device(), "a")
    (tmp_path / "again").mkdir()
    cut = run(tmp_path / "again", device := Device({2, 5}), "a")
    assert device.launches == quiet.launches + 2
    for metric in ("latency_ms", "load_ms", "first_inference_ms"):
        got, wanted = of(cut, "a", metric).samples, of(whole, "a", metric).samples
        assert [len(launch) for launch in got] == [len(launch) for launch in wanted]
    assert of(cut, "a", "latency_ms").environment["launches_cut"] == 1  # the other one was the control's
    assert "launches_cut" not in of(whole, "a", "latency_ms").environment
    # every launch that counts is of one process: all of its samples are alike
    assert all(len(set(launch)) == 1 for launch in of(cut, "a", "latency_ms").samples)


def test_a_link_that_never_holds_costs_the_subject_its_numbers(tmp_path: Path) -> None:
    rows = run(tmp_path, Device(set(range(1000))), "a", "b")
    for name in ("a", "b"):
        row = of(rows, name, "latency_ms")
        assert row.summary is None
        assert row.samples == ()
        assert row.reason == "the link to board x broke"


def test_a_full_disk_costs_only_its_subject(tmp_path: Path) -> None:
    rows = run(tmp_path, Device(full="b"), "a", "b")
    assert of(rows, "a", "latency_ms").summary is not None
    assert of(rows, "b", "latency_ms").reason == "board x: 2 MB are free"


def test_the_load_is_the_device_s_own(tmp_path: Path) -> None:
    row = of(run(tmp_path, Device(), "a"), "a", "latency_ms")
    assert row.environment["busy"] is True
    assert row.environment["machine_load"][0]["worker"] == "native (i8mm)"
    assert row.environment["machine_load"][0]["load_1m_before"] is None  # this machine's says nothing about it
    here = {"load_1m_before": 1.5, "busy": False}
    assert {**load_of(object(), here)}["load_1m_before"] == 1.5


def test_undone_is_as_before() -> None:
    class Taken:
        def __init__(self) -> None:
            self.failure: str | None = None
            self.cut = 0
            self.samples: dict[str, list[int]] = {"a": [1]}

    taken, tries = Taken(), 0

    def take() -> None:
        nonlocal tries
        tries += 1
        taken.samples["a"].append(tries)
        taken.samples.setdefault("b", []).append(tries)
        if tries < ATTEMPTS:
            raise LinkLost("cut", hint="")

    relaunching([taken], take)
    assert (taken.samples, taken.cut, taken.failure) == ({"a": [1, ATTEMPTS], "b": [ATTEMPTS]}, ATTEMPTS - 1, None)
    tries = -100
    with pytest.raises(ZeroDivisionError):
        relaunching([taken], lambda: 1 // 0)  # type: ignore[arg-type, return-value]
