from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from edgestill.bench.compare import compare
from edgestill.bench.records import Measurement, Verdict, write_measurements
from edgestill.bench.statistics import summarise
from edgestill.bench_export import BenchExportRequest, export_results
from edgestill.errors import BadInput, UsageError
from edgestill.recipe import parse_recipe
from edgestill.recipe_text import dump_recipe
from edgestill.show import show

RECIPE = """
name = "tiny"
[teacher]
source = "teacher"
[student]
layers = 2
[data]
[[data.text]]
name = "words"
source = "words.txt"
test = 4
[[export]]
to = "onnx:int8"
[gates]
latency_ms = { max = 1.0 }
"""


def row(subject: str, launches: list[list[float]]) -> Measurement:
    runtime = "torch" if subject == "teacher" else "onnxruntime"
    return Measurement(
        subject, "latency_ms", "ms", "measured", summarise(launches), tuple(map(tuple, launches)), "ab" * 32, runtime,
        "1", "cpu", "here", 1, {"launches": 3}, {},
    )  # fmt: skip


ROWS = [row("teacher", [[4.0, 4.1], [4.2], [4.1]]), row("onnx-int8", [[2.0, 2.1], [2.2], [2.1]])]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as `edgestill run` got that far."""
    folder = tmp_path / "a 'run'"
    (folder / "work" / "verdicts").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "recipe.toml").write_text(dump_recipe(parse_recipe(RECIPE, folder / "recipe.toml")))
    write_measurements(folder / "work" / "speed.jsonl", ROWS)
    verdict = Verdict("ab" * 32, "onnx-int8", "device_verified", (), "ort", "1", "cpu", "here", "fine")
    (folder / "work" / "verdicts" / "onnx-int8.json").write_text(json.dumps(dataclasses.asdict(verdict)))
    return folder


def test_a_run_folder_in_every_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("x.jsonl", "x.csv", "x.md", "x.sqlite", "x.junit.xml", "x.llama-bench.json")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = export_results(BenchExportRequest(run, tuple(tmp_path / name for name in names)))
    assert [one.format for one in result.files] == ["jsonl", "csv", "markdown", "sqlite", "junit", "llama-bench"]
    assert (result.measurements, result.comparisons, result.verdicts, result.gates) == (2, 1, 1, 1)
    with (tmp_path / "x.csv").open(newline="") as stream:
        assert [line["subject"] for line in csv.DictReader(stream)] == ["teacher", "onnx-int8"]
    suites = {suite.get("name"): suite for suite in ET.parse(tmp_path / "x.junit.xml").getroot()}
    assert list(suites) == ["verdicts", "gates", "comparisons", "measurements"]
    assert suites["gates"].get("failures") == "1"  # 2.1 ms is not at most 1: the run failed there, and so does the case
    ratio = compare(ROWS, "teacher")[0].ratio
    assert f"{ratio:.4g}×" in (tmp_path / "x.junit.xml").read_text(encoding="utf-8")
    assert {path: path.read_bytes() for path in before} == before
    show(result)
    assert "2 measurements, 1 comparisons, 1 verdicts, 1 gates as junit" in capsys.readouterr().err


def test_measurements_of_bench_with_another_baseline(tmp_path: Path) -> None:
    source, out = tmp_path / "m.jsonl", tmp_path / "table"
    write_measurements(source, ROWS)
    export_results(BenchExportRequest(source, (out,), "markdown", "onnx-int8"))
    assert "1.95×" in out.read_text(encoding="utf-8")  # the teacher takes as much longer
    with pytest.raises(UsageError, match="nothing was measured of 'onnx-int4'"):
        export_results(BenchExportRequest(source, (out,), "markdown", "onnx-int4"))


def test_what_can_not_be_exported_is_told_in_a_line_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.csv"

    def refuse(source: Path, match: str, kind: type[Exception] = BadInput, out: Path = out) -> None:
        with pytest.raises(kind, match=match):
            export_results(BenchExportRequest(source, (out,)))

    refuse(tmp_path / "nothing", "there is no")
    refuse(tmp_path, "not a run folder", UsageError)
    refuse(run, "no format has such a name", UsageError, tmp_path / "x.txt")
    refuse(run, "there is no folder", BadInput, tmp_path / "new" / "x.csv")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    refuse(tmp_path / "bad.jsonl", "not UTF-8 at byte 0")
    (tmp_path / "bad.jsonl").write_text("{}")
    refuse(tmp_path / "bad.jsonl", "bad.jsonl:1: not a measurement")
    (run / "work" / "speed.jsonl").unlink()
    (run / "work" / "verdicts" / "onnx-int8.json").unlink()
    refuse(run, "holds no measurement")
    assert not out.exists()
    assert not (tmp_path / "new").exists()


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgestill", "bench", "export", str(run), "--json", "--out"]
    done = subprocess.run([*command, str(tmp_path / "x.csv")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [{"path": str(tmp_path / "x.csv"), "format": "csv"}]
