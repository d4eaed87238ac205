"""The machine's peaks: against a second implementation, interleaved, cached, and honest about what is missing."""

from __future__ import annotations

import ctypes
import json
import time

import numpy as np
import pytest

from edgestill.bench import peaks as module
from edgestill.bench.peak_probe import PROBES, cache_bytes, main, probe
from edgestill.bench.peaks import Peak, Peaks, measure_peaks

SIZE = 32 << 20


def test_bandwidth_against_memcpy_of_the_c_library():
    """Two implementations of one copy, taken in turns; a wide band, since both see a machine that others use."""
    libc = ctypes.CDLL(None)
    source, target = np.full(SIZE, 1, np.uint8), np.empty(SIZE, np.uint8)
    target[:] = 0
    pointers = target.ctypes.data, source.ctypes.data

    def memcpy() -> float:
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            libc.memcpy(ctypes.c_void_p(pointers[0]), ctypes.c_void_p(pointers[1]), ctypes.c_size_t(SIZE))
            best = max(best, 2 * SIZE / (time.perf_counter() - start))
        return best

    ours, theirs = 0.0, 0.0
    for _ in range(3):
        ours = max(ours, *probe("copy", 1, 0.0, SIZE)["rates"])
        theirs = max(theirs, memcpy())
    assert 1 / 3 < ours / theirs < 3


def test_triad_computes_what_it_says():
    from edgestill.bench.peak_probe import _triad

    b, c = np.arange(200_000, dtype=np.float32), np.ones(200_000, np.float32)
    a = np.zeros_like(b)
    _triad((a, b, c))
    np.testing.assert_array_equal(a, b + 3)


def test_arithmetic_against_numpys_own_clock():
    """The probe's rate of a product, and one timed here: within a wide band."""
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    a @ a
    best = min(_seconds(lambda: a @ a) for _ in range(5))
    rate = max(probe("float_blas", 1, 0.0)["rates"])
    assert 1 / 4 < rate * best / (2 * 1024**3) < 4


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_the_largest_cache_is_read_from_the_system(tmp_path):
    for index, size in enumerate(("48K", "2M", "30720K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == 30720 << 10
    assert cache_bytes(tmp_path / "nowhere") == 32 << 20


def test_probes_run_in_processes_are_cached_and_name_what_is_missing(tmp_path, monkeypatch):
    launched = []

    def launch(kind, threads, seconds, size_bytes):
        launched.append(kind)
        if kind == "int8_onnxruntime":
            return {"kind": kind, "reason": "onnx is not installed"}
        return {"rates": [1e9 * len(launched), 5e8], "how": "as said"}

    class Quiet(module.LoadProbe):
        def __exit__(self, *_: object) -> None:
            self.result = {"busy": False}

    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "LoadProbe", Quiet)
    found = measure_peaks(1, rounds=3, cache=tmp_path)
    assert len(launched) == 3 * (len(PROBES) - 1) + 1
    assert set(launched[:6]) == set(PROBES)  # interleaved: all kinds before the second round
    assert found.peaks["int8_onnxruntime"] == Peak("int8_onnxruntime", None, reason="onnx is not installed")
    assert found.peaks["read"].launches == 3
    assert found.peaks["read"].lowest < found.peaks["read"].rate
    assert found.bandwidth.rate == max(found.peaks[kind].rate for kind in ("read", "copy", "triad"))
    assert found.arithmetic("int8") == found.arithmetic("float")
    assert measure_peaks(1, cache=tmp_path) == found
    assert len(launched) == 16  # the second time from the cache
    [path] = (tmp_path / "peaks").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "busy": True}))
    measure_peaks(1, rounds=1, cache=tmp_path)  # what a busy machine gave is not kept for good
    path.write_text("{")
    measure_peaks(1, rounds=1, cache=tmp_path)  # damaged: as if it were not there
    assert len(launched) == 16 + 2 * 6
    assert measure_peaks(2, rounds=1, cache=tmp_path).threads == 2
    assert len(list((tmp_path / "peaks").iterdir())) == 2


def test_a_probe_that_dies_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    found = measure_peaks(1, rounds=1, cache=tmp_path)
    assert found.bandwidth is None
    assert all("gave no answer" in peak.reason for peak in found.peaks.values())


def test_the_program_answers_in_json(capsys):
    assert main(["int8_onnxruntime", "--seconds", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rates"]) >= 5
    assert "uint8 by int8" in found["how"]


def test_no_peak_at_all():
    empty = Peaks(1, "", False, {})
    assert empty.bandwidth is None
    assert empty.arithmetic("float") is None


@pytest.mark.slow
def test_real_probes(tmp_path):
    found = measure_peaks(1, rounds=1, seconds=0.1, cache=tmp_path, size_bytes=SIZE)
    assert all(peak.rate is not None and peak.rate > 1e8 for peak in found.peaks.values())
