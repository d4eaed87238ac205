"""`edgestill bench`: requests, several targets, the decision and its exit code, with a model that runs for real."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgestill import benchmark
from edgestill.benchmark import BenchRequest, bench_config, bench_subjects
from edgestill.errors import UsageError, WorkerError
from edgestill.recipe import ExportConfig
from edgestill.runtimes.targets import TargetName
from edgestill.stages import Observer


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgestill.export import export

    folder = tmp_path_factory.mktemp("a folder with 'quotes'") / "onnx int8"
    export(tiny_bert, folder, ExportConfig(to="onnx:int8"))
    return folder


def test_efforts_differ_in_what_they_cost() -> None:
    quick, normal, thorough = (
        bench_config(BenchRequest((), effort=effort)) for effort in ("quick", "normal", "thorough")
    )
    assert (quick.launches, quick.most_launches) == (1, None)
    assert (normal.launches, normal.most_launches) == (5, 24)
    assert (thorough.percentiles, thorough.sustained_seconds) == ((90, 99), 60)
    said = bench_config(BenchRequest((), launches=3, depths=(8,), sustained_seconds=2))
    assert (said.launches, said.most_launches, said.depths, said.sustained_seconds) == (3, None, (8,), 2)


def test_a_quick_bench_of_an_artifact(artifact: Path) -> None:
    request = BenchRequest((artifact,), threads=1, length=16, effort="quick", max_slowdown=0.05)
    result = bench_subjects(request, Observer())
    values = {row.metric: row.summary.value for row in result.measurements if row.summary}
    assert values["latency_ms"] > 0
    assert values["peak_rss_bytes"] > values["peak_memory_bytes"] > 0
    assert {row.target for row in result.measurements} == {"host"}
    assert result.comparisons == ()
    assert result.exit_code == 3  # nothing to compare with: nothing was decided


def test_a_target_that_fails_costs_its_own_rows_only(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __enter__(self) -> Any:
            raise WorkerError("the board does not answer", hint="is it on?")

        def __exit__(self, *_: object) -> None: ...

    opened = benchmark.open_target
    monkeypatch.setattr(benchmark, "open_target", lambda text: Broken() if text == "far" else opened(text))
    parse = benchmark.parse_target
    monkeypatch.setattr(benchmark, "parse_target", lambda text: TargetName("far") if text == "far" else parse(text))
    request = BenchRequest((artifact,), ("far", "host"), threads=1, length=16, effort="quick")
    result = bench_subjects(request, Observer())
    assert result.problems == {"far": "the board does not answer"}
    assert any(row.metric == "latency_ms" and row.summary for row in result.measurements)
    with pytest.raises(WorkerError, match="does not answer"):
        bench_subjects(dataclasses.replace(request, target=("far",)), Observer())


def test_unknown_targets_and_one_twice_are_refused_before_anything_runs() -> None:
    for target in (("hist",), ("host", "host"), ()):
        with pytest.raises(UsageError):
            bench_subjects(BenchRequest((Path("nowhere"),), target), Observer())


@pytest.mark.slow
def test_a_decoder_in_real_processes_by_depth_and_for_long(tiny_llama: Path, tmp_path: Path) -> None:
    """Two copies of one artifact side by side: every row is there, with samples that belong together."""
    from edgestill.export import export

    folders = tuple(tmp_path / name for name in ("a", "b"))
    for folder in folders:
        export(tiny_llama, folder, ExportConfig(to="onnx:fp32"))
    request = BenchRequest(
        folders, threads=1, length=8, new_tokens=4, launches=2, depths=(0, 16, 100_000), sustained_seconds=1.0,
        max_slowdown=0.5,
    )  # fmt: skip
    result = bench_subjects(request, Observer())
    rows = {(row.subject, row.metric, row.context): row for row in result.measurements}
    depth = "decode_at_depth_tokens_per_s"
    assert rows["a", depth, 0].summary is not None
    assert rows["a", depth, 16].summary is not None
    assert "takes at most" in str(rows["a", depth, 100_000].reason)
    assert rows["a", "sustained_speed_ratio", 8].summary is not None
    sustained = rows["b", "sustained_latency_ms", 8].samples[0]
    assert 0.9 < sum(sustained) / 1e3 < 3
    tokens, speeds = rows["a", "token_latency_ms", 8], rows["a", "decode_tokens_per_s", 8]
    for times, rates in zip(tokens.samples, speeds.samples, strict=True):
        assert len(times) == 3 * len(rates)  # 4 new tokens, the first belongs to the prompt
        assert 3e3 / sum(times[:3]) == pytest.approx(rates[0])
    assert "side by side" in speeds.protocol["order"]
    assert set(speeds.protocol["noise_floors"]) >= {"latency_ms", "decode_tokens_per_s"}
    assert {c.metric for c in result.comparisons if c.subject == "b"} >= {"latency_ms", "decode_tokens_per_s"}
    assert [d.metric for d in result.decisions] == ["decode_tokens_per_s"]
    assert result.exit_code in (0, 1, 3)
