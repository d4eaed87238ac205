"""Builds the native runner: every unit compiled once, linked into a static binary for each level.

The compiler is ``ziglang`` (a Python package): clang with the headers and libraries of musl for other machines, so no
NDK and no root. Objects are kept by what they are made from, so that a second level compiles only the kernels that its
instructions change, and a build that was interrupted goes on where it was. The same source, flags and compiler give
the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, nearest
from ...fetch import cache_folder, cache_lock
from ...files import atomic_write, disk_errors, hash_file, hash_json
from ...progress import Progress, silent
from .find import RUNNER_NAME, runner_folder
from .levels import Level, levels_of
from .source import COMMON_FLAGS, ENGINE, Unit, engine_source, own_sources, runner_id, units
from .zig import Zig, find_zig

__all__ = ["BuiltRunner", "build_runner", "copy_runners", "find_built", "find_zig", "write_stamp"]

_STAMP = "build.json"


@dataclass(frozen=True)
class BuiltRunner:
    """One binary: how many units were ``compiled`` for it and how many ``reused`` (both 0: it was there), in seconds
    of wall time. ``level`` is what it is built for: instructions, or (a host of ONNX Runtime) a C library."""

    target: str
    level: str
    path: Path
    sha256: str
    size_bytes: int
    compiled: int
    reused: int
    seconds: float
    name: str = RUNNER_NAME


def build_runner(
    target: str,
    level: str = "all",
    *,
    jobs: int = 1,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[BuiltRunner, ...]:
    """Build the runner of ``target`` (``aarch64``, ``x86_64``) for a level, or for ``"all"`` of them.

    ``jobs`` compilations run at once. Waits while another process builds. Raises :class:`MissingDependency` without
    ziglang, :class:`UsageError` for an unknown target or level, :class:`EdgestillError` when a file does not compile,
    and what :func:`.source.engine_source` raises.
    """
    wanted = [one for one in levels_of(target) if level in ("all", one.name)]
    if not wanted:
        names = [one.name for one in levels_of(target)]
        raise UsageError(f"no level {level!r} for {target}", hint=f"{nearest(level, names)}, or all of them: all")
    zig = find_zig()
    root = (cache or cache_folder()) / "runner"
    with cache_lock(root / "lock", lambda: progress("another process builds the runner: waiting for it")):
        found = []
        for one in wanted:
            folder = runner_folder(one.name, cache=cache)
            there = find_built(folder, RUNNER_NAME, target, one.name, zig)
            if there is None:
                source = engine_source(cache=cache, progress=progress)
                there = _Builder(root, source, one, zig, jobs, progress).build(folder)
            found.append(there)
        return tuple(found)


def find_built(folder: Path, name: str, target: str, level: str, zig: Zig) -> BuiltRunner | None:
    """The binary of an earlier build with this compiler, if its bytes are as they were."""
    path = folder / name
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        if stamp["zig"] != zig.version or stamp["sha256"] != hash_file(path):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return BuiltRunner(target, level, path, stamp["sha256"], path.stat().st_size, 0, 0, 0.0, name)


def write_stamp(path: Path, level: str, zig: Zig) -> str:
    """Note beside a binary what made it; its sha256."""
    digest = hash_file(path)
    stamp = {"zig": zig.version, "engine": ENGINE.version, "level": level, "sha256": digest}
    atomic_write(path.parent / _STAMP, json.dumps(stamp, sort_keys=True))
    return digest


class _Builder:
    """The build of one level."""

    def __init__(self, root: Path, source: Path, level: Level, zig: Zig, jobs: int, progress: Progress) -> None:
        self._root, self._source, self._level, self._zig = root, source, level, zig
        self._jobs, self._progress = max(1, jobs), progress
        self._base = levels_of(level.target)[0]  # what is the same for all levels is compiled for the lowest
        self._objects = root / "objects"
        self._include = root / "include"

    def build(self, folder: Path) -> BuiltRunner:
        began = time.monotonic()
        with disk_errors(self._root):
            self._objects.mkdir(parents=True, exist_ok=True)
            for left in [*self._objects.glob("*.tmp.o"), *self._objects.glob("*.cpp")]:  # of a build that was killed
                left.unlink()
            self._write_versions()
            plan = [(unit, self._object(unit)) for unit in units(self._source, self._level.target)]
            missing = [(unit, path) for unit, path in plan if not path.is_file()]
            self._compile_all(missing)
            self._progress(f"{self._level.name}: linking")
            path = self._link([path for _, path in plan], folder)
        digest = write_stamp(path, self._level.name, self._zig)
        reused = len(plan) - len(missing)
        return BuiltRunner(
            self._level.target, self._level.name, path, digest, path.stat().st_size, len(missing), reused,
            time.monotonic() - began,
        )  # fmt: skip

    def _write_versions(self) -> None:
        """What CMake would configure."""
        for name, version in (("LLAMA", ENGINE.llama), ("GGML", ENGINE.ggml)):
            text = f'#pragma once\n#define {name}_VERSION "{version}"\n#define {name}_COMMIT "unknown"\n'
            path = self._include / f"{name.lower()}-version.h"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                atomic_write(path, text)

    def _flags(self, unit: Unit) -> list[str]:
        cpu = self._level.cpu if unit.tuned else self._base.cpu
        standard = "-std=gnu11" if unit.language == "c" else "-std=gnu++17"
        flags = ["-target", f"{self._level.target}-linux-musl", f"-mcpu={cpu}", standard, *COMMON_FLAGS, *unit.flags]
        if unit.own:
            facts = {"LEVEL": self._level.name, "ENGINE_VERSION": ENGINE.version, "RUNNER_VERSION": runner_id()[:16]}
            flags += [f'-D{name}="{value}"' for name, value in facts.items()]
        return flags

    def _object(self, unit: Unit) -> Path:
        """Where a unit's object lies, named by all that decides its bytes."""
        own = [[path.name, hash_file(path)] for path in own_sources() if path.suffix != ".c"] if unit.own else []
        key = hash_json([self._zig.version, ENGINE.sha256, self._flags(unit), list(unit.sources), own])
        return self._objects / f"{key[:32]}.o"

    def _compile_all(self, missing: Sequence[tuple[Unit, Path]]) -> None:
        pool = concurrent.futures.ThreadPoolExecutor(self._jobs)
        try:
            running = [pool.submit(self._compile, unit, path) for unit, path in missing]
            for done, future in enumerate(concurrent.futures.as_completed(running)):
                future.result()
                self._progress(f"{self._level.name}: compiled {done + 1} of {len(missing)}", (done + 1) / len(missing))
        finally:  # what is running ends; what has not begun does not begin
            pool.shutdown(cancel_futures=True)

    def _compile(self, unit: Unit, path: Path) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp.o")
        command = ["cc" if unit.language == "c" else "c++", "-c", *self._flags(unit), f"-I{self._include}", "-I."]
        with contextlib.ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            if unit.own:
                [source] = [str(own) for own in own_sources() if own.name == unit.sources[0]]
            elif len(unit.sources) == 1:
                source = unit.sources[0]
            else:  # several as one compilation, so that their headers are read once
                together = path.with_suffix(".cpp")
                stack.callback(together.unlink, missing_ok=True)
                together.write_text("".join(f'#include "{name}"\n' for name in unit.sources), encoding="utf-8")
                source = str(together)
            self._run([*command, source, "-o", str(temporary)], unit.sources[0])
            os.replace(temporary, path)

    def _link(self, objects: Sequence[Path], folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path, temporary = folder / RUNNER_NAME, folder / f".{RUNNER_NAME}.{os.getpid()}"
        target = ["-target", f"{self._level.target}-linux-musl", f"-mcpu={self._base.cpu}"]
        try:
            self._run(["c++", *target, "-static", "-s", "-O2", *map(str, objects), "-o", str(temporary)], "the runner")
            temporary.chmod(0o755)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _run(self, arguments: Sequence[str], what: str) -> None:
        self._zig.run(arguments, f"{what} for {self._level.name}", cwd=self._source, root=self._root)


def copy_runners(built: Sequence[BuiltRunner], out: Path) -> tuple[Path, ...]:
    """Copy binaries to ``out/NAME-TARGET-LEVEL``; the paths."""
    copies = []
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for one in built:
            path = out / f"{one.name}-{one.target}-{one.level}"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            shutil.copy2(one.path, temporary)
            os.replace(temporary, path)
            copies.append(path)
    return tuple(copies)
