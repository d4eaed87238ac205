"""Fresh processes: their wall time, CPU time and peak memory; and one that is spoken to in JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgestill.errors import EdgestillError
from edgestill.runtimes.worker import thread_environment

__all__ = ["PROGRAMS", "Conversation", "Launch", "PlainRuntime", "launch", "launch_measured", "surroundings"]

PROGRAMS = Path(__file__).resolve().parent / "programs"
# Nobody asks a hub or tells a vendor anything while we measure.
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
          "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip


def surroundings(threads: int) -> dict[str, str]:
    """Environment variables of a process that is measured."""
    return {**os.environ, **_QUIET, **thread_environment(threads)}


@dataclass(frozen=True)
class Launch:
    """One process from its start to its end. ``peak_bytes``: the largest resident set among it and its children."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None


def launch(command: Sequence[str | Path], *, threads: int = 1, cwd: Path | None = None) -> Launch:
    """Run ``command`` once; :class:`EdgestillError` with the end of its output when it fails."""
    environment = surroundings(threads)
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            cwd=cwd,
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by subprocess
        if process.returncode:
            output.seek(0)
            raise _failed(str(command[-1]), process.returncode, output.read().decode(errors="replace"))
    return Launch(seconds, usage.ru_utime + usage.ru_stime)


def launch_measured(python: Path, script: Path, arguments: Sequence[str | Path], *, threads: int, cwd: Path) -> Launch:
    """Run a Python ``script`` under ``programs/measured.py``, which adds its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "peak.json"
        command = [python, "-P", PROGRAMS / "measured.py", result, script, *arguments]
        taken = launch(command, threads=threads, cwd=cwd)
        peak = json.loads(result.read_text())["peak_bytes"]
    return Launch(taken.seconds, taken.cpu_seconds, peak)


class Conversation:
    """A program that answers JSON lines (``programs/lines.py``). ``ours`` says whether it may know edgestill."""

    def __init__(
        self, python: Path, program: str, arguments: Sequence[str | Path], threads: int, *, ours: bool = False
    ) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._name = program
        self._process = subprocess.Popen(
            [str(python), "-P", str(PROGRAMS / f"{program}.py"), *(str(part) for part in arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            env=surroundings(threads),
        )  # fmt: skip
        try:
            hello = self._read()
            if hello["edgestill"] and not ours:
                raise EdgestillError(f"{program} imported edgestill: it is no independent peer", hint="see programs/")
        except BaseException:
            self.close()
            raise
        self.version = str(hello["version"])

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request, wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._stderr.seek(0)
            raise _failed(self._name, status, self._stderr.read().decode(errors="replace"))
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the program (it ends with its input) and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


class PlainRuntime(Conversation):
    """A runtime called directly, in a process that knows nothing of edgestill (``programs/plain_*.py``)."""

    def __init__(self, program: str, model: Path, threads: int, task: str) -> None:
        super().__init__(Path(sys.executable), program, [model, str(threads), task], threads)


def _failed(name: str, status: int, output: str) -> EdgestillError:
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    return EdgestillError(f"{Path(name).name} ended with status {status}: {(lines or ['no word'])[-1][:300]}")
