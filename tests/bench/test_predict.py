"""Predictions against arithmetic done here by hand, and what is said where nothing is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgestill.bench import predict_compute, predict_memory
from edgestill.bench.points import load_points
from edgestill.bench.predict import Prediction, method_errors, predict, predicted_metrics
from edgestill.bench.predict_calibration import Calibration, Ratio
from edgestill.bench.predict_compute import compute_points, fit_compute
from edgestill.bench.predict_efficiency import fit_efficiency
from edgestill.bench.predict_memory import fit_memory, load_memory_points
from edgestill.bench.predict_work import Work
from edgestill.bench.profiles import Fact, find_profile

DECODER = Work("llama.cpp", "text-generation", 2_008_000_000, 3_300_000_000, 100_000, 2_020_000_000, 8192)
ENCODER = Work("llama.cpp", "feature-extraction", 5_700_000, 5_300_000, None, 19_600_000, 256)


def found(rows: list[Prediction], name: str) -> Prediction:
    [row] = [row for row in rows if row.metric == name]
    return row


def test_decode_speed_is_bandwidth_by_efficiency_over_bytes() -> None:
    row = found(predict(DECODER, find_profile("raspberry-pi-5-4gb"), length=100, new_tokens=20), "decode_tokens_per_s")
    spread = fit_efficiency(load_points()).predict("raspberry-pi-5-16gb", "cpu", DECODER.bits)
    assert spread is not None
    assert row.value == pytest.approx(17.07e9 * spread.value / (2.008e9 + 110 * 100_000))
    assert row.low is not None
    assert row.high is not None
    assert row.low < row.value < row.high
    assert row.method["device_fitted"] is True
    assert row.method["extrapolated"] is False
    assert row.method["mean_error"] == round(method_errors()["decode"].leave_one_out, 4)


def test_a_phone_never_measured_gets_a_wider_interval_and_the_error_of_unseen_devices() -> None:
    seen = found(predict(DECODER, find_profile("oneplus-12"), length=64, new_tokens=8), "decode_tokens_per_s")
    new = found(predict(DECODER, find_profile("snapdragon-8-gen-2"), length=64, new_tokens=8), "decode_tokens_per_s")
    assert new.high / new.low > 1.3 * seen.high / seen.low  # type: ignore[operator]
    assert new.method["mean_error_of"] == "leave one device out"
    assert new.method["mean_error"] > seen.method["mean_error"]


def test_a_model_faster_than_all_published_ones_gets_an_interval_that_reaches_down_to_them() -> None:
    small = replace(DECODER, weight_bytes=100_000_000, weights=135_000_000, kv_bytes_per_token=0)
    row = found(predict(small, find_profile("iphone-15"), length=64, new_tokens=8), "decode_tokens_per_s")
    spread = fit_efficiency(load_points()).predict("iphone-15", "gpu", small.bits)
    fastest = max(p.tokens_per_s for p in load_points() if p.processor == "gpu")
    assert spread is not None
    assert row.high == pytest.approx(spread.high * 512)  # 51.2 GB/s over 0.1 GB
    assert row.low == pytest.approx(fastest * spread.low / spread.value)
    assert row.value == pytest.approx((spread.value * 512 * fastest) ** 0.5)
    assert row.method["extrapolated"] is True


def test_prompts_go_by_the_devices_own_prompt_speeds() -> None:
    rows = predict(replace(DECODER, weights=6_740_000_000), find_profile("apple-m1-pro"), length=512, new_tokens=8)
    rate, first = found(rows, "prefill_tokens_per_s"), found(rows, "time_to_first_token_ms")
    assert rate.value == pytest.approx(np.sqrt(235.16 * 232.55), rel=1e-6)  # its two quantised anchors, same size
    assert first.value == pytest.approx(512 / rate.value * 1e3)  # type: ignore[operator]
    assert first.low == pytest.approx(512 / rate.high * 1e3)  # type: ignore[operator]


def test_an_encoder_has_a_latency_and_its_size_widens_the_interval() -> None:
    profile = find_profile("raspberry-pi-5-8gb")
    small = found(predict(ENCODER, profile, length=128, new_tokens=0), "latency_ms")
    large = found(predict(replace(ENCODER, weights=6_000_000_000), profile, length=128, new_tokens=0), "latency_ms")
    assert small.value is not None
    assert small.high / small.low > large.high / large.low  # type: ignore[operator]


@pytest.mark.parametrize(
    ("device", "work", "metric", "told"),
    [
        ("raspberry-pi-4-4gb", DECODER, "decode_tokens_per_s", "no documented memory bandwidth"),
        ("snapdragon-8-gen-2", DECODER, "prefill_tokens_per_s", "no published prompt speed with quantised"),
        ("snapdragon-8-gen-2", DECODER, "memory_share", "no documented memory"),
        ("rk3588-npu", DECODER, "decode_tokens_per_s", "does not run on an NPU"),
        ("iphone-15", replace(DECODER, engine="onnxruntime"), "decode_tokens_per_s", "on CPUs only"),
        ("oneplus-12", replace(DECODER, engine="onnxruntime"), "prefill_tokens_per_s", "devices calibrate"),
        ("oneplus-12", replace(ENCODER, engine="onnxruntime"), "latency_ms", "devices calibrate"),
        ("oneplus-12", replace(DECODER, engine="coreml"), "peak_memory_bytes", "no measured memory of coreml"),
    ],
)
def test_what_is_not_known_is_null_with_the_reason(device: str, work: Work, metric: str, told: str) -> None:
    rows = predict(work, find_profile(device), length=64, new_tokens=8)
    assert [row.metric for row in rows] == list(predicted_metrics(work.task))
    row = found(rows, metric)
    assert row.value is None
    assert told in (row.reason or "")


def test_another_runtime_is_carried_over_by_its_measured_ratio_with_more_doubt() -> None:
    ort = replace(DECODER, engine="onnxruntime")
    calibration = Calibration("here", False, (Ratio("onnxruntime", "decode", float(np.log(0.8)), 0.001, 2),))
    profile = find_profile("oneplus-12")
    base = found(predict(DECODER, profile, length=64, new_tokens=8), "decode_tokens_per_s")
    row = found(predict(ort, profile, length=64, new_tokens=8, calibration=calibration), "decode_tokens_per_s")
    assert row.value == pytest.approx(0.8 * base.value)  # type: ignore[operator]
    assert row.high / row.low > base.high / base.low  # type: ignore[operator]
    assert row.method["calibration"] == "here"


@pytest.mark.parametrize(
    ("gigabytes", "verdict"), [(8.0, "fits"), (2.05, "not killed"), (0.05, "may be killed"), (0.01, "killed:")]
)
def test_will_it_be_killed(gigabytes: float, verdict: str) -> None:
    """llama.cpp maps its 2 GB, so that only its 20 to 65 MB of buffers can get it killed."""
    profile = replace(find_profile("raspberry-pi-5-4gb"), memory=Fact(gigabytes * 1e9, "bytes", "x", "s"))
    row = found(predict(replace(DECODER, kv_bytes_per_token=0), profile, length=64, new_tokens=8), "memory_share")
    assert row.method["verdict"].startswith(verdict)


def test_onnx_runtime_is_killed_where_llama_cpp_is_not() -> None:
    profile = replace(find_profile("raspberry-pi-5-4gb"), memory=Fact(2.5e9, "bytes", "x", "s"))
    ort = replace(DECODER, engine="onnxruntime")
    row = found(predict(ort, profile, length=64, new_tokens=8), "memory_share")
    assert row.method["verdict"].startswith(("killed", "may be killed"))


def test_the_limit_of_one_process_counts_where_it_is_documented() -> None:
    profile = replace(find_profile("iphone-15-pro"), process_memory=Fact(1e9, "bytes", "1 GB", "s"))
    row = found(predict(DECODER, profile, length=64, new_tokens=8), "memory_share")
    assert row.method["memory_bytes"] == 1e9


def test_memory_is_the_file_the_cache_and_what_the_runtime_adds() -> None:
    rows = predict(DECODER, find_profile("raspberry-pi-5-4gb"), length=100, new_tokens=20)
    model = fit_memory(load_memory_points())["llama.cpp"]
    anonymous, mapped = found(rows, "peak_anonymous_bytes"), found(rows, "peak_file_backed_bytes")
    assert anonymous.value == pytest.approx(np.exp(model.mean) + 120 * 100_000)
    assert mapped.value == pytest.approx(2.02e9, rel=0.01)
    assert found(rows, "peak_memory_bytes").value == pytest.approx(anonymous.value + mapped.value)  # type: ignore[operator]


def test_the_compute_model_equals_least_squares_with_a_column_for_each_device() -> None:
    points = compute_points()
    keys = sorted({(p.device, p.floating) for p in points})
    x = np.zeros((len(points), len(keys) + 1))
    for row, p in enumerate(points):
        x[row, keys.index((p.device, p.floating))] = 1
        x[row, -1] = np.log(p.weights)
    y = np.log([p.operations_per_s for p in points])
    beta, *_ = np.linalg.lstsq(x, y, rcond=None)
    rest = float(((y - x @ beta) ** 2).sum() / (len(points) - len(keys) - 1))
    model = fit_compute(points)
    assert model.slope == pytest.approx(float(beta[-1]), rel=1e-6)
    assert model.rest_variance == pytest.approx(rest, rel=1e-6)


def test_every_method_says_its_error_on_points_that_it_did_not_see() -> None:
    errors = method_errors()
    assert errors["prefill"].leave_one_out == pytest.approx(
        float(np.mean(np.abs(predict_compute.leave_one_out(compute_points()))))
    )
    assert errors["memory"].points == len(predict_memory.leave_one_out(load_memory_points())) == 15
    assert set(errors["decode"].leave_one_device_out) == {"cpu", "gpu", "npu"}
