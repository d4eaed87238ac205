"""The compiler of the native runner: zig, out of the Python package ``ziglang``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import EdgestillError, MissingDependency

__all__ = ["Zig", "find_zig"]

_ERROR_LINES = 3


@dataclass(frozen=True)
class Zig:
    """clang and lld with the headers and libraries of other machines: no NDK, no root."""

    path: Path
    version: str

    def run(self, arguments: Sequence[str], what: str, *, cwd: Path, root: Path) -> None:
        """Run it in ``cwd``, so that paths in messages and assertions are relative to that; what it keeps lies below
        ``root``. :class:`EdgestillError` says that it can't build ``what``."""
        cache = str(root / "zig")
        environment: Mapping[str, str] = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(
            [str(self.path), *arguments], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise EdgestillError(
                f"zig {self.version} can't build {what}: {_last_lines(done.stderr)}",
                hint=f"free some room below {root} if the disk is full; else please report it",
            )


def find_zig() -> Zig:
    """The installed compiler; :class:`MissingDependency` when there is none."""
    spec = importlib.util.find_spec("ziglang")
    path = Path(spec.origin).parent / "zig" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise MissingDependency.package("ziglang", "runner")
    done = subprocess.run([path, "version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingDependency(f"zig does not run: {_last_lines(done.stderr)}", hint="pip install -U ziglang")
    return Zig(path, done.stdout.strip())


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " | ".join((errors or lines)[:_ERROR_LINES]) or "it says nothing"
