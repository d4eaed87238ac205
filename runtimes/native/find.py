"""Where a built runner lies, and which one a device gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MissingDependency
from ...fetch import cache_folder
from .levels import LEVELS, level_for, machine_name
from .source import runner_id

__all__ = ["RUNNER_NAME", "find_runner", "runner_folder"]

RUNNER_NAME = "edgestill-runner"


def runner_folder(level: str, *, cache: Path | None = None) -> Path:
    """The folder of a level's binary, whether it was built or not.

    It is named by what the binary is made from (engine, our source, flags): another version never finds an old one.
    """
    return (cache or cache_folder()) / "runner" / runner_id()[:16] / LEVELS[level].target / level


def find_runner(target: str, facts: Mapping[str, Any] | None = None, *, cache: Path | None = None) -> Path:
    """The runner for a device, as a file on this machine (static: push it alone, and make it executable there).

    ``target`` is ``uname -m`` of the device (``aarch64``, ``arm64``, ``x86_64``). ``facts`` describes it (``cpu_flags``
    as in ``/proc/cpuinfo``); without, the lowest level is taken, which runs on every 64-bit ARM core and can be asked
    for the ``facts`` of its machine. Raises :class:`MissingDependency` when that level was not built, and
    :class:`UsageError` when the runner can't run there at all.
    """
    machine = machine_name(target)
    level = level_for({"cpu_flags": (), **(facts or {}), "machine": machine})
    path = runner_folder(level, cache=cache) / RUNNER_NAME
    if not path.is_file():
        raise MissingDependency(
            f"no native runner was built for {machine} ({level})",
            hint=f"edgestill devices build-runner --target {machine}",
        )
    return path
