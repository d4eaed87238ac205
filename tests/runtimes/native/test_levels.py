"""A device gets the highest level that its processor has the features for, and none that it has not."""

from __future__ import annotations

import itertools
import platform
import struct
import sys
from pathlib import Path

import pytest

from edgestill.errors import UsageError
from edgestill.runtimes.native.levels import LEVELS, choose_level, level_for, levels_of, machine_name, read_auxv

# /proc/cpuinfo of real cores (Raspberry Pi 4 and 5; a phone with Cortex-X2).
A72 = "fp asimd evtstrm crc32 cpuid".split()
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp".split()
X2 = [*A76, "sve", "sve2", "i8mm", "bf16"]
# The bits of asm/hwcap.h (arm64), as the kernel numbers them.
HWCAP = {"fp": 0, "asimd": 1, "evtstrm": 2, "aes": 3, "pmull": 4, "sha1": 5, "sha2": 6, "crc32": 7, "atomics": 8,
         "fphp": 9, "asimdhp": 10, "cpuid": 11, "asimdrdm": 12, "lrcpc": 15, "dcpop": 16, "asimddp": 20,
         "sve": 22}  # fmt: skip
HWCAP2 = {"sve2": 1, "i8mm": 13, "bf16": 14}


def words(features: list[str]) -> tuple[int, int]:
    return (
        sum(1 << HWCAP[name] for name in features if name in HWCAP),
        sum(1 << HWCAP2[name] for name in features if name in HWCAP2),
    )


@pytest.mark.parametrize(("features", "level"), [(A72, "armv8.0"), (A76, "dotprod"), (X2, "i8mm")])
def test_both_ways_of_asking_give_the_same_level(features: list[str], level: str) -> None:
    assert choose_level(*words(features)) == level
    assert level_for({"machine": "aarch64", "cpu_flags": features}) == level
    assert level_for({"machine": "arm64", "cpu_flags": features}) == level


@pytest.mark.parametrize("without", ["asimddp", "asimdhp"])
def test_a_core_that_lacks_one_feature_gets_a_lower_level(without: str) -> None:
    features = [name for name in X2 if name != without]
    assert choose_level(*words(features)) == "armv8.0"


def test_every_level_demands_what_it_is_compiled_with() -> None:
    """zig's names of the features beside the kernel's."""
    kernel = {"dotprod": "asimddp", "fullfp16": "asimdhp", "i8mm": "i8mm"}
    for level in levels_of("aarch64"):
        assert {kernel[name] for name in level.cpu.split("+")[1:]} == set(level.features)
    features = [set(level.features) for level in levels_of("aarch64")]
    assert features == sorted(features, key=len)  # the last that fits is the highest
    assert all(low < high for low, high in itertools.pairwise(features))


def test_an_x86_machine() -> None:
    assert level_for({"machine": "x86_64", "cpu_flags": ["avx2", "fma", "f16c"]}) == "avx2"
    with pytest.raises(UsageError, match="not all of avx2"):
        level_for({"machine": "x86_64", "cpu_flags": ["fma"]})


@pytest.mark.parametrize("machine", ["armv7l", "riscv64", ""])
def test_other_machines_are_refused(machine: str) -> None:
    with pytest.raises(UsageError, match="not built for"):
        level_for({"machine": machine, "cpu_flags": []})


def test_the_auxiliary_vector() -> None:
    hwcap, hwcap2 = words(X2)
    vector = struct.pack("<10Q", 6, 4096, 16, hwcap, 26, hwcap2, 0, 0, 16, 1)  # behind the end: not looked at
    assert read_auxv(vector) == (hwcap, hwcap2)
    assert read_auxv(struct.pack("<4Q", 16, 7, 0, 0)) == (7, 0)  # an old kernel without the second word
    for torn in (b"", vector[:-3]):
        with pytest.raises(UsageError, match="auxiliary vector"):
            read_auxv(torn)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
def test_the_auxiliary_vector_of_this_machine() -> None:
    """Against the C library, which hands the second word on as it is (the first one not on x86)."""
    import ctypes

    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    hwcap, hwcap2 = read_auxv(Path("/proc/self/auxv").read_bytes())
    assert hwcap2 == getauxval(ctypes.c_ulong(26))
    assert hwcap > 0
    assert machine_name(platform.machine()) in {level.target for level in LEVELS.values()}
