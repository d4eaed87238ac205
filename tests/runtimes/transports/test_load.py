"""The load of a device: what others used, without our workers, of which several live side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.runtimes.transports.load import UNKNOWN, LoadMeter, Ticks, load_between
from edgestill.runtimes.transports.shell import RemoteShell


class HereShell(RemoteShell):
    """This machine's own sh."""

    name = "board here"

    def connect(self) -> None: ...
    def argv(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def send(self, *_: object) -> None: ...
    def put(self, *_: object) -> None: ...
    def get(self, *_: object) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("name", ["pid", "host.pid"])  # the worker, and a second process that it started
def test_what_a_worker_used_is_ours_even_after_its_end(name: str, tmp_path: Path) -> None:
    (tmp_path / "exchange/a").mkdir(parents=True)
    meter = LoadMeter(HereShell(), str(tmp_path))
    before = meter.read()
    assert before is not None
    assert before.ours == 0
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as worker:
        (tmp_path / "exchange/a" / name).write_text(f"{worker.pid}\n")
        assert worker.stdout is not None
        worker.stdout.readline()
        during = meter.read()
        worker.kill()
    (tmp_path / "exchange/a" / name).unlink()
    time.sleep(0.05)
    after = meter.read()
    assert during is not None
    assert after is not None
    hertz = os.sysconf("SC_CLK_TCK")
    assert 0.25 <= during.ours / hertz <= 0.6
    assert after.ours == during.ours
    assert after.total > before.total
    assert load_between(before, after)["others_fraction"] is not None


def test_fractions_are_of_all_processors() -> None:
    before = Ticks(1000, 10, 10_000, 500)
    assert load_between(before, Ticks(1500, 10, 11_000, 950)) == {
        **UNKNOWN, "others_fraction": 0.05, "steal_fraction": 0.0, "busy": False
    }  # fmt: skip
    assert load_between(before, Ticks(1700, 10, 11_000, 950))["busy"] is True
    assert load_between(before, Ticks(1500, 210, 11_000, 1000))["busy"] is True  # the hypervisor took it
    assert load_between(before, None) == UNKNOWN
