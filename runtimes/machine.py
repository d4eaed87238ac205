"""The machine that a worker runs on: processor, features, cores, memory, governor. Standard library only.

What a machine doesn't tell (a frequency governor inside a virtual machine) is ``None`` beside a reason. No host, user
or network names.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["machine_facts", "usable_threads"]

# CPU features that decide which kernels a runtime picks, so that change speed or int8 results.
_FLAGS = {
    "x86": ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    "arm": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
}


def machine_facts(*, root: Path = Path("/")) -> dict[str, Any]:
    """The machine as plain JSON; sizes are in bytes.

    ``root`` is where ``proc`` and ``sys`` are looked for (a test, or a copy of a board's).
    """
    processor, flags = _processor(root)
    governor, reason = _governor(root)
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpu": processor,
        "cpu_flags": flags,
        "cores_physical": _physical_cores(root),
        "cores_logical": os.cpu_count(),
        "cores_usable": usable_threads(),
        "memory_bytes": _memory_bytes(root),
        "governor": governor,
        "governor_reason": reason,
    }


def usable_threads() -> int:
    """CPU threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor(root: Path) -> tuple[str | None, list[str]]:
    """Model name and the flags that matter, from ``proc/cpuinfo``; on other systems what Python knows."""
    path = root / "proc/cpuinfo"
    if not path.is_file():
        return platform.processor() or None, []
    facts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip().lower(), value.strip())
    name = facts.get("model name") or facts.get("hardware")
    if name is None and "cpu part" in facts:
        name = f"ARM implementer {facts.get('cpu implementer', '?')} part {facts['cpu part']}"
    present = set((facts.get("flags") or facts.get("features") or "").split())
    return name, [flag for group in _FLAGS.values() for flag in group if flag in present]


def _governor(root: Path) -> tuple[str | None, str | None]:
    paths = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    names = {path.read_text(encoding="utf-8").strip() for path in paths}
    if not names:
        return None, "no cpufreq interface (a virtual machine, or not Linux)"
    return ", ".join(sorted(names)), None


def _physical_cores(root: Path) -> int | None:
    """Distinct (package, core) pairs of the kernel's topology; ``None`` where it is not told."""
    cores = set()
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        try:
            package = (folder / "physical_package_id").read_text(encoding="ascii").strip()
            cores.add((package, (folder / "core_id").read_text(encoding="ascii").strip()))
        except OSError:
            return None
    return len(cores) or None


def _memory_bytes(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
