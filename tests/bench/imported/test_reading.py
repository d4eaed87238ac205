"""Result files of other tools. They are written by hand here, field by field after the tools' own writers: see
docs/prediction.md for what was tried on files that a tool wrote. One slow test runs llama-bench itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgestill.bench.imported.reading import KNOWN, read_results
from edgestill.bench.predict_work import work_of
from edgestill.bench.records import Measurement
from edgestill.errors import BadInput, UsageError
from edgestill.export import export
from edgestill.fetch import cache_folder
from edgestill.recipe import ExportConfig


def bench_test(prompt: int, generated: int, speeds: list[float], **more: Any) -> dict[str, Any]:
    return {
        "build_commit": "8cf427ff", "build_number": 5163, "cpu_info": "Cortex-A76", "gpu_info": "", "backends": "CPU",
        "model_filename": "C:\\models\\my 'small' model.Q4_0.gguf", "model_type": "llama 1B Q4_0",
        "model_size": 636_000_000, "model_n_params": 1_100_048_384, "n_batch": 2048, "n_ubatch": 512, "n_threads": 4,
        "type_k": "f16", "type_v": "f16", "n_gpu_layers": 99, "flash_attn": 0, "n_prompt": prompt, "n_gen": generated,
        "n_depth": 0, "test_time": "2026-01-01T00:00:00Z", "avg_ns": 1, "stddev_ns": 0,
        "avg_ts": sum(speeds) / len(speeds), "stddev_ts": 0.0, "samples_ns": [1] * len(speeds), "samples_ts": speeds,
        **more,
    }  # fmt: skip


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def one(rows: list[Measurement], metric: str) -> Measurement:
    [row] = [row for row in rows if row.metric == metric]
    return row


TESTS = [bench_test(512, 0, [100.0, 102.0, 98.0]), bench_test(0, 128, [10.0, 11.0, 12.0]), bench_test(512, 128, [1.0])]


@pytest.mark.parametrize("form", ["json", "jsonl", "single"])
def test_llama_bench(tmp_path: Path, form: str) -> None:
    texts = {"json": json.dumps(TESTS, indent=2), "jsonl": "\n".join(map(json.dumps, TESTS)) + "\n",
             "single": json.dumps(TESTS[1])}  # fmt: skip
    rows = read_results(write(tmp_path / "it's a result.json", texts[form]))
    decode = one(rows, "decode_tokens_per_s")
    assert decode.samples == ((10.0, 11.0, 12.0),)
    assert decode.summary is not None
    assert decode.summary.value == 11.0
    assert (decode.source, decode.origin, decode.target) == ("measured", "llama-bench", "import:llama-bench")
    assert (decode.subject, decode.device, decode.threads) == ("my 'small' model.Q4_0", "Cortex-A76", 4)
    assert (decode.runtime, decode.runtime_version, decode.kv_dtype) == ("llama.cpp", "b5163 (8cf427ff)", "f16")
    assert one(rows, "model_bytes").samples == ((636_000_000.0,),)
    if form != "single":
        assert one(rows, "prefill_tokens_per_s").protocol["length"] == 512
        assert len(rows) == 3  # a test of prompt and generation together has no metric of ours


def test_llama_bench_on_a_gpu_names_the_gpu(tmp_path: Path) -> None:
    document = [bench_test(0, 8, [1.0], backends="Metal,BLAS", gpu_info="Apple M1 Pro")]
    assert one(read_results(write(tmp_path / "r.json", document)), "decode_tokens_per_s").device == "Apple M1 Pro"
    document = [bench_test(0, 8, [1.0], cpu_info="")]
    with pytest.raises(UsageError, match="does not say which device"):
        read_results(write(tmp_path / "r.json", document))
    assert read_results(tmp_path / "r.json", device="Pixel 9")[0].device == "Pixel 9"


def test_llama_bench_at_a_depth(tmp_path: Path) -> None:
    tests = [bench_test(0, 8, [9.0], n_depth=512), bench_test(64, 0, [90.0], n_depth=512), bench_test(0, 8, [11.0])]
    rows = read_results(write(tmp_path / "r.json", tests))
    deep = one(rows, "decode_at_depth_tokens_per_s")
    assert (deep.samples, deep.context, deep.protocol["depth"]) == (((9.0,),), 512, 512)
    assert {row.metric for row in rows} == {"model_bytes", "decode_tokens_per_s", "decode_at_depth_tokens_per_s"}


@pytest.mark.slow
def test_what_llama_bench_itself_writes(tmp_path: Path, tiny_llama: Path) -> None:
    """Needs the peer's llama-bench: ``python -m tests.peers llama_bench_ratio`` builds it."""
    tool = cache_folder() / "peers" / "llama-cpp-tools" / "build" / "bin" / "llama-bench"
    if not tool.is_file():
        pytest.skip("llama-bench is not built")
    artifact = export(tiny_llama, tmp_path / "art", ExportConfig(to="gguf:q8_0"))
    for form in ("json", "jsonl"):
        command = [tool, "-m", artifact.entry, "-t", "1", "-p", "8", "-n", "4", "-r", "3", "-d", "0,16", "-o", form]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        rows = read_results(write(tmp_path / f"r.{form}", out), subject="q8_0")
        assert len(one(rows, "decode_tokens_per_s").samples[0]) == 3
        assert one(rows, "decode_at_depth_tokens_per_s").context == 16
        assert one(rows, "model_bytes").samples[0][0] == work_of(artifact).weight_bytes


def test_onnxruntime_perf_test_with_two_runs_and_statistics(tmp_path: Path) -> None:
    first = "".join(f"my,model,{s},52428800,97,{i}\n" for i, s in enumerate((0.010, 0.011, 0.012)))
    second = "".join(f"my,model,{s},62914560,98,{i}\n" for i, s in enumerate((0.020, 0.021, 0.022)))
    text = first + "\nMin Latency is 0.01sec\nP50 Latency is 0.011sec\n" + second
    with pytest.raises(UsageError, match="device"):
        read_results(write(tmp_path / "r.csv", text))
    rows = read_results(tmp_path / "r.csv", device="a board", subject="onnx-int8", artifact_id="a" * 64)
    latency = one(rows, "latency_ms")
    assert latency.samples == ((10.0, 11.0, 12.0), (20.0, 21.0, 22.0))
    assert latency.summary is not None
    assert latency.summary.value == pytest.approx(16.0)
    assert latency.summary.n == 6
    assert (latency.subject, latency.artifact_id, latency.origin) == ("onnx-int8", "a" * 64, "onnxruntime_perf_test")
    memory = one(rows, "peak_memory_bytes")
    assert memory.samples == ((62914560.0,),)
    assert "not subtracted" in memory.protocol["baseline"]


SUMMARY = {
    "estimated_inference_time": 3652, "estimated_inference_peak_memory": 166711296, "first_load_time": 1374293,
    "warm_load_time": 277823, "inference_memory_peak_range": [2654208, 39406752],
    "all_first_load_times": [1374293], "all_warm_load_times": [277823], "all_inference_times": [10003, 4205],
}  # fmt: skip
DETAIL = [{"name": "a", "type": "MUL", "compute_unit": "NPU"}] * 3 + [{"name": "b", "compute_unit": "CPU"}]


def test_ai_hub(tmp_path: Path) -> None:
    path = write(tmp_path / "job_results.json", {"execution_summary": SUMMARY, "execution_detail": DETAIL})
    rows = read_results(path, device="Samsung Galaxy S24 (Family)")
    assert one(rows, "latency_ms").samples == ((10.003, 4.205),)
    assert one(rows, "load_cold_ms").samples == ((1374.293,),)
    assert one(rows, "load_ms").samples == ((277.823,),)
    assert one(rows, "peak_memory_bytes").samples == ((39406752.0,),)
    assert one(rows, "latency_ms").placement == {"NPU": 3, "CPU": 1}
    assert one(rows, "latency_ms").backend == "CPU+NPU"


def test_ai_hub_of_an_older_client_keeps_no_samples(tmp_path: Path) -> None:
    summary = {"estimated_inference_time": 3652, "warm_load_time": -1, "estimated_inference_peak_memory": None}
    path = write(tmp_path / "j.json", {"execution_summary": summary, "execution_detail": []})
    [row] = read_results(path, device="d")
    assert (row.samples, row.protocol["samples"]) == ((), "not kept by the tool")
    assert row.summary is not None
    assert (row.summary.value, row.summary.statistic) == (3.652, "derived")


NOTE = {"tool": "xcode-coreml-performance-report", "model": "a.mlpackage", "device": "iPhone 15 Pro", "os": "iOS 18.5",
        "compute_units": "all", "prediction_ms": 2.5, "load_ms": [100.0, 110.0, 120.0],
        "operations": {"NeuralEngine": 412, "CPU": 3}}  # fmt: skip


def test_a_note_of_xcodes_report(tmp_path: Path) -> None:
    rows = read_results(write(tmp_path / "n.json", NOTE))
    latency, load = one(rows, "latency_ms"), one(rows, "load_ms")
    assert latency.summary is not None
    assert (latency.summary.value, latency.summary.statistic, latency.samples) == (2.5, "median", ())
    assert load.samples == ((100.0, 110.0, 120.0),)
    assert (latency.device, latency.runtime_version, latency.backend) == ("iPhone 15 Pro", "iOS 18.5", "all")
    assert latency.placement == {"NeuralEngine": 412, "CPU": 3}


def test_an_mlperf_of_xcode_says_what_to_do_instead(tmp_path: Path) -> None:
    (tmp_path / "a.mlperf").mkdir()
    write(tmp_path / "b.mlperf", "\x00binary")
    for name in ("a.mlperf", "b.mlperf"):
        with pytest.raises(BadInput, match="not published") as caught:
            read_results(tmp_path / name)
        assert "note" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "hello", "{}", "[]", "[1, 2]", '{"a": 1}', "<xml/>", "a,b\n1,2\n", '{"execution_summary": []}',
     '[{"n_prompt": 1}]', '{"tool": "other"}', "m,0.1,1,2\n"],
)  # fmt: skip
def test_a_file_of_unknown_shape_names_what_is_known(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match="no result of a tool that is known") as caught:
        read_results(write(tmp_path / "x.json", text), device="d")
    assert all(told in caught.value.hint for told in KNOWN.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"execution_summary": {"all_inference_times": [1' + "0" * 5000 + "]}}", "not valid JSON"),
        (json.dumps(TESTS)[:-20], "not valid JSON"),
        (json.dumps([bench_test(0, 8, [1.0], samples_ts=[])]), "no list of samples"),
        (json.dumps([bench_test(0, 8, [1.0], samples_ts=[-1.0])]), "positive numbers"),
        (json.dumps([bench_test(0, 8, [1.0], samples_ts=["1"])]), "positive numbers"),
        (json.dumps([bench_test(0, 8, [1.0], samples_ts=[float("inf")])]), "positive numbers"),
        (json.dumps([bench_test(0, 8, [1.0], samples_ts=[10**400])]), "damaged"),
        (json.dumps([bench_test(0, 8, [1.0], n_gen=-5)]), "n_gen is -5"),
        (json.dumps([bench_test(512, 128, [1.0])]), "no measurement that edgestill has a metric for"),
        (json.dumps({"execution_summary": {"all_inference_times": [True]}}), "positive numbers"),
        (json.dumps({"execution_summary": {}, "execution_detail": 3}), "no list"),
        (json.dumps({"execution_summary": {}}), "no measurement"),
        (json.dumps({**NOTE, "predictoin_ms": 1}), "did you mean 'prediction_ms'"),
        (json.dumps({**NOTE, "prediction_ms": "fast"}), "positive numbers"),
        (json.dumps({**NOTE, "operations": {"CPU": "3"}}), "a number for each"),
        ("m,0.1,1,2,0\nm,nan,1,2,1\n", "positive numbers"),
        ("m,0.1,1,2,0\nsomething else\n", "no inference"),
        ("m,0.1,1,2,3\n", "first run is missing"),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_results(write(tmp_path / "x.json", text), device="d")
    assert told in caught.value.message
    assert "x.json" in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_huge_file_a_folder_and_no_file(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as stream:
        stream.truncate(65 << 20)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, told in (("huge.json", "68 MB"), (".", "is a folder"), ("none", "does not exist"), ("bytes", "not text")):
        with pytest.raises(BadInput, match=told):
            read_results(tmp_path / name, device="d")
