"""``edgestill devices build-root``: what emulated cores need, built once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .runtimes.transports.qemu_cores import CORES
from .runtimes.transports.qemu_root import build_root
from .stages import Observer

__all__ = ["BuildRootRequest", "BuiltRoot", "build_emulation_root"]


@dataclass(frozen=True)
class BuildRootRequest:
    """Build the aarch64 root file system of ``qemu:…`` targets in ``cache`` (default: edgestill's cache folder)."""

    cache: Path | None = None


@dataclass(frozen=True)
class BuiltRoot:
    """Where it is, the ``versions`` in it, what it takes, and the targets that it serves."""

    path: str
    versions: Mapping[str, str]
    size_bytes: int
    targets: tuple[str, ...]
    schema_version: int = 1


def build_emulation_root(request: BuildRootRequest, observer: Observer) -> BuiltRoot:
    """Build it, or find it built. Errors: :func:`edgestill.runtimes.transports.qemu_root.build_root`."""
    observer.started("root", "aarch64 root file system")
    root = build_root(request.cache, progress=observer.advanced)
    size = sum(path.lstat().st_size for path in root.path.rglob("*") if path.is_file() and not path.is_symlink())
    observer.finished("root", 0.0, str(root.path))
    targets = tuple(f"qemu:{core.name}" for core in CORES.values() if core.machine == "aarch64")
    return BuiltRoot(str(root.path), root.versions, size, targets)
