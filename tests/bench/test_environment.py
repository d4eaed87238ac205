from __future__ import annotations

import getpass
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.bench import environment as module
from edgestill.bench.environment import LoadProbe, describe_environment, device_label, package_versions

ARM = """processor\t: 0
Features\t: fp asimd evtstrm aes crc32 asimdhp asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd0b

processor\t: 1
CPU part\t: 0xd0b
"""


def board(root: Path) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(ARM)
    for core in range(2):
        folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text("schedutil\n")
    return root


def test_a_board_is_read_from_its_files(tmp_path: Path) -> None:
    found = describe_environment(root=board(tmp_path))
    assert found["cpu"] == "ARM implementer 0x41 part 0xd0b"
    assert found["cpu_flags"] == ["asimd", "asimdhp", "asimddp", "i8mm"]
    assert (found["governor"], found["governor_reason"]) == ("schedutil", None)


def test_what_the_machine_does_not_tell_is_null_with_a_reason(tmp_path: Path) -> None:
    found = describe_environment(root=tmp_path)
    assert found["governor"] is None
    assert "cpufreq" in found["governor_reason"]


def test_no_host_or_user_name_and_plain_json() -> None:
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["memory_bytes"] > 1 << 20
    assert 1 <= environment["cores_usable"] <= environment["cores_logical"]
    for private in (platform.node(), str(Path.home())):
        assert private not in text or len(private) < 3
    assert f'"{getpass.getuser()}"' not in text
    assert environment["system"] in device_label(environment)


def test_versions_name_what_is_installed() -> None:
    import numpy

    assert package_versions()["numpy"] == numpy.__version__
    assert package_versions()["python"] == platform.python_version()


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_our_own_work_is_not_counted_as_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine on which nothing runs but our children: its counter is theirs, read by another call.
    monkeypatch.setattr(module, "_machine_seconds", lambda: (1000 + children_seconds(), 0.0))
    code = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    before = children_seconds()
    with LoadProbe() as probe:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert children_seconds() - before >= 0.5
    assert probe.result["others_fraction"] < 0.02
    assert probe.result["busy"] is False


def test_stolen_time_makes_a_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(5.0, 0.0), (5.0, 60.0)])
    monkeypatch.setattr(module, "_machine_seconds", lambda: next(readings))
    with LoadProbe() as probe:
        pass
    assert probe.result["busy"] is True
    assert probe.result["steal_fraction"] == 1.0


def test_a_neighbour_is_noticed() -> None:
    # Started before the probe and never waited for inside it: to the probe it is somebody else's.
    code = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as neighbour:
        time.sleep(0.3)
        with LoadProbe() as probe:
            time.sleep(1.0)
        neighbour.kill()
    assert probe.result["others_fraction"] > 0.05
