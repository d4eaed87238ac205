"""``edgestill doctor``: which runtimes, tools and targets are here, and the line that installs what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .bench.environment import usable_threads

__all__ = ["DoctorReport", "Finding", "doctor"]


@dataclass(frozen=True)
class Finding:
    """One thing that edgestill can use: what for, whether it is there, and how to get it (``install``, a line)."""

    name: str
    kind: Literal["runtime", "tool", "target"]
    purpose: str
    available: bool
    version: str | None = None
    note: str = ""
    install: str | None = None


@dataclass(frozen=True)
class DoctorReport:
    """All findings. ``ready`` when the main job (distil, export, verify, measure) can run here."""

    findings: tuple[Finding, ...]
    ready: bool
    python: str
    platform: str
    threads: int
    schema_version: int = 1


# distribution, module, kind, what for, the extra that brings it, needed by the main job
_PACKAGES = (
    ("torch", "torch", "runtime", "teacher, student, reference numbers", "distill", True),
    ("transformers", "transformers", "tool", "models and tokenizers", "distill", True),
    ("accelerate", "accelerate", "tool", "the training loop", "distill", True),
    ("pyarrow", "pyarrow", "tool", "parquet files", "distill", False),
    ("onnxruntime", "onnxruntime", "runtime", "runs onnx:* artifacts", "runtimes", True),
    ("onnx", "onnx", "tool", "writes onnx:* artifacts", "export", True),
    ("onnxscript", "onnxscript", "tool", "exports encoders to ONNX", "export", True),
    ("optimum", "optimum", "tool", "infers tasks, normalises configs", "export", False),
    ("llama-cpp-python", "llama_cpp", "runtime", "runs and quantises gguf:* artifacts", "runtimes", True),
    ("gguf", "gguf", "tool", "reads and writes GGUF", "export", True),
    ("coremltools", "coremltools", "tool", "writes and reads coreml:* artifacts", "export", True),
    ("ziglang", "ziglang", "tool", "builds the native runner for phones and boards", "runner", False),
)


def _package(distribution: str, module: str) -> tuple[bool, str | None]:
    if importlib.util.find_spec(module) is None:
        return False, None
    try:
        return True, importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return True, None


def _loads(module: str) -> str:
    """Why ``module`` does not import although it is installed, or ``""``. Imports it in a process of its own."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
    )
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def _command(name: str, purpose: str, install: str) -> Finding:
    found = shutil.which(name)
    return Finding(name, "tool", purpose, found is not None, note=found or "", install=None if found else install)


def _core_ml() -> Finding:
    present, version = _package("coremltools", "coremltools")
    native = sys.platform == "darwin"
    note = "native, per compute unit" if native else "our interpreter of the saved program: numbers, no latency"
    line = None if present else "pip install 'edgestill[runtimes]'"
    return Finding("Core ML", "runtime", "runs coreml:* artifacts", present, version, note if present else "", line)


def doctor(*, deep: bool = False, loads: Callable[[str], str] = _loads) -> DoctorReport:
    """Look at this machine. ``deep`` also imports every runtime in a process of its own (seconds)."""
    findings = []
    ready = True
    for distribution, module, kind, purpose, extra, needed in _PACKAGES:
        present, version = _package(distribution, module)
        note = loads(module) if present and deep else ""
        line = None if present and not note else f"pip install 'edgestill[{extra}]'"
        ready &= not needed or line is None
        findings.append(Finding(distribution, kind, purpose, present and not note, version, note, line))  # type: ignore[arg-type]
    findings.append(_core_ml())
    findings += [
        _command("npm", "fetches npm: addresses", "install Node.js (Debian: apt install npm)"),
        _command("c++", "builds llama-cpp-python", "install a C++ compiler (Debian: apt install g++)"),
        _command("qemu-aarch64-static", "emulates Arm cores", "Debian: apt install qemu-user-static"),
        _command("qemu-aarch64", "counts their instructions", "Debian: apt install qemu-user"),
        _command("mmdebstrap", "builds what they run", "Debian: apt install mmdebstrap"),
        Finding("host", "target", "this machine", True, platform.machine(), f"{usable_threads()} threads"),
    ]
    return DoctorReport(
        tuple(findings), ready, platform.python_version(), platform.platform(terse=True), usable_threads()
    )
