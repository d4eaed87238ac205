"""Install the llama-cpp-python of constraints.txt into the running environment, from a cached wheel or built once.

There is no wheel in the registry. The build takes only what the bindings need (no command-line tools, no multimodal
part, no TLS) and stays portable (no ``-march=native``), so that one cached wheel serves every machine of a kind. The
cache is keyed by version, platform, Python and flags; without it everything still works, only slower.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "llama_without_common.cmake"
FLAGS = {
    "LLAVA_BUILD": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "GGML_NATIVE": "OFF",
    # else the install step writes lib/ and include/ into site-packages
    "CMAKE_INSTALL_LIBDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_BINDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_INCLUDEDIR": "llama_cpp/include",
}


def locked_version() -> str:
    """The version in constraints.txt."""
    text = (HERE.parent / "constraints.txt").read_text()
    found = re.search(r"^llama[-_]cpp[-_]python==(\S+)", text, re.MULTILINE)
    if not found:
        sys.exit("constraints.txt does not pin llama-cpp-python")
    return found[1]


def cache_folder(version: str) -> Path:
    """Where the built wheel of this version, platform and flags lies."""
    root = os.environ.get("EDGESTILL_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgestill"
    facts = [sorted(FLAGS.items()), INCLUDE.read_text(), platform.platform(terse=True), sys.version_info[:2]]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return base / "wheels" / f"llama-cpp-python-{version}-{platform.machine()}-{key}"


def build(version: str, folder: Path) -> Path:
    """Build the wheel, showing how far the compiler is, and move it into ``folder`` when it is whole."""
    flags = [f"-D{name}={value}" for name, value in FLAGS.items()]
    arguments = " ".join([*flags, f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={INCLUDE}"])
    jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
    environment = {**os.environ, "CMAKE_ARGS": arguments, "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "-w", scratch]
        with subprocess.Popen(
            [*command, f"llama-cpp-python=={version}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace",
        ) as process:  # fmt: skip
            tail = show_progress(process)
        wheels = list(Path(scratch).glob("*.whl"))
        if process.returncode or not wheels:
            sys.stderr.write("".join(tail))
            sys.exit(f"building llama-cpp-python {version} failed; it needs a C++ compiler (Debian: apt install g++)")
        target = folder / wheels[0].name
        wheels[0].replace(target)
    return target


def show_progress(process: subprocess.Popen[str]) -> list[str]:
    """Print each tenth of the compiler's own count; return the last lines for the case that it fails."""
    tail: list[str] = []
    shown = -1
    assert process.stdout is not None
    for line in process.stdout:
        tail = [*tail[-40:], line]
        step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
        if step and int(step[2]) > 20 and (tenth := 10 * int(step[1]) // int(step[2])) > shown:
            shown = tenth
            print(f"   compiled {step[1]} of {step[2]}", flush=True)
    return tail


def main() -> None:
    """Install it unless it is there."""
    version = locked_version()
    try:
        if importlib.metadata.version("llama-cpp-python") == version:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = cache_folder(version)
    wheel = next(iter(folder.glob("*.whl")), None) or build(version, folder)
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(HERE.parent / "constraints.txt"), str(wheel)]
    sys.exit(subprocess.run(pip, check=False).returncode)


if __name__ == "__main__":
    main()
