"""What the runner is made from: llama.cpp's source of one exact version, our own source, and the compiler's flags."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...fetch import fetch_source
from ...files import hash_file, hash_json
from ...progress import Progress, silent
from .levels import LEVELS

__all__ = [
    "COMMON_FLAGS",
    "ENGINE",
    "HOST_ANDROID",
    "HOST_FLAGS",
    "HOST_GLIBC",
    "Engine",
    "Unit",
    "engine_source",
    "own_sources",
    "runner_id",
    "units",
]


@dataclass(frozen=True)
class Engine:
    """The source package of llama-cpp-python that carries llama.cpp, as constraints.txt pins it."""

    version: str
    sha256: str
    llama: str
    ggml: str


ENGINE = Engine(
    "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e", llama="0.5.0-dev", ggml="0.25.3"
)

# As in the CMake files of that version (Release, static, CPU backend with weight repacking and llamafile's matrix
# products, threads of its own). Only the CPU backend's files are compiled for a level; the rest is the same in all.
COMMON_FLAGS = (
    "-O3", "-DNDEBUG", "-g0", "-fno-sanitize=all", "-w", "-D_GNU_SOURCE",
    "-D_XOPEN_SOURCE=600", "-DGGML_SCHED_MAX_COPIES=4", "-DGGML_USE_CPU", "-Iinclude", "-Isrc", "-Iggml/include",
    "-Iggml/src", "-Iggml/src/ggml-cpu", "-Ivendor", "-Ivendor/hash",
)  # fmt: skip
_CPU = ("-DGGML_USE_CPU_REPACK", "-DGGML_USE_LLAMAFILE")
_BASE = ("ggml.c", "ggml.cpp", "ggml-alloc.c", "ggml-backend.cpp", "ggml-backend-meta.cpp", "ggml-opt.cpp",
         "ggml-threading.cpp", "ggml-quants.c", "gguf.cpp", "ggml-backend-dl.cpp", "ggml-backend-reg.cpp")  # fmt: skip
_BACKEND = ("ggml-cpu.c", "ggml-cpu.cpp", "repack.cpp", "hbm.cpp", "quants.c", "traits.cpp", "amx/amx.cpp",
            "amx/mmq.cpp", "tiled/tiled.cpp", "tiled/tiled-kernel.cpp", "binary-ops.cpp", "unary-ops.cpp", "vec.cpp",
            "ops.cpp", "llamafile/sgemm.cpp")  # fmt: skip
_ARCHITECTURES = {"aarch64": "arm", "x86_64": "x86"}
_MODELS_TOGETHER = 16  # model files a compilation, as llama.cpp's own build does
# The program that loads a user's ONNX Runtime: how it is compiled, the oldest glibc that it asks for (of 2012; every
# ONNX Runtime asks for a newer one), and how it is linked for Android, which has pages of 16 KiB on some phones.
HOST_FLAGS = (
    "-std=gnu11", "-O2", "-g0", "-DNDEBUG", "-ffreestanding", "-fPIC", "-fvisibility=hidden", "-fno-stack-protector",
    "-fno-sanitize=all",
)  # fmt: skip
HOST_GLIBC = "2.17"
HOST_ANDROID = ("-pie", "--dynamic-linker=/system/bin/linker64", "-z", "max-page-size=16384", "--hash-style=both",
                "--no-undefined", "-s")  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One compilation: ``sources`` (relative to the engine's folder, several are compiled as one), its flags, and
    whether it may use the level's instructions."""

    sources: tuple[str, ...]
    flags: tuple[str, ...]
    tuned: bool = False
    own: bool = False

    @property
    def language(self) -> str:
        """``c`` or ``c++``."""
        return "c" if self.sources[0].endswith(".c") else "c++"


def own_sources() -> tuple[Path, ...]:
    """Our own C and C++ source files and headers: the runner's (C++) and the host's of ONNX Runtime (C)."""
    return tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".cpp", ".h")))


@cache
def runner_id() -> str:
    """sha256 over all that decides what the binaries do: the engine, our source, the flags."""
    own = [[path.name, hash_file(path)] for path in own_sources()]
    levels = [[level.name, level.cpu] for level in LEVELS.values()]
    host = [HOST_FLAGS, HOST_GLIBC, HOST_ANDROID]
    return hash_json([ENGINE.sha256, own, COMMON_FLAGS, _CPU, _BASE, _BACKEND, _MODELS_TOGETHER, levels, host])


def engine_source(*, cache: Path | None = None, progress: Progress = silent) -> Path:
    """llama.cpp's folder, fetched through the user's own pip when it is not in the cache yet.

    Raises what :func:`edgestill.fetch.fetch` raises.
    """
    return fetch_source(
        "llama-cpp-python", ENGINE.version, "vendor/llama.cpp", sha256=ENGINE.sha256, cache=cache, progress=progress
    )


def units(source: Path, target: str) -> tuple[Unit, ...]:
    """Everything to compile for ``target``, in the order in which it is linked."""
    core = sorted(path.name for path in (source / "src").glob("*.cpp"))
    models = sorted(path.name for path in (source / "src" / "models").glob("*.cpp"))
    bundles = [models[first : first + _MODELS_TOGETHER] for first in range(0, len(models), _MODELS_TOGETHER)]
    arch = f"ggml/src/ggml-cpu/arch/{_ARCHITECTURES[target]}"
    backend = [*(f"ggml/src/ggml-cpu/{name}" for name in _BACKEND), f"{arch}/quants.c", f"{arch}/repack.cpp"]
    return (
        *(Unit((path.name,), (), own=True) for path in own_sources() if path.suffix == ".cpp"),
        *(Unit((f"src/{name}",), ()) for name in core),
        *(Unit(tuple(f"src/models/{name}" for name in bundle), ()) for bundle in bundles),
        *(Unit((f"ggml/src/{name}",), ()) for name in _BASE),
        *(Unit((name,), _CPU, tuned=True) for name in backend),
        Unit(("vendor/hash/sha256/sha256.c",), ()),
    )
