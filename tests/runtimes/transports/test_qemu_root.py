"""The aarch64 root file system: what is missing is named, nothing half-built is found, a done step is kept."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
from pathlib import Path

import pytest

from edgestill.errors import EdgestillError, MissingDependency, ResourceExhausted
from edgestill.runtimes.transports import qemu_root
from edgestill.runtimes.transports.qemu_cores import CORES
from edgestill.runtimes.transports.qemu_root import build_root, find_root


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with an emulator that can't be run and what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _script(folder / "qemu-aarch64-static", "exit 1")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_tools_that_are_missing(tmp_path: Path, tools: Path) -> None:
    with pytest.raises(MissingDependency, match="mmdebstrap is not installed") as caught:
        build_root(tmp_path / "cache")
    assert caught.value.hint == "apt-get install mmdebstrap"
    (tools / "qemu-aarch64-static").unlink()
    with pytest.raises(MissingDependency) as caught:
        build_root(tmp_path / "cache")
    assert caught.value.hint == "apt-get install qemu-user-static"
    with pytest.raises(MissingDependency) as caught:
        find_root(tmp_path / "cache")
    assert caught.value.hint == "edgestill devices build-root"


@pytest.mark.parametrize(
    ("says", "kind", "words"),
    [
        ("E: Unable to locate package busybox", EdgestillError, "Unable to locate package busybox"),
        ("tar: write error: No space left on device", ResourceExhausted, "no space left"),
        ("E: Failed to fetch http://user:secret@mirror/x", EdgestillError, "Failed to fetch the mirror"),
    ],
)
def test_mmdebstrap_fails(tmp_path: Path, tools: Path, says: str, kind: type[EdgestillError], words: str) -> None:
    _script(tools / "mmdebstrap", f"echo '{says}' >&2; exit 25")
    with pytest.raises(kind, match=words) as caught:
        build_root(tmp_path / "cache")
    assert "secret" not in str(caught.value)
    with pytest.raises(MissingDependency):
        find_root(tmp_path / "cache")


def test_a_small_disk_is_seen_before_anything_is_fetched(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _script(tools / "mmdebstrap", f"touch {tmp_path}/ran; exit 1")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ResourceExhausted, match="1 MiB are free"):
        build_root(tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_root_without_its_stamp_is_none_and_one_with_it_is_taken(tmp_path: Path, tools: Path) -> None:
    folder = qemu_root._folder(qemu_root._versions(), tmp_path)
    (folder / "system").mkdir(parents=True)
    with pytest.raises(MissingDependency):
        find_root(tmp_path)
    (folder / "root.json").write_text(json.dumps({}))
    root = find_root(tmp_path)
    assert root.path == folder
    _script(tools / "mmdebstrap", "exit 1")  # it is not called
    assert build_root(tmp_path) == root


def test_two_at_once(tmp_path: Path, tools: Path) -> None:
    """The second waits for the lock, and finds what the first one built."""
    _script(tools / "mmdebstrap", f"touch {tmp_path}/ran; exit 1")
    folder = qemu_root._folder(qemu_root._versions(), tmp_path / "cache")
    folder.parent.mkdir(parents=True)
    waiting = threading.Event()
    found: list[qemu_root.Root] = []

    def told(message: str, fraction: float | None = None) -> None:
        if message.startswith("waiting"):
            waiting.set()

    with (folder.parent / f"{folder.name}.lock").open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(build_root(tmp_path / "cache", progress=told)))
        second.start()
        assert waiting.wait(30)
        folder.mkdir()
        (folder / "root.json").write_text("{}")
    second.join(30)
    assert [root.path for root in found] == [folder]
    assert not (tmp_path / "ran").exists()


def test_a_step_that_is_done_is_kept(tmp_path: Path, tools: Path) -> None:
    """Debian's packages came, then pip could not be run: the next try begins with the wheels."""
    folder = qemu_root._folder(qemu_root._versions(), tmp_path)
    partial = folder.parent / f"{folder.name}.partial"
    (partial / "system/usr").mkdir(parents=True)
    (partial / "unpacked").mkdir()
    _script(tools / "mmdebstrap", f"touch {tmp_path}/ran; exit 1")
    seen: list[str] = []

    def told(message: str, fraction: float | None = None) -> None:
        seen.append(message)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_root(tmp_path, progress=told)
    assert seen[0].startswith("numpy ")
    assert not (tmp_path / "ran").exists()
    assert (partial / "system/usr").is_dir()


def test_a_core_tells_who_it_is(tmp_path: Path) -> None:
    (tmp_path / "system/usr").mkdir(parents=True)
    qemu_root._cores(tmp_path)
    qemu_root._cores(tmp_path)  # again, after a failure
    for name, core in CORES.items():
        prefix = tmp_path / "cores" / name
        if core.machine != "aarch64":
            assert not prefix.exists()
            continue
        told = (prefix / "proc/cpuinfo").read_text()
        assert f"CPU part\t: {core.part:#05x}\n" in told
        assert ("asimddp" in told.split()) == (name in {"cortex-a55", "cortex-a76", "cortex-a710", "neoverse-n1",
                                                        "neoverse-v1", "max"})  # fmt: skip
        assert (prefix / "usr").resolve() == tmp_path / "system/usr"
