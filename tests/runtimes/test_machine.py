"""The facts of a machine, against psutil here and against a board's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgestill.runtimes.machine import machine_facts


@pytest.mark.skipif(sys.platform != "linux", reason="psutil and the kernel's files are compared on Linux")
def test_this_machine_is_what_psutil_says() -> None:
    found = machine_facts()
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["cores_logical"] == psutil.cpu_count(logical=True)
    assert found["cores_usable"] == len(os.sched_getaffinity(0))
    if found["cores_physical"] is not None:
        assert found["cores_physical"] == psutil.cpu_count(logical=False)
    json.dumps(found, allow_nan=False)


def test_cores_that_share_a_package_are_counted_once(tmp_path: Path) -> None:
    for thread, (package, core) in enumerate([(0, 0), (0, 1), (0, 0), (0, 1), (1, 0)]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{thread}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    assert machine_facts(root=tmp_path)["cores_physical"] == 3


def test_memory_of_a_board_comes_from_its_meminfo(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        3884368 kB\nMemFree:          100 kB\n")
    assert machine_facts(root=tmp_path)["memory_bytes"] == 3884368 * 1024


def test_it_runs_without_anything_installed() -> None:
    """-S -I: no site-packages, as on a bare board."""
    folder = Path(__file__).resolve().parents[2] / "runtimes"
    script = (
        "import sys, json, importlib.util as u\n"
        f"for name in ('machine', 'sensors'):\n"
        f"    spec = u.spec_from_file_location(name, {str(folder)!r} + '/' + name + '.py')\n"
        "    module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "    print(json.dumps((getattr(module, 'machine_facts', None) or module.read_sensors)()))\n"
    )
    out = subprocess.run([sys.executable, "-S", "-I", "-c", script], check=True, capture_output=True, text=True).stdout
    facts, sensors = map(json.loads, out.splitlines())
    assert facts["memory_bytes"] > 1 << 20
    assert set(sensors["reasons"]) <= set(sensors)
