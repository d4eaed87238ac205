"""``measured.py RESULT SCRIPT ARGUMENT…``: run SCRIPT as Python would, then write the peak memory to RESULT.

The resident set is this process's own high-water mark (Linux: ``VmHWM``, which exec resets, while ``ru_maxrss`` still
holds what the parent had when it forked), or that of the largest child.
"""

import json
import os
import resource
import runpy
import sys


def main() -> None:
    result, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    with open(result, "w") as stream:
        json.dump({"peak_bytes": peak()}, stream)


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:
        with open("/proc/self/status") as stream:
            own = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, children)


main()
