"""Environments of peers: a venv each under the cache folder, made on demand from pinned packages.

A library that our own locked environment has anyway (onnxruntime, llama-cpp-python, torch) is run from there, in a
process of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from edgestill.archives import extract_tar
from edgestill.fetch import cache_folder
from edgestill.files import atomic_write, hash_file, hash_json
from edgestill.progress import Progress, silent

from .registry import Unavailable

__all__ = [
    "LLAMA_CPP_CONVERTER",
    "LM_EVAL",
    "ONNXRUNTIME_GENAI",
    "SENTENCE_TRANSFORMERS",
    "TRL",
    "Environment",
    "Prepared",
    "prepare",
]

_STAMP = "stamp.txt"


@dataclass(frozen=True)
class Environment:
    """``pins`` for pip; and a source package (``NAME==VERSION``) of which ``folders`` are unpacked beside them.

    ``beside``: it also sees the packages of the environment that runs this, and takes the versions of constraints.txt.
    """

    name: str
    pins: tuple[str, ...]
    source: str = ""
    folders: tuple[str, ...] = ()
    beside: bool = False


@dataclass(frozen=True)
class Prepared:
    """The environment's interpreter, and where the folders of its source package lie."""

    python: Path
    source: Path


# llama.cpp's own converter, from the source package of the very bindings that we use. Its requirements file pins
# transformers; torch is the version that we lock, so that its import costs both sides the same.
LLAMA_CPP_CONVERTER = Environment(
    "llama-cpp-converter",
    ("torch==2.13.0", "transformers==4.57.6", "numpy==2.2.6", "sentencepiece==0.2.1", "protobuf==4.25.8",
     "safetensors==0.8.0", "PyYAML==6.0.3", "tqdm==4.67.1", "requests==2.32.5"),
    "llama-cpp-python==0.3.36",
    ("vendor/llama.cpp/convert_hf_to_gguf.py", "vendor/llama.cpp/conversion", "vendor/llama.cpp/gguf-py"),
)  # fmt: skip

# The model builder is a part of the package; torch, transformers, onnx and onnxruntime are those that we lock.
ONNXRUNTIME_GENAI = Environment(
    "onnxruntime-genai",
    ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", "torch==2.13.0",
     "transformers==5.23.0", "tokenizers==0.23.3", "safetensors==0.8.0", "numpy==2.3.5", "accelerate==1.15.0"),
)  # fmt: skip

# torch, transformers and accelerate as we lock them, so that only the trainer on top differs.
_TRAINING = (
    "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "tokenizers==0.23.3", "safetensors==0.8.0",
    "numpy==2.3.5", "datasets==5.2.0",
)  # fmt: skip
TRL = Environment("trl", ("trl==1.16.0", *_TRAINING))
SENTENCE_TRANSFORMERS = Environment(
    "sentence-transformers", ("sentence-transformers==6.2.0", *_TRAINING, "scikit-learn==1.9.1", "scipy==1.17.1")
)


# lm-evaluation-harness, whose packages our own environment does without, beside it.
LM_EVAL = Environment("lm-eval", ("lm-eval==0.4.13",), beside=True)


def prepare(environment: Environment, progress: Progress = silent) -> Prepared:
    """The environment, made if need be; :class:`Unavailable` with pip's last word when it can't be."""
    folder = cache_folder() / "peers" / environment.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python", folder / "source")
    facts = {key: value for key, value in asdict(environment).items() if key != "beside"}
    constraints: list[str] = []
    if environment.beside:
        locked = Path(__file__).resolve().parents[2] / "constraints.txt"
        constraints = ["-c", str(locked)]
        facts["beside"] = [sysconfig.get_path("purelib"), hash_file(locked)]
    wanted = hash_json({**facts, "python": list(sys.version_info[:3])})
    with folder.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / _STAMP
        if stamp.is_file() and stamp.read_text() == wanted:
            return prepared
        if folder.exists():
            shutil.rmtree(folder)  # half made, or of other pins
        progress(f"making the environment {environment.name}")
        needs_pip = bool(environment.pins or environment.source)
        venv.create(folder / "venv", with_pip=needs_pip, system_site_packages=False)
        if environment.beside:
            [packages] = (folder / "venv").glob("lib/python*/site-packages")
            (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if environment.pins:
            _pip(environment.name, prepared.python, "install", *constraints, *environment.pins)
        if environment.source:
            name = environment.source.partition("==")[0]
            packages = folder / "packages"
            _pip(
                environment.name, prepared.python, "download", "--no-deps", "--no-binary", name, "-d", str(packages),
                environment.source,
            )  # fmt: skip
            prepared.source.mkdir()
            [package] = packages.glob("*.tar.gz")
            for inside in environment.folders:
                extract_tar(package, inside, prepared.source)
            shutil.rmtree(packages)
        atomic_write(stamp, wanted)
    return prepared


def _pip(name: str, python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        last = (errors or done.stderr.strip().splitlines() or ["no word"])[-1]
        raise Unavailable(f"pip can't make the environment {name}: {last[:300]}")
