"""A board or a phone as a target: what ssh and adb share above the shell.

:class:`RemoteTarget` checks an artifact, sends what is missing (:mod:`.store`), picks the worker that the device can
run (Python's, as one zipapp, or the native runner) and starts it (:mod:`.remote_worker`). A link that breaks while a
worker starts is waited for and the start repeated; one that breaks later ends that launch with :class:`LinkLost`, and
whoever measures repeats the launch.
"""

from __future__ import annotations

import tempfile
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ...artifact import ARTIFACT_FILE, Artifact, open_artifact
from ...errors import EdgestillError, LinkLost, MissingDependency, Unsupported, UsageError
from ...files import hash_file
from ..session import SessionOptions
from .load import LoadMeter
from .probe import Board, probe
from .remote_worker import RemoteWorker, sweep
from .shell import RemoteShell, quote
from .store import DeviceStore, LocalFile
from .zipapp import build_worker_zipapp

__all__ = ["RemoteTarget", "Settings"]

_ATTEMPTS = 4
_MODULES = {"onnx": "onnxruntime", "gguf": "llama_cpp"}
_RUNNERS = ("auto", "python", "native")


@dataclass(frozen=True)
class Settings:
    """How a device is used: the ``folder`` for our files, its ``python`` (``None``: it has none), which worker
    (``auto``, ``python``, ``native``), the ssh ``config`` file, if it is not the user's, and a library of this machine,
    ``onnxruntime``, with which the native runner opens ONNX there."""

    folder: str
    python: str | None = "python3"
    runner: str = "auto"
    config: str | None = None
    onnxruntime: str | None = None


class RemoteTarget:
    """A device at the end of a :class:`RemoteShell`; a :class:`edgestill.runtimes.targets.Target`.

    Nothing is connected before the first worker or :meth:`facts`.
    """

    source: Literal["measured"] = "measured"

    def __init__(self, name: str, shell: RemoteShell, settings: Settings) -> None:
        if settings.runner not in _RUNNERS:
            raise UsageError(f"{name}: runner {settings.runner!r}", hint=f"one of {', '.join(_RUNNERS)}")
        if settings.onnxruntime and settings.runner == "python":
            raise UsageError(f"{name}: runner=python takes the board's own onnxruntime", hint="leave one of both away")
        self.name = name
        self.shell = shell
        self.settings = settings
        self._board: Board | None = None
        self._store: DeviceStore | None = None
        self._meter: LoadMeter | None = None
        self._seen = 0
        # Exchange folders there and who holds them here; a worker that nobody holds any more may still run.
        self._exchanges: dict[str, weakref.ref[RemoteWorker] | None] = {}
        self._hashed: dict[Path, tuple[tuple[int, int], LocalFile]] = {}
        self._facts: dict[str, Any] | None = None

    def open_worker(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> RemoteWorker:
        """A worker on the device that opens the artifact ``folder`` of this machine.

        :class:`BadInput` for an artifact that changed since its hash was written, :class:`Unsupported` for one that
        this device can't run, :class:`MissingDependency` for what the device lacks, :class:`ResourceExhausted` for a
        full disk, :class:`LinkLost` when the link breaks again and again.
        """
        artifact = self._checked(folder)
        for attempt in range(_ATTEMPTS):
            try:
                return self._open(artifact, folder.name, options, cold)
            except LinkLost:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def facts(self) -> Mapping[str, Any]:
        """The device in the keys of :func:`edgestill.bench.environment.describe_environment`, told by its worker."""
        if self._facts is None:
            board = self._ready()[0]
            told: dict[str, Any] = dict.fromkeys(
                ("release", "cpu", "cores_physical", "cores_logical", "cores_usable", "memory_bytes", "governor")
            )
            told |= {"governor_reason": "the device was not asked", **board.facts()}
            try:
                command, _ = self._python_worker() if board.has_worker else self._native_worker()
            except (MissingDependency, UsageError) as error:
                told["governor_reason"] = f"no worker could be asked: {error.message}"
            else:
                with self._worker(None, self.name, command, SessionOptions(threads=1), cold=False) as worker:
                    if "facts" in worker.capabilities.get("operations", ()):
                        told |= worker.request("facts")
            versions = {"python": board.python} if board.python else {}
            self._facts = {**told, "versions": {**versions, **board.modules}}
        return self._facts

    def close(self) -> None:
        """End the connection."""
        self.shell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def before_launch(self) -> dict[str, Any]:
        """Wait until the device is fit to measure; what is worth recording about that. (A board: nothing.)"""
        return {}

    def read_sensors(self) -> Mapping[str, Any] | None:
        """What the system around the worker tells of sensors. (A board: nothing, its worker reads them.)"""
        return None

    def _ready(self) -> tuple[Board, DeviceStore]:
        """Connected, known, and, after a broken link, looked at again."""
        self.shell.connect()
        if self._board is None or self._store is None:
            settings = self.settings
            self._board = self.shell.steady(lambda: probe(self.shell, settings.folder, settings.python))
            self._store = DeviceStore(self.shell, self._board.root)
            self._meter = LoadMeter(self.shell, self._board.root)
        if self.shell.connections != self._seen:
            self._store.forget()
            self._seen = self.shell.connections
        return self._board, self._store

    def _open(self, artifact: Artifact, name: str, options: SessionOptions, cold: bool) -> RemoteWorker:
        _, store = self._ready()
        command, kind = self._choose(artifact)
        paths = [file.path for file in artifact.manifest.files] + [ARTIFACT_FILE]
        there = store.tree({path: self._file(artifact.path / path) for path in paths})
        notes = self.before_launch()
        worker = self._worker(there, name, command, options, cold=cold)
        worker.launch_facts |= {"worker": kind, **notes}
        return worker

    def _worker(
        self, folder: str | None, name: str, command: str, options: SessionOptions, *, cold: bool
    ) -> RemoteWorker:
        _, store = self._ready()
        exchange = f"{store.root}/exchange/{uuid.uuid4().hex[:16]}"
        held = {path: holder() if holder else None for path, holder in self._exchanges.items()}
        lost = [path for path, worker in held.items() if worker is None or not worker.alive]
        self.shell.steady(lambda: sweep(self.shell, store.root, lost))
        for path in lost:
            del self._exchanges[path]
        self._exchanges[exchange] = None
        assert self._meter is not None  # made with the store
        worker = RemoteWorker(
            self.shell, store, name, folder, options, exchange=exchange, command=command, cold=cold, meter=self._meter,
            outside=self.read_sensors,
        )  # fmt: skip
        self._exchanges[exchange] = weakref.ref(worker)
        return worker

    def _choose(self, artifact: Artifact) -> tuple[str, str]:
        """The command of a worker for this format, and its kind (``python``, or ``native`` with its level)."""
        board, _ = self._ready()
        form, name, wanted = artifact.manifest.format, self.shell.name, self.settings.runner
        if form not in _MODULES:
            raise Unsupported(
                f"{name}: {form} artifacts run on Apple's devices only",
                hint="measure them in Xcode and read its report: edgestill bench import FILE",
            )
        if form == "onnx" and self.settings.onnxruntime:
            return self._onnxruntime_worker(Path(self.settings.onnxruntime).expanduser())
        lack = board.why_no_worker(_MODULES[form])
        if wanted == "python" or (wanted == "auto" and lack is None):
            if lack is not None:
                raise self._lacking(lack, form)
            return self._python_worker()
        if form == "onnx":
            raise (
                self._lacking(lack, form)
                if lack
                else Unsupported(
                    f"{name}: the native runner opens ONNX with a library of yours only",
                    hint="onnxruntime=/path/to/libonnxruntime.so, or leave runner=native away",
                )
            )
        return self._native_worker()

    def _lacking(self, lack: str, form: str) -> EdgestillError:
        """The error for a device without what a format needs."""
        hint = f"install it there ({self.settings.python} -m pip install numpy {_MODULES[form].replace('_', '-')})"
        if self.settings.python == "python3":
            hint += ", or name another Python: ssh://…?python=/path/to/python3"
        return MissingDependency(f"{self.shell.name}: {lack}", hint=hint)

    def _python_worker(self) -> tuple[str, str]:
        _, store = self._ready()
        with tempfile.TemporaryDirectory() as folder:
            path = store.blob(LocalFile.of(build_worker_zipapp(Path(folder) / "worker.pyz")))
        return f"{quote(self.settings.python or 'python3')} {quote(path)}", "python"

    def _native_worker(self) -> tuple[str, str]:
        board, store = self._ready()
        if board.system != "Linux":
            raise Unsupported(f"{self.shell.name}: the native runner is for Linux and Android, not {board.system}")
        from ..native import find_runner

        runner = find_runner(board.machine, board.facts())
        return quote(store.blob(LocalFile.of(runner), executable=True)), f"native ({runner.parent.name})"

    def _onnxruntime_worker(self, path: Path) -> tuple[str, str]:
        """The native runner with the user's ONNX Runtime; what does not fit is said before anything is sent."""
        from ..native import find_host, machine_name, read_library

        board, store = self._ready()
        library = read_library(path)
        library.check(self.shell.name, machine_name(board.machine), board.libc)
        host = find_host(board.machine, library.libc)
        command, kind = self._native_worker()
        sent = self._file(path)
        words = [store.blob(sent), store.blob(LocalFile.of(host), executable=True)]
        command += f" --onnxruntime {quote(words[0])} --host {quote(words[1])}"
        return command, f"{kind} with {path.name}, sha256 {sent.sha256[:16]}"

    def _checked(self, folder: Path) -> Artifact:
        """The artifact, its files compared with their hashes once and whenever one of them changed since."""
        if not (folder / ARTIFACT_FILE).exists():
            raise Unsupported(
                f"{self.name} runs artifacts, {folder} is not one", hint="export it first: edgestill export"
            )
        artifact = open_artifact(folder, check=False)
        files = {file.path: file.sha256 for file in artifact.manifest.files}
        for path, digest in files.items():
            source = folder / path
            if not source.is_file() or self._file(source).sha256 != digest:
                open_artifact(folder)  # says which file, and what to do
        return artifact

    def _file(self, path: Path) -> LocalFile:
        """A local file with its hash, computed again only when size or time of change are others."""
        stat = path.stat()
        key = (stat.st_size, stat.st_mtime_ns)
        known = self._hashed.get(path)
        if known is None or known[0] != key:
            known = (key, LocalFile(path, hash_file(path), stat.st_size))
            self._hashed[path] = known
        return known[1]
