"""Cores that can be emulated: what QEMU calls them, and what Linux on them says in ``/proc/cpuinfo``.

ONNX Runtime chooses its kernels by the flags that the emulator announces (``AT_HWCAP``) and, through the library
cpuinfo, by implementer and part in ``/proc/cpuinfo``; without that file it crashes while it is imported. Sources: Arm's
technical reference manuals (MIDR_EL1 of each core) and the Linux kernel's ``Documentation/arch/arm64/elf_hwcaps.rst``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError, nearest

__all__ = ["CORES", "Core", "find_core"]

_V8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_V84 = f"{_V82} jscvt fcma sha3 sm3 sm4 asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
_V86 = f"{_V84} dcpodp flagm2 frint i8mm bf16"
_ARM = 0x41


@dataclass(frozen=True)
class Core:
    """One core: ``name`` (as typed after ``qemu:``), ``cpu`` (QEMU's ``-cpu``), ``part`` and ``variant`` of MIDR_EL1,
    ``features`` as Linux prints them, and a phone or board that has it."""

    name: str
    machine: Literal["aarch64", "x86_64"]
    cpu: str
    features: str
    found_in: str
    part: int = 0
    variant: int = 0
    implementer: int = _ARM

    @property
    def flags(self) -> tuple[str, ...]:
        """The features, one by one."""
        return tuple(self.features.split())

    def cpuinfo(self) -> str:
        """``/proc/cpuinfo`` of a machine with one such core (of an Arm one)."""
        return (
            f"processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: {self.features}\n"
            f"CPU implementer\t: {self.implementer:#04x}\nCPU architecture: 8\nCPU variant\t: {self.variant:#x}\n"
            f"CPU part\t: {self.part:#05x}\nCPU revision\t: 0\n\n"
        )


def _arm(name: str, part: int, features: str, found_in: str, variant: int = 0) -> Core:
    return Core(name, "aarch64", name, features, found_in, part, variant)


# Which of them are there depends on QEMU: 7.2 has a35, a53, a57, a72, a76, neoverse-n1 and max.
CORES: dict[str, Core] = {
    core.name: core
    for core in (
        _arm("cortex-a35", 0xD04, _V8, "armv8.0, in order: small boards"),
        _arm("cortex-a53", 0xD03, _V8, "armv8.0, in order: Raspberry Pi 3, cheap phones; no dot product"),
        _arm("cortex-a55", 0xD05, _V82, "armv8.2, in order: the little cores of phones since 2018", 2),
        _arm("cortex-a57", 0xD07, _V8, "armv8.0: Jetson Nano", 1),
        _arm("cortex-a72", 0xD08, _V8, "armv8.0: Raspberry Pi 4; no dot product"),
        _arm("cortex-a76", 0xD0B, _V82, "armv8.2: Raspberry Pi 5, phones since 2018; int8 dot product", 3),
        _arm("cortex-a710", 0xD47, _V86, "armv9: phones since 2021; int8 matrix product", 2),
        _arm("neoverse-n1", 0xD0C, _V82, "armv8.2: servers; int8 dot product", 3),
        _arm("neoverse-v1", 0xD40, _V86, "armv8.4: servers; int8 matrix product", 1),
        Core("max", "aarch64", "max", _V86, "everything that this QEMU knows", 0x051, 0, 0),
        Core("x86-avx2", "x86_64", "Haswell-noTSX,-x2apic,-tsc-deadline,-invpcid,-vmx", "avx2 fma f16c",
             "x86 before VNNI: adds int8 products in 16 bits"),
    )
}  # fmt: skip


def find_core(name: str) -> Core:
    """The core called ``name``; :class:`UsageError` with the nearest one.

    >>> find_core("cortex-a76").part == 0xd0b
    True
    """
    if name not in CORES:
        what = f"qemu:{name}: no such core" if name else "qemu: which core?"
        raise UsageError(what, hint=nearest(name, list(CORES)))
    return CORES[name]
