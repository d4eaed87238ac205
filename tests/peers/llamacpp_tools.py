"""llama.cpp's own ``llama-bench`` and ``llama-perplexity``, built on demand under the cache folder.

Their source comes from the source package of the bindings that we run, and they are linked to the engine that those
bindings load (``programs/llamacpp_tools``): engine, commit and compiler flags are the same by construction, so that
what differs between a tool and us is the tool. It needs a C++ compiler; cmake and ninja are taken from PyPI.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgestill.bench.environment import usable_threads
from edgestill.errors import MissingDependency
from edgestill.files import atomic_write, hash_file, hash_json, hash_tree
from edgestill.progress import Progress, silent
from edgestill.runtimes.llamacpp_api import engine, engine_version

from .environments import Environment, Prepared, prepare
from .processes import PROGRAMS
from .registry import Unavailable

__all__ = ["LLAMA_CPP_TOOLS", "LlamaTools", "llama_tools"]

_PARTS = ("common", "include", "ggml/include", "src", "vendor", "tools/llama-bench", "tools/perplexity")
_SOURCE = "vendor/llama.cpp"
_TARGETS = ("llama-bench", "perplexity")


def _bindings() -> str:
    """The bindings that are installed: the tools must be of the same engine. Without them there is nothing to build."""
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return "0"


LLAMA_CPP_TOOLS = Environment(
    "llama-cpp-tools", ("cmake==4.4.5", "ninja==1.13.2"), f"llama-cpp-python=={_bindings()}",
    tuple(f"{_SOURCE}/{part}" for part in _PARTS),
)  # fmt: skip


@dataclass(frozen=True)
class LlamaTools:
    """The two programs, and the engine that they are linked to (:func:`edgestill.runtimes.llamacpp_api`'s words)."""

    bench: Path
    perplexity: Path
    engine: str


def llama_tools(progress: Progress = silent) -> LlamaTools:
    """The tools, built if need be (some minutes); :class:`Unavailable` with the compiler's last word otherwise."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Unavailable("llama-cpp-python is not installed: pip install 'edgestill[runtimes]'")
    library = Path(spec.origin).parent / "lib"
    try:
        version = engine_version()
    except MissingDependency as error:
        raise Unavailable(str(error)) from error
    prepared = prepare(LLAMA_CPP_TOOLS, progress)
    build = prepared.source.parent / "build"
    tools = LlamaTools(build / "bin" / "llama-bench", build / "bin" / "perplexity", version)
    recipe = PROGRAMS / "llamacpp_tools"
    engines = sorted(path for path in library.glob("*") if path.is_file())
    wanted = hash_json([hash_tree(recipe), str(library), version, [hash_file(path) for path in engines]])
    with build.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = build / "stamp.txt"
        if not (stamp.is_file() and stamp.read_text() == wanted):
            own = prepared.source / "recipe"  # so that checkouts share what was compiled
            shutil.copytree(recipe, own, dirs_exist_ok=True)
            if build.exists():  # of an earlier recipe or engine: ninja knows what is still good
                try:
                    _build(prepared, own, build, library, progress)
                except Unavailable:
                    shutil.rmtree(build)
            if not build.exists():
                _build(prepared, own, build, library, progress)
            atomic_write(stamp, wanted)
    return tools


def _build(prepared: Prepared, recipe: Path, build: Path, library: Path, progress: Progress) -> None:
    binaries = prepared.python.parent
    ninja = str(binaries / "ninja")
    progress("configuring llama.cpp's tools")
    _run([
        str(binaries / "cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(recipe), "-B", str(build),
        "-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_SOURCE={prepared.source / _SOURCE}", f"-DENGINE={library}",
        f"-DENGINE_VERSION={engine().llama_version().decode()}",
    ])  # fmt: skip
    progress("building llama.cpp's tools (minutes)")
    _run([ninja, "-C", str(build), "-j", str(usable_threads()), *_TARGETS])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise Unavailable(f"can't run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        last = (errors or lines or ["no word"])[0]
        raise Unavailable(f"llama.cpp's tools can't be built ({last[:300]}); it needs a C++ compiler: apt install g++")
