"""A ``libonnxruntime.so`` that a user gives for a device: is it one, and is it for that device? Read, never loaded.

What its ELF header and dynamic section say (System V gABI, chapters 4 and 5) is enough: the processor, the libraries
that it needs (glibc's ``libc.so.6`` or Android's ``libc.so``), and the name ``OrtGetApiBase`` among its symbols.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import BadInput

__all__ = ["Libc", "OrtLibrary", "read_library"]

Libc = Literal["glibc", "android"]

_MACHINES = {3: "32-bit x86", 40: "32-bit ARM", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_SHARED, _PT_LOAD, _PT_DYNAMIC = 3, 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 0, 1, 5, 10
_LIBCS: dict[str, Libc] = {"libc.so.6": "glibc", "libc.so": "android"}
_NAMES = {"glibc": "Linux with glibc", "android": "Android", "": "neither Android nor Linux with glibc"}
_WHERE = (
    "for Linux: capi/libonnxruntime.so.* of the onnxruntime wheel for that processor; "
    "for Android: jni/arm64-v8a/libonnxruntime.so of the package onnxruntime-android"
)


@dataclass(frozen=True)
class OrtLibrary:
    """An ONNX Runtime library: the ``machine`` it is for (``aarch64``), and the C library that it needs."""

    path: Path
    machine: str
    libc: Libc

    def check(self, device: str, machine: str, libc: str) -> None:
        """:class:`BadInput` when a device (as messages call it) of this machine and C library can't load it."""
        if machine != self.machine:
            raise BadInput(f"{self.path} is for {self.machine}, {device} is {machine}", hint=_WHERE)
        if libc != self.libc:
            has = _NAMES.get(libc, libc)
            raise BadInput(f"{self.path} is for {_NAMES[self.libc]}, {device} is {has}", hint=_WHERE)


def read_library(path: Path) -> OrtLibrary:
    """What ``path`` is, or :class:`BadInput` when it is no ONNX Runtime for a 64-bit Linux or Android."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            machine, needed, names = _read(path, data)
    except (ValueError, LookupError, struct.error, StopIteration):  # empty, or an offset that leads out of the file
        raise BadInput(f"{path} is no shared library, or it is cut short", hint=_WHERE) from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}", hint=_WHERE) from None
    if b"\0OrtGetApiBase\0" not in names:
        raise BadInput(f"{path} is no ONNX Runtime: it has no OrtGetApiBase", hint=_WHERE)
    libc = next((_LIBCS[name] for name in needed if name in _LIBCS), None)
    if libc is None:
        raise BadInput(f"{path} needs neither glibc nor Android's C library: {', '.join(needed)}", hint=_WHERE)
    return OrtLibrary(path, machine, libc)


def _read(path: Path, data: mmap.mmap) -> tuple[str, list[str], bytes]:
    """Machine, needed libraries, and all names of the dynamic symbol table."""
    if data[:4] != b"\x7fELF":
        raise BadInput(f"{path} is no shared library (ELF)", hint=_WHERE)
    kind, number = struct.unpack_from("<HH", data, 16)
    machine = _MACHINES.get(number, f"processor {number}")
    if data[4] != 2 or data[5] != 1 or kind != _SHARED:
        raise BadInput(f"{path} is no 64-bit shared library (it is for {machine})", hint=_WHERE)
    (headers,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, headers + index * size) for index in range(count)]
    start, length = next((offset, size) for kind, _, offset, _, _, size in segments if kind == _PT_DYNAMIC)
    entries = []
    for place in range(start, start + min(length, len(data)), 16):
        tag, value = struct.unpack_from("<QQ", data, place)
        if tag == _DT_NULL:
            break
        entries.append((tag, value))
    table = dict(entries)
    address, width = table[_DT_STRTAB], table[_DT_STRSZ]
    begin = next(
        offset + address - at
        for kind, _, offset, at, _, size in segments
        if kind == _PT_LOAD and at <= address < at + size
    )
    if begin + width > len(data):
        raise ValueError("the names lie outside of the file")
    names = data[begin : begin + width]
    needed = [_text(names, value) for tag, value in entries if tag == _DT_NEEDED]
    return machine, needed, names


def _text(names: bytes, start: int) -> str:
    return names[start : names.index(b"\0", start)].decode(errors="replace")
