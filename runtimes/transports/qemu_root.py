"""The aarch64 root file system that emulated workers run in: Debian's Python with the wheels of numpy and ONNX Runtime.

It lies in the cache folder, keyed by what it was made from, and is built once by ``edgestill devices build-root``:
Debian packages by ``mmdebstrap`` (from the machine's own apt sources where they have the release, else from its
default), wheels by ``pip download`` in the versions that this machine has, so that both sides run the same code. No
maintainer script runs and nothing needs root. A step that is done is kept when a later one fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...archives import extract_zip
from ...errors import EdgestillError, MissingDependency, ResourceExhausted
from ...fetch import cache_folder, cache_lock
from ...files import atomic_write, disk_errors, hash_json
from ...progress import Progress, silent
from ...registries import download_pypi
from .qemu_cores import CORES, Core

__all__ = ["ROOT_BYTES", "Root", "build_root", "find_emulator", "find_root"]

ROOT_BYTES = 450 << 20  # what building takes, with the archives that are removed at its end
_RECIPE = 1
_SUITE, _PYTHON = "bookworm", "3.11"
_PACKAGES = (
    "python3.11-minimal", "libpython3.11-stdlib", "python3-minimal", "libstdc++6", "libgomp1", "busybox",
)  # fmt: skip
_WHEELS = ("numpy", "onnxruntime")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_STAMP = "root.json"
_COMMAND = "edgestill devices build-root"
_FULL = re.compile(r"No space left|write error.*space|Disk quota", re.IGNORECASE)


@dataclass(frozen=True)
class Root:
    """A built root file system: ``path``, and the ``versions`` in it (``python``, ``numpy``, ``onnxruntime``)."""

    path: Path
    versions: Mapping[str, str]

    def prefix(self, core: Core) -> Path:
        """What ``qemu -L`` takes: the files, with ``/proc/cpuinfo`` and ``/sys`` of this core."""
        return self.path / "cores" / core.name

    def python(self, core: Core) -> Path:
        """The aarch64 interpreter."""
        return self.prefix(core) / f"usr/bin/python{_PYTHON}"


def find_emulator(machine: str, *, plugins: bool = False) -> Path:
    """The user-mode emulator of ``machine``: the static one, or (needed for ``plugins``) the dynamic one.

    :class:`MissingDependency` names the Debian package.
    """
    names = [f"qemu-{machine}"] if plugins else [f"qemu-{machine}-static", f"qemu-{machine}"]
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    package = "qemu-user" if plugins else "qemu-user-static"
    raise MissingDependency(f"{names[0]} is not installed", hint=f"apt-get install {package}")


def find_root(cache: Path | None = None) -> Root:
    """The root file system that fits the versions of this machine; :class:`MissingDependency` when it isn't built."""
    versions = _versions()
    folder = _folder(versions, cache)
    if not (folder / _STAMP).is_file():
        raise MissingDependency("no aarch64 root file system for these versions", hint=_COMMAND)
    return Root(folder, versions)


def build_root(cache: Path | None = None, *, progress: Progress = silent) -> Root:
    """Build it, or return the one that is there. Two at once: the second waits and finds it done.

    Raises :class:`MissingDependency` (a tool), :class:`ResourceExhausted` (the disk) and :class:`EdgestillError` (no
    network; the root does not run). Nothing half-built is ever found by :func:`find_root`.
    """
    versions = _versions()
    folder = _folder(versions, cache)
    emulator = find_emulator("aarch64")
    if shutil.which("mmdebstrap") is None:
        raise MissingDependency("mmdebstrap is not installed", hint="apt-get install mmdebstrap")
    lock = folder.parent / f"{folder.name}.lock"
    with cache_lock(lock, lambda: progress("waiting for another process that builds it")):
        if (folder / _STAMP).is_file():
            return Root(folder, versions)
        partial = folder.parent / f"{folder.name}.partial"
        with disk_errors(partial):
            partial.mkdir(exist_ok=True)
            free = shutil.disk_usage(partial).free
            if free < ROOT_BYTES and not (partial / "system").is_dir():
                raise ResourceExhausted(
                    f"{free >> 20} MiB are free below {folder.parent}, the root file system takes {ROOT_BYTES >> 20}",
                    hint="free some room, or set EDGESTILL_CACHE",
                )
            _system(partial, progress)
            _wheels(partial, versions, progress)
            _cores(partial)
            progress("trying it", 0.95)
            _try(Root(partial, versions), emulator)
            for left in ("system.tar", "wheels"):
                _remove(partial / left)
            atomic_write(partial / _STAMP, json.dumps({"versions": versions, "recipe": _RECIPE}))
            _remove(folder)  # without its stamp it is nothing
            os.replace(partial, folder)
    return Root(folder, versions)


def _versions() -> dict[str, str]:
    found = {"python": _PYTHON}
    for name in _WHEELS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise MissingDependency.package(name, "runtimes") from None
    return found


def _folder(versions: Mapping[str, str], cache: Path | None) -> Path:
    key = hash_json([_RECIPE, _SUITE, _PACKAGES, dict(versions), sorted(CORES)])[:16]
    return (cache or cache_folder()) / "roots" / f"aarch64-{key}"


def _system(partial: Path, progress: Progress) -> None:
    """``partial/system``: the Debian packages, unpacked."""
    done, archive, unpacked = partial / "system", partial / "system.tar", partial / "unpacked"
    if done.is_dir():
        return
    progress("Debian packages for aarch64", 0.05)
    _remove(archive)
    wanted = f"--include={','.join(_PACKAGES)}"
    options = ["--quiet", "--variant=extract", "--architectures=arm64", wanted]
    command = ["mmdebstrap", *options, _SUITE, str(archive), *_sources()]
    _run(command, "mmdebstrap", {"TMPDIR": str(partial)})
    progress("unpacking them", 0.5)
    _remove(unpacked)
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isdev() or member.name.startswith(("./var/cache", "./usr/share/doc", "./usr/share/locale")):
                continue
            packed.extract(member, unpacked, filter="tar", set_attrs=not member.isdir())
    os.replace(unpacked, done)


def _sources() -> list[str]:
    """The machine's own apt sources of the release, as sources.list lines (mmdebstrap finds the key that signs them);
    none: mmdebstrap takes its default."""
    listing = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    try:
        told = subprocess.run(listing, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):  # not a Debian
        return []
    lines = []
    for line in dict.fromkeys(told.splitlines()):
        address, release, component = line.rsplit(" ", 2)
        if release in (_SUITE, f"{_SUITE}-updates", f"{_SUITE}-security"):
            lines.append(f"deb {address} {release} {component}")
    return lines if any(f" {_SUITE} " in line for line in lines) else []


def _wheels(partial: Path, versions: Mapping[str, str], progress: Progress) -> None:
    """The wheels, in ``dist-packages`` of the system."""
    packages = partial / "system/usr/lib/python3/dist-packages"
    target = ["--python-version", _PYTHON, "--implementation", "cp"]
    for name in _PLATFORMS:
        target += ["--platform", name]
    for index, name in enumerate(_WHEELS):
        if (packages / f"{name}-{versions[name]}.dist-info").is_dir():
            continue
        progress(f"{name} {versions[name]} for aarch64", 0.6 + 0.15 * index)
        folder = partial / "wheels" / name
        _remove(folder)
        folder.mkdir(parents=True)
        unpacked = partial / "unpacked"
        _remove(unpacked)
        unpacked.mkdir()
        extract_zip(download_pypi(name, versions[name], folder, target=target), "", unpacked)
        packages.mkdir(parents=True, exist_ok=True)
        # what shows that it is there comes last
        for path in sorted(unpacked.iterdir(), key=lambda path: path.name.endswith(".dist-info")):
            _remove(packages / path.name)
            os.replace(path, packages / path.name)
        _remove(unpacked)


def _cores(partial: Path) -> None:
    """A folder for each core: links to the one system, and its own view of the processor."""
    _remove(partial / "cores")
    for core in CORES.values():
        if core.machine != "aarch64":
            continue
        prefix = partial / "cores" / core.name
        (prefix / "proc").mkdir(parents=True)
        (prefix / "proc/cpuinfo").write_text(core.cpuinfo())
        cpus = prefix / "sys/devices/system/cpu"
        cpus.mkdir(parents=True)
        for name in ("possible", "present", "online", "kernel_max"):
            (cpus / name).write_text("0\n")
        for name in ("bin", "lib", "usr", "etc"):
            if (partial / "system" / name).exists():
                (prefix / name).symlink_to(Path("../../system") / name)


def _try(root: Root, emulator: Path) -> None:
    """It must import what it is for, in the versions that it is named by, before anyone finds it."""
    core = CORES["cortex-a53"]
    code = "import numpy, onnxruntime; print(numpy.__version__, onnxruntime.__version__)"
    command = [str(emulator), "-L", str(root.prefix(core)), "-cpu", core.cpu, str(root.python(core)), "-I", "-c", code]
    told = _run(command, "the root file system", {"OMP_NUM_THREADS": "1"}).split()
    if told != [root.versions[name] for name in _WHEELS]:
        raise EdgestillError(f"the root file system has {told}", hint=f"rm -r {root.path}, then {_COMMAND}")


def _run(command: list[str], what: str, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = next((line for line in lines if line.startswith("E:")), (lines or [""])[-1])
    last = re.sub(r"\w+://\S+", "the mirror", last)[:200]
    if _FULL.search(done.stderr):
        raise ResourceExhausted(f"no space left while {what} ran", hint="free some room, then run it again")
    status = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    raise EdgestillError(
        f"{what} failed ({status}): {last}",
        hint=f"check network and apt sources, then {_COMMAND}",
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
