"""Where what was built for a device lies, and which file it gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MissingDependency
from ...fetch import cache_folder
from .levels import LEVELS, level_for, machine_name
from .library import Libc
from .source import runner_id

__all__ = ["HOST_NAME", "RUNNER_NAME", "find_host", "find_runner", "host_folder", "runner_folder"]

RUNNER_NAME = "edgestill-runner"
HOST_NAME = "edgestill-onnxruntime"


def runner_folder(level: str, *, cache: Path | None = None) -> Path:
    """The folder of a level's binary, whether it was built or not.

    It is named by what the binary is made from (engine, our source, flags): another version never finds an old one.
    """
    return _folder(LEVELS[level].target, cache) / level


def host_folder(machine: str, libc: Libc, *, cache: Path | None = None) -> Path:
    """The folder of the program that loads a user's ONNX Runtime, whether it was built or not."""
    return _folder(machine, cache) / libc


def find_runner(target: str, facts: Mapping[str, Any] | None = None, *, cache: Path | None = None) -> Path:
    """The runner for a device, as a file on this machine (static: push it alone, and make it executable there).

    ``target`` is ``uname -m`` of the device (``aarch64``, ``arm64``, ``x86_64``). ``facts`` describes it (``cpu_flags``
    as in ``/proc/cpuinfo``); without, the lowest level is taken, which runs on every 64-bit ARM core and can be asked
    for the ``facts`` of its machine. Raises :class:`MissingDependency` when that level was not built, and
    :class:`UsageError` when the runner can't run there at all.
    """
    machine = machine_name(target)
    level = level_for({"cpu_flags": (), **(facts or {}), "machine": machine})
    return _built(runner_folder(level, cache=cache) / RUNNER_NAME, f"native runner was built for {machine} ({level})")


def find_host(target: str, libc: Libc, *, cache: Path | None = None) -> Path:
    """The program that loads a user's ``libonnxruntime.so`` on a device with this C library, as a file here.

    Raises :class:`MissingDependency` when it was not built.
    """
    machine = machine_name(target)
    path = host_folder(machine, libc, cache=cache) / HOST_NAME
    return _built(path, f"program for ONNX Runtime was built for {machine} ({libc})")


def _folder(machine: str, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "runner" / runner_id()[:16] / machine


def _built(path: Path, what: str) -> Path:
    if not path.is_file():
        machine = path.parent.parent.name
        raise MissingDependency(f"no {what}", hint=f"edgestill devices build-runner --target {machine}")
    return path
