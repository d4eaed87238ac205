"""The runner of a device: the level that it can run, or the command that builds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.errors import MissingDependency, UsageError
from edgestill.runtimes.native import RUNNER_NAME, find_runner, runner_folder


def build(level: str, cache: Path) -> Path:
    path = runner_folder(level, cache=cache) / RUNNER_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    return path


def test_each_device_gets_its_level(tmp_path: Path) -> None:
    low, high = build("armv8.0", tmp_path), build("dotprod", tmp_path)
    assert find_runner("aarch64", {"cpu_flags": ["asimd"]}, cache=tmp_path) == low
    assert find_runner("arm64", {"cpu_flags": ["asimd", "asimdhp", "asimddp"]}, cache=tmp_path) == high
    assert find_runner("aarch64", cache=tmp_path) == low  # nothing known: what runs everywhere


def test_a_missing_level_is_not_replaced_by_a_slower_one(tmp_path: Path) -> None:
    build("armv8.0", tmp_path)
    with pytest.raises(MissingDependency, match=r"aarch64 \(dotprod\)") as caught:
        find_runner("aarch64", {"cpu_flags": ["asimdhp", "asimddp"]}, cache=tmp_path)
    assert caught.value.hint == "edgestill devices build-runner --target aarch64"


def test_a_machine_that_it_is_not_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not built for 'armv7l'"):
        find_runner("armv7l", {"cpu_flags": ["neon"]}, cache=tmp_path)
