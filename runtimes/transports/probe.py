"""What a device is and has, asked through its shell before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import BadInput, MissingDependency, WorkerError
from .shell import RemoteShell, quote

__all__ = ["Board", "probe"]

PYTHON_MINIMUM = (3, 11)
_MODULES = ("numpy", "onnxruntime", "llama_cpp")
# Told by the dynamic loader, whose place each C library fixes.
_LIBC = """libc=; for l in /lib/ld-linux-aarch64.so.1 /lib64/ld-linux-x86-64.so.2; do [ -e $l ] && libc=glibc; done
[ -e /system/bin/linker64 ] && libc=android; echo "libc=$libc\""""

# Without importing them: that takes seconds on a board, and a runtime's import may crash there.
_ASK = """
import sys
from importlib import metadata, util
print("python=%d.%d.%d" % sys.version_info[:3])
for name, package in (("numpy",) * 2, ("onnxruntime",) * 2, ("llama_cpp", "llama-cpp-python")):
    if util.find_spec(name):
        try:
            print(name + "=" + metadata.version(package))
        except Exception:
            print(name + "=unknown")
"""


@dataclass(frozen=True)
class Board:
    """A device: ``root`` is its folder for our files, ``python`` the version of its Python (``None``: it has none that
    we asked for), ``modules`` the versions of numpy and the runtimes that this Python finds, ``libc`` whose C library
    it has (``glibc``, ``android``; ``""``: neither)."""

    root: str
    system: str
    machine: str
    flags: tuple[str, ...] = ()
    python: str | None = None
    modules: dict[str, str] = field(default_factory=dict)
    libc: str = ""

    @property
    def has_worker(self) -> bool:
        """Whether the Python worker can start: a Python that is new enough, and numpy."""
        return self.why_no_worker() is None

    def why_no_worker(self, runtime: str | None = None) -> str | None:
        """What the Python worker (for ``runtime``, a module's name) lacks, as half a sentence; ``None``: nothing."""
        if self.python is None:
            return "no python3"
        if tuple(int(part) for part in self.python.split(".")[:2]) < PYTHON_MINIMUM:
            return f"python3 is {self.python}, 3.11 or newer is needed"
        missing = [name for name in ("numpy", runtime) if name and name not in self.modules]
        return f"python3 without {' and '.join(missing)}" if missing else None

    def facts(self) -> dict[str, Any]:
        """What decides which native runner it can run."""
        return {"system": self.system, "machine": self.machine, "cpu_flags": list(self.flags)}


def probe(shell: RemoteShell, folder: str, python: str | None) -> Board:
    """Make the store's ``folder`` on the device and ask what it is. ``python=None``: don't ask for one (a phone)."""
    script = [
        f"umask 077; mkdir -p {quote(folder)} || exit 7",
        f"( cd {quote(folder)} && : > .write && rm .write && printf 'root=%s\\n' \"$(pwd -P)\" ) || exit 7",
        'echo "system=$(uname -s)"; echo "machine=$(uname -m)"',
        _LIBC,
        # Only the first processor's: all are alike, but for big and little ones, which have the same features.
        "grep -i -m 1 -E '^(features|flags)' /proc/cpuinfo 2>/dev/null | sed 's/.*:/flags=/'",
        'command -v sha256sum > /dev/null || command -v shasum > /dev/null || echo "lacks=sha256sum"',
    ]
    if python is not None:
        script.append(f"cd / && {quote(python)} -c {quote(_ASK)} 2>/dev/null")
    ran = shell.run("\n".join(script) + "\ntrue", seconds=120)
    if ran.status == 7:
        raise shell.failed(f"making the folder {folder}", ran)
    if ran.status:
        raise shell.failed("looking at it", ran)
    told = dict(line.split("=", 1) for line in ran.text.splitlines() if "=" in line)
    if "lacks" in told:
        raise MissingDependency(f"{shell.name}: no {told['lacks']}", hint="install coreutils or BusyBox there")
    try:
        root, system, machine = (told[key].strip() for key in ("root", "system", "machine"))
    except KeyError:
        said = " ".join(ran.text.split())[:80]
        raise WorkerError(f"{shell.name} has no usable shell: it says {said!r}", hint="a POSIX sh is needed") from None
    if not root.startswith("/"):
        raise BadInput(f"{shell.name}: the folder {folder} is {root!r} there", hint="give an absolute path")
    modules = {name: told[name] for name in _MODULES if name in told}
    return Board(root, system, machine, tuple(told.get("flags", "").split()), told.get("python"), modules,
                 told.get("libc", "").strip())  # fmt: skip
