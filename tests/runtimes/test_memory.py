"""Memory of this very process, and the page cache."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtimes import memory
from edgestill.runtimes.memory import PeakSampler, evict_page_cache, peak_rss, read_memory, reset_peak

MEBI = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@linux
def test_a_reading_tells_anonymous_from_file_backed(tmp_path):
    before = read_memory()
    block = np.ones(32 * MEBI, np.uint8)
    grown = read_memory()
    assert 30 * MEBI < grown.anonymous - before.anonymous < 40 * MEBI
    path = tmp_path / "weights"
    path.write_bytes(bytes(32 * MEBI))
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0
    after = read_memory()
    assert 30 * MEBI < after.file_backed - grown.file_backed < 40 * MEBI
    assert abs(after.anonymous - grown.anonymous) < 8 * MEBI
    assert after.rss >= after.anonymous + after.file_backed
    del block


@linux
def test_the_sampler_sees_a_peak_that_is_gone_at_the_end():
    sampler = PeakSampler()
    with sampler.sampling():
        before = read_memory().anonymous
        block = np.ones(64 * MEBI, np.uint8)
        time.sleep(0.1)
        del block
    assert sampler.anonymous - before > 60 * MEBI
    assert read_memory().anonymous - before < 8 * MEBI
    assert sampler.samples >= 4


@linux
def test_a_reading_agrees_with_the_kernels_other_page():
    """statm, that is read, against status, that names its numbers (counters may lag by a few pages per thread)."""
    rows = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    told = {row[0]: int(row[1]) * 1024 for row in rows if row[0] in ("RssAnon:", "RssFile:", "RssShmem:", "VmRSS:")}
    found = read_memory()
    assert found.anonymous == pytest.approx(told["RssAnon:"], abs=MEBI)
    assert found.file_backed == pytest.approx(told["RssFile:"] + told["RssShmem:"], abs=MEBI)
    assert found.rss == pytest.approx(told["VmRSS:"], abs=MEBI)


@linux
def test_a_long_block_is_sampled_less_and_less_often_and_ends_at_once():
    sampler = PeakSampler(interval=0.001)
    with sampler.sampling():
        time.sleep(0.5)
        before = time.perf_counter()
    assert time.perf_counter() - before < 0.4  # whoever sleeps is woken
    assert 10 < sampler.samples < 400


@linux
def test_the_peak_starts_anew(monkeypatch):
    block = np.ones(64 * MEBI, np.uint8)
    high = peak_rss()
    del block
    if not reset_peak():
        pytest.skip("clear_refs can't be written here")
    assert peak_rss() < high - 50 * MEBI


def test_elsewhere_what_is_not_known_is_none(monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(memory, "_STATM", Path("/nowhere/statm"))
    assert read_memory() == memory.MemoryReading(None, None, None)
    sampler = PeakSampler()
    with sampler.sampling():
        pass
    assert sampler.anonymous is None
    scale = 1 if sys.platform == "darwin" else 1024
    assert peak_rss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _in_memory(folder: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout
    return kind.strip() in ("tmpfs", "ramfs")


@linux
def test_pages_leave_the_cache_and_the_answer_is_checked(tmp_path):
    if _in_memory(tmp_path):
        pytest.skip("the temp folder lies in memory")
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "sub/b.bin"):
        (tmp_path / name).write_bytes(bytes(3 * MEBI))
    (tmp_path / "empty").touch()
    with (tmp_path / "a.bin").open("rb") as stream:
        assert memory._resident_bytes(stream) == 3 * MEBI
    evicted = evict_page_cache(tmp_path)
    assert evicted == memory.Eviction(True, 6 * MEBI, 0, None)
    assert (tmp_path / "a.bin").read_bytes() == bytes(3 * MEBI)


@linux
def test_a_mapped_file_stays_and_that_is_said(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(3 * MEBI))
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0  # its pages are in use
    evicted = evict_page_cache(tmp_path)
    assert not evicted.worked
    assert evicted.resident_bytes > MEBI
    assert f"of {3 * MEBI} bytes stayed" in evicted.reason


def test_without_fadvise_nothing_is_claimed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    evicted = evict_page_cache(tmp_path)
    assert (evicted.worked, evicted.resident_bytes) == (False, None)
    assert "posix_fadvise" in evicted.reason
