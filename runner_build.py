"""``edgestill devices build-runner``: the native runner for phones and boards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bench.environment import usable_threads
from .runtimes.native.build import build_runner, copy_runners
from .runtimes.native.host_build import build_hosts
from .runtimes.native.source import ENGINE
from .runtimes.native.zig import find_zig
from .stages import Observer

__all__ = ["BuildRunnerRequest", "BuiltBinary", "RunnerResult", "build_runners"]


@dataclass(frozen=True)
class BuildRunnerRequest:
    """Build for ``target`` (``aarch64``, ``x86_64``) the ``level`` named, or ``all``; copies go to ``out``.

    ``jobs`` compilations run at once (``None``: one a core).
    """

    target: str = "aarch64"
    level: str = "all"
    out: Path | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class BuiltBinary:
    """One binary: which processor it is for, where it lies, and how much was to do (``seconds`` of wall time).

    ``level`` is that of the runner (``dotprod``), or the C library of the program that loads a user's ONNX Runtime for
    it (``glibc``, ``android``).
    """

    target: str
    level: str
    path: Path
    size_bytes: int
    sha256: str
    compiled: int
    reused: int
    seconds: float


@dataclass(frozen=True)
class RunnerResult:
    """What was built: llama.cpp's ``engine`` (the version of its bindings), with which ``compiler``.

    ``backend`` is always ``cpu``: no GPU and no NPU of a phone is used.
    """

    engine: str
    compiler: str
    binaries: tuple[BuiltBinary, ...]
    backend: str = "cpu"
    schema_version: int = 1


def build_runners(request: BuildRunnerRequest, observer: Observer | None = None) -> RunnerResult:
    """Build what is missing; what was built before with the same source and compiler is kept.

    Raises :class:`edgestill.errors.MissingDependency` without ziglang, and what
    :func:`edgestill.runtimes.native.build.build_runner` raises.
    """
    watcher = observer or Observer()
    watcher.started("build-runner", f"native runner for {request.target}")
    built = build_runner(
        request.target, request.level, jobs=request.jobs or usable_threads(), progress=watcher.advanced
    )
    built += build_hosts(request.target, progress=watcher.advanced)
    places = copy_runners(built, request.out) if request.out else tuple(one.path for one in built)
    watcher.finished("build-runner", sum(one.seconds for one in built), ", ".join(one.level for one in built))
    binaries = tuple(
        BuiltBinary(
            one.target, one.level, place, one.size_bytes, one.sha256, one.compiled, one.reused, round(one.seconds, 1)
        )
        for one, place in zip(built, places, strict=True)
    )
    return RunnerResult(f"llama-cpp-python {ENGINE.version} (llama.cpp {ENGINE.llama})", f"zig {find_zig().version}",
                        binaries)  # fmt: skip
