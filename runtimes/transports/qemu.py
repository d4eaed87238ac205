"""An emulated core: a worker under QEMU's user-mode emulation; Python with real aarch64 wheels for ONNX, the native
runner for GGUF.

It computes what the core computes, instruction by instruction, and can be asked how many of them; how long they take
there it can't say, so every time is refused. ``qemu:x86-avx2`` is this machine's own Python on an x86 without VNNI.
``qemu:cortex-a53?level=dotprod`` takes a runner that was built for newer cores: does that build crash on the old one?
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt

from ... import __version__
from ...artifact import ARTIFACT_FILE, open_artifact
from ...errors import EdgestillError, MissingDependency, Unsupported, UsageError, nearest
from ..native.find import find_runner
from ..native.levels import LEVELS
from ..session import SessionInfo, SessionOptions
from .local import LocalWorker
from .options import parse_query
from .qemu_cores import Core, find_core
from .qemu_plugin import CLASSES, Counts, build_plugin, plugin_options, read_counts
from .qemu_root import find_emulator, find_root
from .zipapp import build_worker_zipapp

__all__ = ["CountingWorker", "QemuTarget", "QemuWorker"]

_SECONDS = 3600.0  # a request may take a thousand times what it takes on the core
_ALONE = dict.fromkeys(("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD"), "")


class QemuWorker(LocalWorker):
    """A worker on an emulated core: :class:`LocalWorker` without times. ``core`` is its name for messages.

    An instruction that the core does not have is :class:`Unsupported`: a result, not a crash.
    """

    def __init__(
        self, folder: Path, options: SessionOptions, *, command: Sequence[str], core: str, timeout: float = _SECONDS,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.core = core
        super().__init__(folder, options, timeout=timeout, command=command, env={**_ALONE, **(env or {})})

    def info(self) -> SessionInfo:
        """Who runs this; an emulated core has no ``latency``."""
        told = super().info()
        return replace(told, capabilities=tuple(name for name in told.capabilities if name != "latency"))

    def time_forward(self, *_: Any, **__: Any) -> NoReturn:
        """:class:`Unsupported`."""
        raise self._no_clock()

    def time_decode(self, *_: Any, **__: Any) -> NoReturn:
        """:class:`Unsupported`."""
        raise self._no_clock()

    def memory(self) -> NoReturn:
        """:class:`Unsupported`."""
        raise Unsupported(f"{self.core} is emulated: its memory holds the emulator's too", hint="measure on a board")

    def _no_clock(self) -> Unsupported:
        return Unsupported(
            f"{self.core} is emulated: a time taken here says nothing about it", hint="measure on a board: ssh://, adb:"
        )

    def _died(self, op: str) -> EdgestillError:
        error = super()._died(op)
        if "died of SIGILL" in error.message:
            return Unsupported(
                f"illegal instruction on {self.core}: {self.name} (or its runtime) needs instructions that this core "
                f"does not have (in {op})",
                hint="build or export it for an older core, or ship it only to newer ones",
            )
        return error


class CountingWorker(QemuWorker):
    """A worker whose instructions are counted. One thread, since only the first thread's are taken: what Python's
    other threads do while they wait is no part of an inference."""

    def __init__(self, folder: Path, options: SessionOptions, *, command: Sequence[str], core: str, file: Path) -> None:
        self._file = file
        try:
            super().__init__(folder, replace(options, threads=1), command=command, core=core)
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """End the worker and remove the file of its counts."""
        super().close()
        self._file.unlink(missing_ok=True)

    def count_forward(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], *, windows: int = 3, repeats: int = 4
    ) -> list[dict[str, float]]:
        """Instructions of one forward pass by class, once a window: (count of 1 + ``repeats`` passes minus count of
        1) / ``repeats``, so that what belongs to the request (hashing, JSON) drops out. A pass before warms up."""

        def count(passes: int) -> Counts:
            bounds = {"repeats": passes, "warmup": 0, "max_seconds": _SECONDS}
            return self._counted("time_forward", ids=self._put(ids), mask=self._put(mask), **bounds)

        return _per_unit(count, windows, repeats)

    def count_decode(self, prompt_ids: Sequence[int], *, windows: int = 2, repeats: int = 4) -> list[dict[str, float]]:
        """Instructions of one decoded token by class, once a window, the tokens 2 to 1 + ``repeats`` being counted."""
        prompt = [int(token) for token in prompt_ids]

        def count(tokens: int) -> Counts:
            bounds = {"repeats": 1, "warmup": 0, "max_seconds": _SECONDS}
            return self._counted("time_decode", prompt_ids=prompt, max_new_tokens=tokens, **bounds)

        return _per_unit(count, windows, repeats)

    def _counted(self, op: str, **fields: Any) -> Counts:
        before = read_counts(self._file, cpus=[0])
        self.request(op, **fields)
        after = read_counts(self._file, cpus=[0])
        return {name: after[name] - before[name] for name in CLASSES}


def _per_unit(count: Any, windows: int, repeats: int) -> list[dict[str, float]]:
    count(1)
    found = []
    for _ in range(windows):
        one, more = count(1), count(1 + repeats)
        found.append({name: (more[name] - one[name]) / repeats for name in CLASSES})
    return found


class QemuTarget:
    """``qemu:CORE``: a :class:`edgestill.runtimes.targets.Target` that emulates one core of :data:`CORES`.

    Raises :class:`UsageError` for a core that nobody knows; :class:`MissingDependency` (the emulator, the root file
    system) and :class:`Unsupported` (a core that this QEMU does not have) come when the first worker is opened.
    """

    source: Literal["emulated"] = "emulated"

    def __init__(self, address: str, *, cache: Path | None = None) -> None:
        name, _, query = address.partition("?")
        self.core: Core = find_core(name)
        self.name = f"qemu:{address}"
        self._level = parse_query(query, ["level"], self.name).get("level")
        if self._level is not None and self._level not in LEVELS:
            raise UsageError(f"{self.name}: no such level", hint=nearest(self._level, list(LEVELS)))
        self._cache = cache
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def open_worker(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> QemuWorker:
        """A worker on the core, for an ONNX or a GGUF artifact; ``cold`` means nothing where nothing is timed."""
        command = self.command(options.threads, form=self._form(folder))
        return QemuWorker(folder, options, command=command, core=self.core.name, env=self._environment())

    def open_counter(self, folder: Path, options: SessionOptions) -> CountingWorker:
        """A worker on the core that counts instructions (Arm cores only)."""
        form = self._form(folder)
        if self.core.machine != "aarch64":
            raise Unsupported(f"{self.core.name}: instructions are counted for aarch64 only", hint="qemu:cortex-a76")
        emulator = find_emulator("aarch64", plugins=True)
        plugin = build_plugin(emulator, self._cache)
        handle, file = tempfile.mkstemp(prefix="counts-", dir=self._folder())
        os.close(handle)
        command = self.command(1, form=form, emulator=emulator, options=plugin_options(plugin, Path(file)))
        return CountingWorker(folder, options, command=command, core=self.core.name, file=Path(file))

    def command(
        self, threads: int, *, form: str = "onnx", emulator: Path | None = None, options: Sequence[str] = ()
    ) -> list[str]:
        """The command line of a worker on the core that opens artifacts of ``form``."""
        emulator = emulator or find_emulator(self.core.machine)
        if self.core.cpu.partition(",")[0] not in _cpus(emulator):
            raise Unsupported(
                f"{emulator.name} {_version(emulator)} does not know {self.core.name}",
                hint=f"qemu:max, or a newer QEMU; `{emulator.name} -cpu help` lists what it knows",
            )
        start = [str(emulator), "-cpu", self.core.cpu, *options]
        end = ["--threads", str(threads), "--parent", str(os.getpid())]
        if form == "gguf":
            return [*start, str(self._runner()), *end]
        if self.core.machine == "aarch64":
            root = find_root(self._cache)
            return [*start, "-L", str(root.prefix(self.core)), str(root.python(self.core)), "-I", self._worker(), *end]
        if platform.machine() != "x86_64":
            raise Unsupported(f"{self.core.name} needs an x86-64 Python here, this is {platform.machine()}")
        return [*start, sys.executable, "-P", "-m", "edgestill.runtimes.worker", *end]

    def facts(self) -> Mapping[str, Any]:
        """The emulated machine: one core, no clock, no sensors."""
        emulator = find_emulator(self.core.machine)
        arm = self.core.machine == "aarch64"
        try:
            versions = dict(find_root(self._cache).versions) if arm else {"python": platform.python_version()}
        except MissingDependency:  # GGUF needs none
            versions = {}
        return {
            "system": "Linux", "release": platform.release(), "machine": self.core.machine,
            "cpu": f"{self.core.name} (emulated)", "cpu_flags": list(self.core.flags),
            "cores_physical": 1, "cores_logical": 1, "cores_usable": 1, "memory_bytes": None,
            "governor": None, "governor_reason": "an emulated core has no clock",
            "versions": {**versions, "edgestill": __version__, "qemu": _version(emulator)},
        }  # fmt: skip

    def _form(self, folder: Path) -> str:
        """The artifact's format, or :class:`Unsupported`."""
        form = open_artifact(folder, check=False).manifest.format if (folder / ARTIFACT_FILE).exists() else "torch"
        known = ("onnx", "gguf") if self.core.machine == "aarch64" else ("onnx",)
        if form not in known:
            raise Unsupported(
                f"{self.name} runs {' and '.join(known)} artifacts, {folder.name} is {form}",
                hint="export it: onnx:int8, gguf:q8_0",
            )
        return form

    def _runner(self) -> Path:
        """The native runner for this core, or of the level that was asked for."""
        flags = self.core.flags if self._level is None else LEVELS[self._level].features
        return find_runner(self.core.machine, {"cpu_flags": flags}, cache=self._cache)

    def _environment(self) -> dict[str, str]:
        """This machine's own Python needs to find edgestill where this process did."""
        if self.core.machine == "aarch64":
            return {}
        return {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def _folder(self) -> Path:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="edgestill-qemu-")
        return Path(self._scratch.name)

    def _worker(self) -> str:
        path = self._folder() / "worker.pyz"
        return str(path if path.is_file() else build_worker_zipapp(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


@functools.cache
def _cpus(emulator: Path) -> frozenset[str]:
    told = subprocess.run([str(emulator), "-cpu", "help"], capture_output=True, text=True, check=False).stdout
    return frozenset(word for line in told.splitlines() for word in line.split()[:2])


@functools.cache
def _version(emulator: Path) -> str:
    told = subprocess.run([str(emulator), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", told)
    return found[1] if found else "of unknown version"
