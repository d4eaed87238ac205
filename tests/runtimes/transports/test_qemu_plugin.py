"""The counting plugin against a program whose instructions are known: assembled by LLVM, not by us."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from edgestill.errors import MissingDependency, WorkerError
from edgestill.runtimes.transports.qemu_plugin import CLASSES, build_plugin, plugin_options, read_counts
from edgestill.runtimes.transports.qemu_root import find_emulator

needs_plugins = pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or shutil.which("gcc") is None, reason="apt-get install qemu-user gcc"
)

ROUNDS = 1000
# What LLVM's assembler makes of each line (`zig cc -target aarch64-linux-musl`, armv8.6-a), by class. x20 points to
# memory that may be written; x21 counts the rounds.
BEFORE = "d10803ff 910003f4 d2807d15"  # sub sp, sp, #512; mov x20, sp; mov x21, #1000
LOOP: dict[str, dict[str, str]] = {
    "dot": {
        "sdot v0.4s, v1.16b, v2.16b": "4e829420",
        "udot v0.2s, v1.8b, v2.8b": "2e829420",
        "sdot v0.4s, v1.16b, v2.4b[3]": "4fa2e820",
        "udot v3.4s, v1.16b, v18.4b[1]": "6fb2e023",
        "usdot v0.4s, v1.16b, v2.16b": "4e829c20",
        "usdot v0.4s, v1.16b, v2.4b[0]": "4f82f020",
        "sudot v0.4s, v1.16b, v2.4b[2]": "4f02f820",
    },
    "mmla": {
        "smmla v0.4s, v1.16b, v2.16b": "4e82a420",
        "ummla v0.4s, v1.16b, v2.16b": "6e82a420",
        "usmmla v0.4s, v1.16b, v2.16b": "4e82ac20",
        "bfmmla v0.4s, v1.8h, v2.8h": "6e42ec20",
    },
    "fmla": {
        "fmla v0.4s, v1.4s, v2.4s": "4e22cc20",
        "fmls v0.2d, v1.2d, v2.2d": "4ee2cc20",
        "fmla v0.4s, v1.4s, v2.s[3]": "4fa21820",
        "fmla v0.2d, v1.2d, v2.d[1]": "4fc21820",
        "fmla v0.8h, v1.8h, v2.8h": "4e420c20",
        "fmls v0.4h, v1.4h, v2.4h": "0ec20c20",
        "fmla v0.8h, v1.8h, v2.h[5]": "4f121820",
        "fmls s0, s1, v2.s[1]": "5fa25020",
        "fmla d0, d1, v2.d[1]": "5fc21820",
        "fmlal v0.4s, v1.4h, v2.h[3]": "4fb20020",
        "fmlsl2 v0.4s, v1.4h, v2.h[3]": "6fb2c020",
        "fmadd s0, s1, s2, s3": "1f020c20",
        "fnmsub d0, d1, d2, d3": "1f628c20",
        "fmlal v0.4s, v1.4h, v2.4h": "4e22ec20",
        "fmlal2 v0.4s, v1.4h, v2.4h": "6e22cc20",
        "fmlsl v0.4s, v1.4h, v2.4h": "4ea2ec20",
    },
    "load": {
        "ldr x0, [x20]": "f9400280",
        "ldrb w0, [x20, #1]": "39400680",
        "ldrsw x0, [x20, #4]": "b9800680",
        "ldr q0, [x20]": "3dc00280",
        "ldr d1, [x20, x0, lsl #0]": "fc606a81",
        "ldp x0, x1, [x20]": "a9400680",
        "ldp q0, q1, [x20]": "ad400680",
        "ldp s4, s5, [x20]": "2d401684",
        "ldnp q0, q1, [x20]": "ac400680",
        "ld1 {v0.16b-v3.16b}, [x20]": "4c402280",
        "ld1r {v0.4s}, [x20]": "4d40ca80",
        "ld1 {v0.s}[1], [x20]": "0d409280",
        "ld4 {v0.8h-v3.8h}, [x20]": "4c400680",
        "ldr x0, lit": "58000580",
        "ldr q0, lit": "9c000560",
        "ldur x0, [x20, #3]": "f8403280",
        "ldxr x0, [x20]": "c85f7e80",
        "ldar x0, [x20]": "c8dffe80",
        "ldapr x0, [x20]": "f8bfc280",
        "ldadd x1, x0, [x20]": "f8210280",
    },
    "store": {
        "str x0, [x20]": "f9000280",
        "strb w0, [x20, #1]": "39000680",
        "strh w0, [x20], #0": "78000680",
        "str q0, [x20]": "3d800280",
        "str s0, [x20, #4]": "bd000680",
        "stp x0, x1, [x20, #16]": "a9010680",
        "stp q0, q1, [x20]": "ad000680",
        "st1 {v0.16b-v1.16b}, [x20]": "4c00a280",
        "st1 {v0.b}[3], [x20]": "0d000e80",
        "st2 {v0.4s, v1.4s}, [x20]": "4c008a80",
        "stur d0, [x20, #1]": "fc001280",
        "stlr x0, [x20]": "c89ffe80",
        "stxr w9, x0, [x20]": "c8097e80",
    },
    "other": {
        "fcmla v0.4s, v1.4s, v2.s[1], #90": "6f823820",
        "prfm pldl1keep, [x20]": "f9800280",
        "add x0, x0, #1": "91000400",
        "mul v0.4s, v1.4s, v2.4s": "4ea29c20",
        "mla v0.4s, v1.4s, v2.4s": "4ea29420",
        "smlal v0.4s, v1.4h, v2.4h": "0e628020",
        "smlal v0.4s, v1.4h, v2.h[2]": "0f622020",
        "sqdmlal v0.4s, v1.4h, v2.4h": "0e629020",
        "fmul v0.4s, v1.4s, v2.4s": "6e22dc20",
        "fmul v0.4s, v1.4s, v2.s[1]": "4fa29020",
        "fadd v0.4s, v1.4s, v2.4s": "4e22d420",
        "fmulx v0.4s, v1.4s, v2.4s": "4e22dc20",
        "fcmla v0.4s, v1.4s, v2.4s, #90": "6e82cc20",
        "bfdot v0.4s, v1.8h, v2.8h": "6e42fc20",
        "mla v0.4s, v1.4s, v2.s[1]": "6fa20020",
        "mls v0.4s, v1.4s, v2.s[1]": "6fa24020",
        "nop": "d503201f",
        "subs x21, x21, #1": "f10006b5",
    },
}
BRANCH = 0x54000001  # b.ne, its distance being filled in
AFTER = "d2800000 d2800ba8 d4000001"  # exit(0)


def program(path: Path, lines: dict[str, dict[str, str]] = LOOP) -> Path:
    """A static ELF that runs ``lines`` ROUNDS times."""
    body = [int(word, 16) for group in lines.values() for word in group.values()]
    literal = struct.pack("<2Q", 1, 2)
    words = [int(word, 16) for word in BEFORE.split()]
    start = len(words)
    words += body
    words.append(BRANCH | ((start - len(words)) & 0x7FFFF) << 5)
    words += [int(word, 16) for word in AFTER.split()]
    while len(words) % 4:
        words.append(0xD503201F)
    for index, word in enumerate(words):  # literal loads reach for what lies behind the code
        if word & 0x3B000000 == 0x18000000 and start <= index < start + len(body) and word >> 30 != 3:
            words[index] = word & ~(0x7FFFF << 5) | (len(words) - index) << 5
    code = struct.pack(f"<{len(words)}I", *words) + literal
    base, header = 0x400000, 64 + 56
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 183, 1, base + header, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, header + len(code), header + len(code), 0x1000)
    path.write_bytes(elf + segment + code)
    path.chmod(0o755)
    return path


def run(elf: Path, counts: Path, cpu: str = "max") -> subprocess.CompletedProcess[bytes]:
    emulator = find_emulator("aarch64", plugins=True)
    plugin = build_plugin(emulator, counts.parent / "a, cache")
    command = [str(emulator), "-cpu", cpu, *plugin_options(plugin, counts), str(elf)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


@needs_plugins
def test_every_class_is_counted_exactly(tmp_path: Path) -> None:
    counts = tmp_path / "counts, with a comma"
    done = run(program(tmp_path / "known"), counts)
    assert done.returncode == 0, done.stderr
    expected = {name: ROUNDS * len(LOOP[name]) for name in CLASSES}
    expected["other"] += ROUNDS + len(BEFORE.split()) + len(AFTER.split())  # the branch, and what stands around
    assert read_counts(counts) == expected
    assert read_counts(counts, cpus=[0]) == expected
    assert sum(read_counts(counts, cpus=[1, 2]).values()) == 0


@needs_plugins
def test_an_instruction_that_the_core_lacks_ends_the_program(tmp_path: Path) -> None:
    done = run(program(tmp_path / "known"), tmp_path / "counts", cpu="cortex-a53")
    assert done.returncode == -4
    assert b"Illegal instruction" in done.stderr


def test_counts_that_nobody_wrote(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 4096):
        (tmp_path / "counts").write_bytes(content)
        with pytest.raises(WorkerError, match="did not load the counting plugin"):
            read_counts(tmp_path / "counts")
    with pytest.raises(WorkerError):
        read_counts(tmp_path / "absent")


@needs_plugins
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = find_emulator("aarch64", plugins=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as caught:
        build_plugin(emulator, tmp_path)
    assert caught.value.hint == "apt-get install gcc"
    with pytest.raises(MissingDependency) as caught:
        find_emulator("aarch64", plugins=True)
    assert caught.value.hint == "apt-get install qemu-user"
    assert not (tmp_path / "plugins").exists()


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="apt-get install qemu-user-static")
def test_an_emulator_without_plugins(tmp_path: Path) -> None:
    """Debian's static one."""
    with pytest.raises(MissingDependency, match="takes no plugins"):
        build_plugin(Path(str(shutil.which("qemu-aarch64-static"))), tmp_path)
