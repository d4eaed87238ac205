"""What a processor can run: the levels that the runner is built for, and how a device tells which is its.

An ARM core says what it has in two words of bits, ``AT_HWCAP`` and ``AT_HWCAP2`` of its auxiliary vector (Linux,
``Documentation/arch/arm64/elf_hwcaps.rst``), and by name in the ``Features`` line of ``/proc/cpuinfo``. A level demands
just the features that it was compiled with, so the choice never leads to an illegal instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, nearest

__all__ = ["LEVELS", "Level", "choose_level", "level_for", "levels_of", "machine_name", "read_auxv"]

_AT_NULL, _AT_HWCAP, _AT_HWCAP2 = 0, 16, 26
# Feature of /proc/cpuinfo -> (word, bit): asm/hwcap.h of arm64.
_BITS = {"asimdhp": (0, 10), "asimddp": (0, 20), "i8mm": (1, 13)}
_MACHINES = {"aarch64": "aarch64", "arm64": "aarch64", "x86_64": "x86_64", "amd64": "x86_64"}


@dataclass(frozen=True)
class Level:
    """One build of the runner: ``cpu`` is what the compiler may use (zig's ``-mcpu``), ``features`` what a processor
    must have in ``/proc/cpuinfo`` to run it, ``example`` a core of each kind."""

    name: str
    target: str
    cpu: str
    features: tuple[str, ...]
    example: str


LEVELS: Mapping[str, Level] = {
    level.name: level
    for level in (
        Level("armv8.0", "aarch64", "generic", (), "Cortex-A53, A72 (Raspberry Pi 4)"),
        Level("dotprod", "aarch64", "generic+dotprod+fullfp16", ("asimddp", "asimdhp"), "Cortex-A55, A76 (Pi 5)"),
        Level(
            "i8mm", "aarch64", "generic+dotprod+fullfp16+i8mm", ("asimddp", "asimdhp", "i8mm"), "Cortex-A710, X2"
        ),
        Level("avx2", "x86_64", "x86_64_v3", ("avx2", "fma", "f16c"), "Intel from Haswell, AMD from Zen"),
    )
}  # fmt: skip
"""All levels, of each target the lowest first."""


def levels_of(target: str) -> tuple[Level, ...]:
    """The levels of a target, the lowest first; :class:`UsageError` for a target that the runner isn't built for."""
    found = tuple(level for level in LEVELS.values() if level.target == target)
    if not found:
        known = sorted({level.target for level in LEVELS.values()})
        raise UsageError(f"the runner is not built for {target!r}", hint=nearest(target, known))
    return found


def machine_name(machine: str) -> str:
    """``uname -m`` as the target that it is: ``arm64`` (macOS, Android's name) is ``aarch64``.

    >>> machine_name("arm64"), machine_name("armv7l")
    ('aarch64', 'armv7l')
    """
    return _MACHINES.get(machine.lower(), machine)


def choose_level(hwcap: int, hwcap2: int) -> str:
    """The highest level that an ARM core with these two words can run.

    >>> choose_level(0x887, 0), choose_level(1 << 20 | 1 << 10, 1 << 13)
    ('armv8.0', 'i8mm')
    """
    words = (hwcap, hwcap2)
    present = [name for name, (word, bit) in _BITS.items() if words[word] >> bit & 1]
    return _highest("aarch64", present)


def level_for(facts: Mapping[str, Any]) -> str:
    """The highest level for a machine described by ``machine`` and ``cpu_flags`` (what a worker's ``facts`` and
    :func:`edgestill.bench.environment.describe_environment` give).

    Raises :class:`UsageError` for a machine that the runner isn't built for, or that can run none of its levels.

    >>> level_for({"machine": "aarch64", "cpu_flags": ["asimd", "asimdhp", "asimddp"]})
    'dotprod'
    """
    return _highest(machine_name(str(facts.get("machine", ""))), list(facts.get("cpu_flags") or ()))


def read_auxv(data: bytes) -> tuple[int, int]:
    """``(hwcap, hwcap2)`` out of a 64-bit little-endian device's ``/proc/self/auxv``; a missing word is 0.

    Raises :class:`UsageError` when it is no such vector.
    """
    if not data or len(data) % 16:
        raise UsageError(f"{len(data)} bytes are no auxiliary vector", hint="send /proc/self/auxv as it is")
    words = {}
    for key, value in struct.iter_unpack("<QQ", data):
        if key == _AT_NULL:
            break
        words[key] = value
    return words.get(_AT_HWCAP, 0), words.get(_AT_HWCAP2, 0)


def _highest(target: str, present: Sequence[str]) -> str:
    fitting = [level for level in levels_of(target) if set(level.features) <= set(present)]
    if not fitting:
        lowest = levels_of(target)[0]
        raise UsageError(
            f"this {target} processor has not all of {', '.join(lowest.features)}",
            hint="the runner needs them; install Python and llama-cpp-python there instead",
        )
    return fitting[-1].name
