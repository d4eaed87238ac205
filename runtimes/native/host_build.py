"""Builds the program that loads a user's ONNX Runtime for the runner: small, in C, linked for glibc and for Android.

The runner itself is static and can load nothing: a library needs the device's own C library and dynamic loader. For
Linux zig has what the linker asks for. For Android it has nothing, and none is needed: ``host.c`` calls a dozen
functions whose types are the same in every 64-bit C library (``host_libc.h``), so one object is linked for both, and
the linker only has to be told that Android's ``libc.so`` and ``libdl.so`` have those names (stubs of a few bytes, made
here), who loads it (``/system/bin/linker64``) and where it begins (``host_android.c``).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...fetch import cache_folder, cache_lock
from ...files import disk_errors
from ...progress import Progress, silent
from .build import BuiltRunner, find_built, find_zig, write_stamp
from .find import HOST_NAME, host_folder
from .levels import levels_of
from .library import Libc
from .source import HOST_ANDROID, HOST_FLAGS, HOST_GLIBC
from .zig import Zig

__all__ = ["build_hosts"]

_HERE = Path(__file__).parent
# What host_libc.h and host_android.c declare, and what a compiler may call on its own; by the library that has it.
_ANDROID: Mapping[str, tuple[str, ...]] = {
    "libc.so": ("__libc_init", "_exit", "calloc", "clock_gettime", "free", "memcmp", "memcpy", "memmove",
                "memset", "read", "realloc", "strlen", "write"),
    "libdl.so": ("dlerror", "dlopen", "dlsym"),
}  # fmt: skip


def build_hosts(target: str, *, cache: Path | None = None, progress: Progress = silent) -> tuple[BuiltRunner, ...]:
    """Build the program for ``target`` (``aarch64``, ``x86_64``) and each C library; takes seconds.

    Raises what :func:`.build.build_runner` raises.
    """
    cpu = levels_of(target)[0].cpu
    zig = find_zig()
    root = (cache or cache_folder()) / "runner"
    found = []
    with cache_lock(root / "lock", lambda: progress("another process builds the runner: waiting for it")):
        for libc in ("glibc", "android"):
            folder = host_folder(target, libc, cache=cache)
            there = find_built(folder, HOST_NAME, target, libc, zig)
            if there is None:
                progress(f"ONNX Runtime's program for {libc}")
                with disk_errors(root):
                    there = _build(root, folder, target, cpu, libc, zig)
            found.append(there)
    return tuple(found)


def _build(root: Path, folder: Path, target: str, cpu: str, libc: Libc, zig: Zig) -> BuiltRunner:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = _Work(root, Path(scratch), target, cpu, zig)
        program = work.for_glibc() if libc == "glibc" else work.for_android()
        program.chmod(0o755)
        os.replace(program, folder / HOST_NAME)
    path = folder / HOST_NAME
    digest = write_stamp(path, libc, zig)
    seconds = time.monotonic() - began
    return BuiltRunner(target, libc, path, digest, path.stat().st_size, work.compiled, 0, seconds, HOST_NAME)


class _Work:
    """The objects of one program, in the folder ``scratch``."""

    def __init__(self, root: Path, scratch: Path, target: str, cpu: str, zig: Zig) -> None:
        self._root, self._scratch, self._target, self._cpu, self._zig = root, scratch, target, cpu, zig
        self.compiled = 0

    def for_glibc(self) -> Path:
        program = self._scratch / HOST_NAME
        target = ["-target", f"{self._target}-linux-gnu.{HOST_GLIBC}", f"-mcpu={self._cpu}"]
        self._run(
            ["cc", *target, "-pie", "-s", self._object(_HERE / "host.c"), "-ldl", "-o", str(program)], "for glibc"
        )
        return program

    def for_android(self) -> Path:
        program = self._scratch / HOST_NAME
        objects = [self._object(_HERE / name) for name in ("host.c", "host_android.c")]
        stubs = [self._stub(library, names) for library, names in _ANDROID.items()]
        self._run(["ld.lld", *HOST_ANDROID, *objects, *stubs, "-o", str(program)], "for Android")
        return program

    def _object(self, source: Path) -> str:
        made = self._scratch / f"{source.stem}.o"
        target = ["-target", f"{self._target}-linux-musl", f"-mcpu={self._cpu}"]  # no header of musl's is read
        flags = HOST_FLAGS if source.suffix == ".c" else ()
        self._run(["cc", "-c", *target, *flags, str(source), "-o", str(made)], source.name)
        self.compiled += 1
        return str(made)

    def _stub(self, library: str, names: Sequence[str]) -> str:
        """A shared library of that name that only says which functions it has."""
        source = self._scratch / f"{library}.s"
        lines = [f".globl {name}\n.type {name},%function\n{name}:\n" for name in names]
        source.write_text(f".text\n{''.join(lines)}", encoding="utf-8")
        made = self._scratch / library
        self._run(
            ["ld.lld", "-shared", "-soname", library, self._object(source), "-o", str(made)], f"a stub of {library}"
        )
        return str(made)

    def _run(self, arguments: Sequence[str], what: str) -> None:
        self._zig.run(
            arguments, f"ONNX Runtime's program ({what}) for {self._target}", cwd=self._scratch, root=self._root
        )
