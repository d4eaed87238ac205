"""A library that a user gives: told apart by its header before anything is sent."""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgestill.errors import BadInput
from edgestill.runtimes.native import machine_name, read_library

X86, ARM, ARM32 = 62, 183, 40


def elf(
    machine: int = ARM, needed: Sequence[str] = ("liblog.so", "libc.so"), symbol: str = "OrtGetApiBase", *,
    bits: int = 2, kind: int = 3,
) -> bytes:  # fmt: skip
    """A shared library of just a header, a loaded segment at 0x1000 and a dynamic section."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*needed, symbol))
    place, entries = 1, []
    for name in needed:
        entries.append((1, place))
        place += len(name) + 1
    start = 64 + 2 * 56
    entries += [(5, 0x1000 + start + 16 * (len(needed) + 3)), (10, len(names)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = start + len(dynamic) + len(names)
    header = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x1000, 0x1000, size, size, 4096)
    segments += struct.pack("<IIQQQQQQ", 2, 6, start, 0x1000 + start, 0, len(dynamic), len(dynamic), 8)
    return header + segments + dynamic + names


@pytest.mark.parametrize(
    ("data", "machine", "libc"),
    [
        (elf(), "aarch64", "android"),
        (elf(needed=["libm.so.6", "libc.so.6", "ld-linux-aarch64.so.1"]), "aarch64", "glibc"),
        (elf(X86, ["libc.so.6"]), "x86_64", "glibc"),
    ],
)
def test_what_a_library_is_for(data: bytes, machine: str, libc: str, tmp_path: Path) -> None:
    path = tmp_path / "lib of 'mine'.so"
    path.write_bytes(data)
    library = read_library(path)
    assert (library.machine, library.libc) == (machine, libc)
    library.check("phone X", machine, libc)
    other = "aarch64" if machine == "x86_64" else "x86_64"
    with pytest.raises(BadInput, match=f"is for {machine}, phone X is {other}") as caught:
        library.check("phone X", other, libc)
    assert "jni/arm64-v8a" in caught.value.hint


def test_a_library_of_the_other_system(tmp_path: Path) -> None:
    path = tmp_path / "libonnxruntime.so"
    path.write_bytes(elf(needed=["libc.so.6"]))
    with pytest.raises(BadInput, match="is for Linux with glibc, phone X is Android"):
        read_library(path).check("phone X", "aarch64", "android")
    path.write_bytes(elf())
    with pytest.raises(BadInput, match="is for Android, board B is neither Android nor Linux with glibc"):
        read_library(path).check("board B", "aarch64", "")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is no shared library, or it is cut short"),
        (b"\x7fEL", "is no shared library"),
        (b"PK\3\4" + bytes(100), r"is no shared library \(ELF\)"),
        (elf(ARM32, bits=1), "is no 64-bit shared library .*32-bit ARM"),
        (elf(kind=2), "is no 64-bit shared library"),
        (elf(symbol="zlibVersion"), "no OrtGetApiBase"),
        (elf(needed=["libc.musl-aarch64.so.1"]), "neither glibc nor Android's C library: libc.musl-aarch64.so.1"),
    ],
)
def test_what_is_no_such_library(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "libonnxruntime.so"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=text):
        read_library(path)


def test_a_library_that_was_cut_is_one_clear_line(tmp_path: Path) -> None:
    whole = elf()
    path = tmp_path / "libonnxruntime.so"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInput):
            read_library(path)


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.so", tmp_path):
        with pytest.raises(BadInput, match="can't be read"):
            read_library(path)


def test_the_real_one(onnxruntime_library: Path) -> None:
    library = read_library(onnxruntime_library)
    assert (library.machine, library.libc) == (machine_name(platform.machine()), "glibc")
