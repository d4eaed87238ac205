"""How far the resident set of this process rises above a point. Standard library only."""

import gc
import resource
import sys


def mark() -> int:
    """Bytes resident now; on Linux the high-water mark starts again from here."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return _status("VmRSS:")
    except OSError:
        return peak()


def peak() -> int:
    """The high-water mark in bytes."""
    try:
        return _status("VmHWM:")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(key))
