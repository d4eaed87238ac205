"""The program that loads a user's ONNX Runtime, built with the real compiler: what Android's loader will find in it."""

from __future__ import annotations

import platform
import struct
import subprocess
from pathlib import Path

import pytest

from edgestill.errors import EdgestillError, UsageError
from edgestill.runtimes.native import HOST_NAME, find_host
from edgestill.runtimes.native.host_build import build_hosts
from edgestill.runtimes.native.library import _read, mmap
from edgestill.runtimes.native.zig import find_zig

# Android's entry point in the place of bionic: what the host calls there, in terms of glibc.
_BIONIC = """
#include <stdlib.h>
void __libc_init(void * stack, void (*unused)(void), int (*start)(int, char **, char **), const void ** lists) {
    char ** arguments = (char **) stack + 1;
    for (int i = 0; i < 6; i++) if (lists[i]) abort();
    exit(start(*(int *) stack, arguments, arguments + *(int *) stack + 1));
}
"""


def needs(path: Path) -> list[str]:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(path, data)[1]


def segments(path: Path) -> list[tuple[int, ...]]:
    data = path.read_bytes()
    (table,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    return [struct.unpack_from("<IIQQQQQQ", data, table + index * size) for index in range(count)]


def test_a_processor_that_it_is_not_built_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not built for 'riscv64'"):
        build_hosts("riscv64", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # zig makes glibc's stubs once for each processor
@pytest.mark.parametrize("target", ["aarch64", "x86_64"])
def test_the_form_that_each_system_loads(target: str, tmp_path: Path) -> None:
    try:
        find_zig()
    except EdgestillError as error:
        pytest.skip(error.message)
    made = {one.level: one for one in build_hosts(target, cache=tmp_path)}
    assert [one.name for one in made.values()] == [HOST_NAME, HOST_NAME]
    android = made["android"].path
    assert (needs(android), find_host(target, "android", cache=tmp_path)) == (["libc.so", "libdl.so"], android)
    found = segments(android)
    data = android.read_bytes()
    (interpreter,) = (data[s[2] : s[2] + s[5]] for s in found if s[0] == 3)
    assert interpreter == b"/system/bin/linker64\0"
    loaded = [s for s in found if s[0] == 1]
    assert all(s[7] == 16384 for s in loaded)  # pages of Android 15
    assert not any(s[1] & 1 and s[1] & 2 for s in loaded)  # nothing to write to and to execute
    assert not any(s[0] == 7 for s in found)  # no thread-local storage, which old Androids don't know
    glibc = made["glibc"].path
    assert "libc.so.6" in needs(glibc)
    again = {one.level: (one.sha256, one.compiled) for one in build_hosts(target, cache=tmp_path)}
    assert again == {level: (one.sha256, 0) for level, one in made.items()}


@pytest.fixture
def android_here(native_command: object, tmp_path: Path) -> list[str]:
    """The command of Android's program on this machine: glibc's loader, and a bionic of a few lines."""
    machine = platform.machine()
    loader = Path({"x86_64": "/lib64/ld-linux-x86-64.so.2"}.get(machine, f"/lib/ld-linux-{machine}.so.1"))
    try:
        zig, host = find_zig(), find_host(machine, "android")
    except EdgestillError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    if not loader.exists():
        pytest.skip("no glibc here")
    (tmp_path / "bionic.c").write_text(_BIONIC)
    for name in ("libc.so", "libdl.so"):
        source = "bionic.c" if name == "libc.so" else "empty.c"
        (tmp_path / "empty.c").write_text("")
        zig.run(["cc", "-target", f"{machine}-linux-gnu.2.17", "-shared", f"-Wl,-soname,{name}", source, "-ldl",
                 "-Wl,--no-as-needed", "-o", name], name, cwd=tmp_path, root=tmp_path)  # fmt: skip
    return [str(loader), "--library-path", str(tmp_path), str(host)]


@pytest.mark.slow
def test_androids_program_starts_as_its_loader_starts_it(android_here: list[str], tmp_path: Path) -> None:
    """Its own entry, its relocations and its calls; never seen on Android itself."""
    started = subprocess.run(android_here, capture_output=True, check=False, timeout=60)
    assert started.returncode == 2  # no library was named
    script = 'exec 3>"$0"; exec "$@"'
    answer = tmp_path / "answer"
    command = ["sh", "-c", script, str(answer), *android_here, str(tmp_path / "no such.so")]
    assert subprocess.run(command, check=False, timeout=60).returncode == 1
    size, status, length = struct.unpack_from("<qqq", answer.read_bytes())
    assert (status, size) == (1, 16 + (length + 8) // 8 * 8)
    assert b"no such.so" in answer.read_bytes()
