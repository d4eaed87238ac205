"""Rows of instruction counts: what is counted, what is refused, what is told of a subject that can't run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from edgestill.bench.compare import compare
from edgestill.bench.emulated import CLASS_METRICS, NOISE, measure_instructions
from edgestill.bench.measure import Subject
from edgestill.bench.metrics import METRICS
from edgestill.errors import MissingDependency, Unsupported
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.qemu import QemuTarget
from edgestill.runtimes.transports.qemu_plugin import CLASSES
from edgestill.runtimes.transports.qemu_root import find_root

IDS = np.arange(4, 20, dtype=np.int64).reshape(1, 16)


class Refusing:
    """A core that can't run the artifact."""

    name = "qemu:cortex-a53"

    def open_counter(self, folder: Path, options: SessionOptions) -> NoReturn:
        raise Unsupported(f"illegal instruction on cortex-a53: {folder.name}")

    def facts(self) -> Mapping[str, Any]:
        return {"cpu": "cortex-a53 (emulated)", "system": "Linux", "machine": "aarch64", "cores_usable": 1}


def test_every_class_has_its_metric() -> None:
    assert tuple(CLASS_METRICS) == CLASSES
    assert all(METRICS[name].kind == "instructions" for name in (*CLASS_METRICS.values(), "instructions"))
    assert METRICS["instructions"].show(57_900_000) == "57.90 M"


def test_a_subject_that_can_not_run_keeps_its_rows_with_the_reason(tmp_path: Path) -> None:
    subjects = [Subject(name, tmp_path / name, "artifact", None, "id") for name in ("one", "two")]
    rows = measure_instructions(subjects, Refusing(), ids=IDS, task="text-generation")
    assert {row.subject for row in rows} == {"one", "two"}
    assert {row.source for row in rows} == {"emulated"}
    assert {row.target for row in rows} == {"qemu:cortex-a53"}
    assert all(row.summary is None and row.samples == () for row in rows)
    reasons = {row.metric: row.reason for row in rows if row.subject == "one"}
    assert reasons["instructions_dot"] == "illegal instruction on cortex-a53: one"
    assert "emulated" in str(reasons["latency_ms"])
    assert {c.outcome for c in compare(rows, "one")} == {"unknown"}


@pytest.mark.slow
def test_counts_of_a_real_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    try:
        find_root()
    except MissingDependency as error:
        pytest.skip(f"{error.message}: {error.hint}")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("apt-get install qemu-user")
    folders = {name: export(tiny_llama, tmp_path / name, ExportConfig(to=f"onnx:{name}")).path
               for name in ("fp32", "int8")}  # fmt: skip
    subjects = [Subject(name, folder) for name, folder in folders.items()]
    with QemuTarget("cortex-a76") as target:
        rows = measure_instructions(subjects, target, ids=IDS, task="text-generation", launches=2, windows=2, repeats=2)
    found = {(row.subject, row.metric): row for row in rows}
    for name in folders:
        total = found[name, "instructions"]
        assert total.summary is not None
        assert [len(launch) for launch in total.samples] == [2, 2]
        parts = [found[name, metric].samples for metric in CLASS_METRICS.values()]
        for launch in range(2):
            for window in range(2):
                assert total.samples[launch][window] == sum(part[launch][window] for part in parts)
        values = [value for launch in total.samples for value in launch]
        assert max(values) / min(values) - 1 < 5 * NOISE  # two windows on a busy machine
        assert found[name, "latency_ms"].summary is None
        assert found[name, "decode_instructions"].summary is not None
    assert found["fp32", "instructions_dot"].summary.value == 0
    dots = {value for launch in found["int8", "instructions_dot"].samples for value in launch}
    assert len(dots) == 1
    assert dots.pop() > 0
    better = next(c for c in compare(rows, "fp32") if c.metric == "instructions_dot")
    assert better.outcome == "unknown"  # nothing to divide by
