"""Memory of this process, and the page cache under a model. Standard library only; Linux gives most, others less.

What is what: *anonymous* memory is what the process made (weights that were copied or dequantised, activations, KV
cache); *file-backed* memory is mapped files (memory-mapped weights, libraries), which the kernel can drop. Their
current values come from ``/proc/self/statm`` (resident pages, and those of them that files or shared memory are
behind), where no peaks are kept: a thread samples every 10 ms (:class:`PeakSampler`), so a shorter peak may be missed.
The peak of their sum, ``VmHWM``, is exact; writing 5 to ``/proc/self/clear_refs`` resets it, which separates the peak
of loading from that of running.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import list_files

__all__ = ["Eviction", "MemoryReading", "PeakSampler", "evict_page_cache", "peak_rss", "read_memory", "reset_peak"]

SAMPLE_SECONDS = 0.01
_SLOWEST_SECONDS = 0.05
_STEADY_SAMPLES = 50
_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()


@dataclass(frozen=True)
class MemoryReading:
    """Bytes that are resident now; ``None`` where the system does not tell."""

    anonymous: int | None
    file_backed: int | None
    rss: int | None


def read_memory() -> MemoryReading:
    """What is resident now (Linux; all ``None`` elsewhere)."""
    try:
        descriptor = os.open(_STATM, os.O_RDONLY)
    except OSError:
        return MemoryReading(None, None, None)
    try:
        return _reading(descriptor)
    finally:
        os.close(descriptor)


def _reading(descriptor: int) -> MemoryReading:
    """From an open ``/proc/self/statm``: two system calls less, and the kernel formats seven numbers instead of fifty
    lines. It runs beside what is measured."""
    fields = os.pread(descriptor, 256, 0).split()
    resident, shared = int(fields[1]) * _PAGE_BYTES, int(fields[2]) * _PAGE_BYTES
    return MemoryReading(resident - shared, shared, resident)


def peak_rss() -> int:
    """Highest resident set in bytes, since the last :func:`reset_peak` where that works, else since the start."""
    if (peak := _status().get("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def reset_peak() -> bool:
    """Start :func:`peak_rss` anew; ``False`` where the system has no such thing (see proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status() -> dict[str, int]:
    """The byte counts of ``/proc/self/status`` from the peak of the resident set on; empty where there are none."""
    try:
        descriptor = os.open(_STATUS, os.O_RDONLY)
    except OSError:
        return {}
    try:
        text = os.read(descriptor, 1 << 14)
    finally:
        os.close(descriptor)
    found = text.find(b"VmHWM:")
    rows = (line.split() for line in text[found:].splitlines()[:6]) if found >= 0 else ()
    return {row[0].decode().rstrip(":"): int(row[1]) * 1024 for row in rows}


class PeakSampler:
    """Highest anonymous and file-backed memory seen inside ``with sampler.sampling():`` blocks, in bytes.

    A reading is taken when a block starts and ends, and in between by a thread: every 10 ms for half a second, then
    less and less often, up to 50 ms (a long block repeats itself). ``None`` where :func:`read_memory` has nothing.
    """

    def __init__(self, interval: float = SAMPLE_SECONDS) -> None:
        self.anonymous: int | None = None
        self.file_backed: int | None = None
        self.samples = 0
        self._interval = interval
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample until the block ends."""
        self.sample()
        try:
            descriptor = os.open(_STATM, os.O_RDONLY)
        except OSError:  # nothing to sample on this system
            yield
            return
        stop = threading.Lock()  # held until the block ends; waiting for it costs a third of waiting for an Event
        stop.acquire()
        thread = threading.Thread(target=self._run, args=(stop, descriptor), name="memory-sampler", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.release()
            thread.join()
            os.close(descriptor)
            self.sample()

    def sample(self) -> MemoryReading:
        """Take one reading into account."""
        now = read_memory()
        self._count(now)
        return now

    def _count(self, now: MemoryReading) -> None:
        if now.anonymous is not None and now.file_backed is not None:
            with self._lock:
                self.anonymous = max(self.anonymous or 0, now.anonymous)
                self.file_backed = max(self.file_backed or 0, now.file_backed)
                self.samples += 1

    def _run(self, stop: threading.Lock, descriptor: int) -> None:
        taken = 0
        slowest = max(self._interval, _SLOWEST_SECONDS)
        while not stop.acquire(timeout=min(slowest, self._interval * max(1, taken / _STEADY_SAMPLES))):
            self._count(_reading(descriptor))
            taken += 1


@dataclass(frozen=True)
class Eviction:
    """Whether the page cache let go of a folder: bytes in all and still resident, and a reason when it didn't."""

    worked: bool
    total_bytes: int
    resident_bytes: int | None
    reason: str | None


def evict_page_cache(folder: Path) -> Eviction:
    """Ask the kernel to drop the cached pages of all files in ``folder``, and look whether it did.

    ``posix_fadvise(DONTNEED)`` drops clean pages that nobody maps; files are synced first. Memory file systems keep
    theirs. The answer is checked with mincore(2), so a cold load time is reported only when it was one: at most 1 % of
    the pages may remain.
    """
    total = sum((folder / path).stat().st_size for path in list_files(folder))
    if not hasattr(os, "posix_fadvise"):
        return Eviction(False, total, None, f"{sys.platform} has no posix_fadvise")
    resident = 0
    for path in list_files(folder):
        with (folder / path).open("rb") as stream:
            with contextlib.suppress(OSError):  # a read-only file system has nothing to sync
                os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            pages = _resident_bytes(stream)
            if pages is None:
                return Eviction(False, total, None, "mincore does not tell whether pages are cached")
            resident += pages
    if resident > total // 100:
        return Eviction(False, total, resident, f"{resident} of {total} bytes stayed in the page cache")
    return Eviction(True, total, resident, None)


def _resident_bytes(stream: Any) -> int | None:
    """Bytes of an open file that are in the page cache, or ``None`` when that can't be asked."""
    import ctypes
    import mmap

    size = os.fstat(stream.fileno()).st_size
    if size == 0:
        return 0
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return None
    # A private writable mapping: ctypes takes the address of nothing less; it is never touched.
    with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapping)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags)
        del anchor  # else the mapping can't be closed
    return None if failed else min(size, sum(flag & 1 for flag in flags) * mmap.PAGESIZE)
