"""A toy model and the command of the worker that runs it (see toy_worker.py)."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def toy(tmp_path: Path) -> Callable[[str], Path]:
    """Make a toy model folder with a behaviour (``"hang@forward"``)."""

    def make(behaviour: str = "well") -> Path:
        folder = tmp_path / "toy"
        folder.mkdir(exist_ok=True)
        (folder / "behaviour").write_text(behaviour)
        return folder

    return make


@pytest.fixture(scope="session")
def toy_command() -> list[str]:
    """The command line of a worker that runs toy models."""
    script = Path(__file__).with_name("toy_worker.py")
    return [sys.executable, str(script), "--threads", "1", "--parent", str(os.getpid())]


@pytest.fixture(scope="session")
def native_command() -> Callable[[str], list[str]]:
    """The command line of the native runner: of this machine (``""``) or on an emulated ARM core (``"cortex-a76"``, at
    the level that this core takes, or at another one). Skips when it was not built."""
    from edgestill.errors import EdgestillError
    from edgestill.runtimes.machine import machine_facts
    from edgestill.runtimes.native import find_runner

    features = {"armv8.0": [], "dotprod": ["asimddp", "asimdhp"], "i8mm": ["asimddp", "asimdhp", "i8mm"]}

    def command(core: str = "", level: str = "armv8.0") -> list[str]:
        try:
            if not core:
                return [str(find_runner(platform.machine(), machine_facts()))]
            runner = find_runner("aarch64", {"cpu_flags": features[level]})
        except EdgestillError as error:
            pytest.skip(f"{error.message}; {error.hint}")
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if emulator is None:
            pytest.skip("no qemu-aarch64: apt-get install qemu-user-static")
        return [emulator, "-cpu", core, str(runner)]

    return command


@pytest.fixture(scope="session")
def make_elf() -> Callable[..., bytes]:
    """Make a shared library of just a header, a loaded segment at 0x1000 and a dynamic section."""

    def make(
        machine: int = 183, needed: Sequence[str] = ("liblog.so", "libc.so"), symbol: str = "OrtGetApiBase", *,
        bits: int = 2, kind: int = 3,
    ) -> bytes:  # fmt: skip
        names = b"\0" + b"".join(name.encode() + b"\0" for name in (*needed, symbol))
        place, entries = 1, []
        for name in needed:
            entries.append((1, place))
            place += len(name) + 1
        start = 64 + 2 * 56
        entries += [(5, 0x1000 + start + 16 * (len(needed) + 3)), (10, len(names)), (0, 0)]
        dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        size = start + len(dynamic) + len(names)
        header = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
        header += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x1000, 0x1000, size, size, 4096)
        segments += struct.pack("<IIQQQQQQ", 2, 6, start, 0x1000 + start, 0, len(dynamic), len(dynamic), 8)
        return header + segments + dynamic + names

    return make


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The library that onnxruntime's own wheel carries; skips where it has none."""
    spec = importlib.util.find_spec("onnxruntime")
    found = sorted(Path(spec.origin).parent.glob("capi/libonnxruntime.so.*")) if spec and spec.origin else []
    if not found:
        pytest.skip("onnxruntime's wheel has no libonnxruntime.so here (Linux only)")
    return found[0]


@pytest.fixture(scope="session")
def onnxruntime_command(native_command: Callable[..., list[str]], onnxruntime_library: Path) -> list[str]:
    """The native runner of this machine with that library. Skips when it was not built."""
    from edgestill.errors import EdgestillError
    from edgestill.runtimes.native import find_host

    command = native_command()
    try:
        host = find_host(platform.machine(), "glibc")
    except EdgestillError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    return [*command, "--onnxruntime", str(onnxruntime_library), "--host", str(host)]


@pytest.fixture(scope="session")
def browser_page() -> Iterator[Any]:
    """The target ``web:…`` with its page open in a real headless Chromium, one for all slow tests; skipped where there
    is no browser or no npm."""
    from edgestill.errors import EdgestillError
    from edgestill.runtimes.transports.web.browser import Browser, find_browser
    from edgestill.runtimes.transports.web.target import WebTarget

    try:
        executable = find_browser()
        target = WebTarget("127.0.0.1:0", timeout=300)
        address = target.address
    except EdgestillError as error:
        pytest.skip(f"no browser to test with: {error}")
    browser = Browser(executable, address or "")
    yield target
    browser.close()
    target.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the conformance tests that don't apply to a case, by the fixture they ask for."""
    left_out = []
    for item in items:
        wanted = set(getattr(item, "fixturenames", ()))
        if not wanted & {"generating", "exported"}:
            continue
        runtime, task = item.callspec.params["opened"]  # type: ignore[attr-defined]
        if ("generating" in wanted and task != "text-generation") or ("exported" in wanted and runtime.to is None):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
