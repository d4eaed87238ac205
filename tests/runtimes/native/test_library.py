"""A library that a user gives: told apart by its header before anything is sent."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgestill.errors import BadInput
from edgestill.runtimes.native import machine_name, read_library

X86, ARM32 = 62, 40  # ELF's numbers of processors


@pytest.mark.parametrize(
    ("made", "machine", "libc"),
    [
        ({}, "aarch64", "android"),
        ({"needed": ["libm.so.6", "libc.so.6", "ld-linux-aarch64.so.1"]}, "aarch64", "glibc"),
        ({"machine": X86, "needed": ["libc.so.6"]}, "x86_64", "glibc"),
    ],
)
def test_what_a_library_is_for(
    make_elf: Callable[..., bytes], made: dict[str, Any], machine: str, libc: str, tmp_path: Path
) -> None:
    path = tmp_path / "lib of 'mine'.so"
    path.write_bytes(make_elf(**made))
    library = read_library(path)
    assert (library.machine, library.libc) == (machine, libc)
    library.check("phone X", machine, libc)
    other = "aarch64" if machine == "x86_64" else "x86_64"
    with pytest.raises(BadInput, match=f"is for {machine}, phone X is {other}") as caught:
        library.check("phone X", other, libc)
    assert "jni/arm64-v8a" in caught.value.hint


def test_a_library_of_the_other_system(make_elf: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "libonnxruntime.so"
    path.write_bytes(make_elf(needed=["libc.so.6"]))
    with pytest.raises(BadInput, match="is for Linux with glibc, phone X is Android"):
        read_library(path).check("phone X", "aarch64", "android")
    path.write_bytes(make_elf())
    with pytest.raises(BadInput, match="is for Android, board B is neither Android nor Linux with glibc"):
        read_library(path).check("board B", "aarch64", "")


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (b"", "is no shared library, or it is cut short"),
        (b"\x7fEL", "is no shared library"),
        (b"PK\3\4" + bytes(100), r"is no shared library \(ELF\)"),
        ({"machine": ARM32, "bits": 1}, "is no 64-bit shared library .*32-bit ARM"),
        ({"kind": 2}, "is no 64-bit shared library"),
        ({"symbol": "zlibVersion"}, "no OrtGetApiBase"),
        ({"needed": ["libc.musl-aarch64.so.1"]}, "neither glibc nor Android's C library: libc.musl-aarch64.so.1"),
    ],
)
def test_what_is_no_such_library(
    make_elf: Callable[..., bytes], made: bytes | dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "libonnxruntime.so"
    path.write_bytes(made if isinstance(made, bytes) else make_elf(**made))
    with pytest.raises(BadInput, match=text):
        read_library(path)


def test_a_library_that_was_cut_is_one_clear_line(make_elf: Callable[..., bytes], tmp_path: Path) -> None:
    whole = make_elf()
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
