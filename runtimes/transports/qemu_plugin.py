"""Instruction counts of an emulated program: builds ``qemu_counts.c`` on demand, and reads what it writes."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import EdgestillError, MissingDependency, Unsupported, WorkerError
from ...fetch import cache_folder
from ...files import disk_errors, hash_json

__all__ = ["CLASSES", "Counts", "build_plugin", "plugin_options", "read_counts"]

CLASSES = ("dot", "mmla", "fmla", "load", "store", "other")
"""The classes of ``qemu_counts.c``, in its order: int8 dot products (SDOT, UDOT, USDOT, SUDOT), matrix products (SMMLA,
UMMLA, USMMLA, BFMMLA), floating-point multiply-adds, loads, stores, and the rest."""

Counts = dict[str, int]

_SOURCE = Path(__file__).with_name("qemu_counts.c")
_MAGIC = 0x31544E434C495453
_HEADER = 3


def build_plugin(emulator: Path, cache: Path | None = None) -> Path:
    """The plugin as a shared object for this ``emulator``, from the cache folder when it was built before.

    Raises :class:`MissingDependency` without a C compiler, :class:`EdgestillError` when it can't be built.
    """
    source = _SOURCE.read_text(encoding="utf-8")
    api = _interface(emulator)
    target = (cache or cache_folder()) / "plugins" / f"counts-{hash_json([source, api])[:16]}.so"
    if target.is_file():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingDependency("no C compiler, needed to count instructions", hint="apt-get install gcc")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        try:
            done = subprocess.run(
                [compiler, "-shared", "-fPIC", "-O2", "-fvisibility=hidden", f"-DAPI={api}", "-o", temporary,
                 str(_SOURCE)],
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
            if done.returncode != 0:
                line = next((row for row in done.stderr.splitlines() if "error" in row), done.stderr.strip()[:200])
                raise EdgestillError(f"{_SOURCE.name} can't be compiled: {line}", hint="apt-get install gcc libc6-dev")
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return target


def _interface(emulator: Path) -> int:
    """The version of the plugin interface: the data of an instruction is a pointer until 2, a copy from 3 on."""
    if "-plugin" not in subprocess.run([str(emulator), "-h"], capture_output=True, text=True, check=False).stdout:
        raise MissingDependency(
            f"{emulator} takes no plugins, so no instruction can be counted",
            hint="apt-get install qemu-user (where that is a static program, a build of QEMU with --enable-plugins)",
        )
    told = subprocess.run([str(emulator), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", told)
    if found is None:
        raise Unsupported(f"{emulator.name} does not say its version", hint="QEMU 6 or newer is needed")
    version = (int(found[1]), int(found[2]))
    return 1 if version < (9, 0) else 2 if version < (9, 1) else 3


def plugin_options(plugin: Path, counts: Path) -> list[str]:
    """The emulator's options that load ``plugin`` and make it count into the file ``counts``."""
    quoted = [str(path).replace(",", ",,") for path in (plugin, counts)]
    return ["-plugin", f"{quoted[0]},counts={quoted[1]}"]


def read_counts(path: Path, cpus: Sequence[int] | None = None) -> Counts:
    """Instructions executed until now by class, of the virtual CPUs ``cpus`` (0: the program's first thread) or all.

    Raises :class:`WorkerError` when the plugin did not write the file.
    """
    data = path.read_bytes() if path.is_file() else b""
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    if len(words) < _HEADER or words[0] != _MAGIC or words[1] != len(CLASSES):
        raise WorkerError("the emulator did not load the counting plugin", hint="apt-get install qemu-user")
    classes, slots = words[1], words[2]
    chosen = range(slots) if cpus is None else cpus
    return {name: sum(words[_HEADER + slot * classes + index] for slot in chosen) for index, name in enumerate(CLASSES)}
