"""A worker on this machine: a child process over pipes, with an exchange folder in shared memory.

Nothing outlives it. The worker ends when this process does (its input closes); this process kills it when it hangs,
when a ``with`` block is left, on Ctrl-C and at exit; the exchange folder is removed by whoever lives longer, and what
both left when they were killed together is swept by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self

from ...errors import EdgestillError, UsageError, WorkerError
from ...files import is_alive
from ..protocol import MAX_LINE_BYTES, Exchange, exchange_root, pack, rebuild_error, unpack
from ..session import SessionOptions
from ..worker import thread_environment
from .client import WorkerClient

__all__ = ["HostTarget", "LocalWorker"]

_PREFIX = "edgestill-"
_TAIL_BYTES = 16384
_TAIL_LINES = 6
_CRASH = "Fatal Python error: "  # how faulthandler begins
_CLOSE_SECONDS = 5.0
# A worker never talks to a model hub, and doesn't start thread pools for tokenizers that it does not use.
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class LocalWorker(WorkerClient):
    """Open ``folder`` (an artifact, or a Transformers model folder) in a worker process of its own.

    A context manager. ``timeout`` is in seconds for each request. ``env`` adds to the environment. ``cold`` evicts the
    page cache under ``folder`` first (see ``cold_load_seconds``). ``command`` starts another worker than Python's, one
    that speaks the same protocol.

    Errors that the worker reports are raised as they were (``BadInput``, ``MissingDependency`` …); a worker that dies,
    hangs or breaks the protocol is :class:`WorkerError` with the end of what it wrote to standard error.
    """

    def __init__(
        self,
        folder: Path,
        options: SessionOptions | None = None,
        *,
        timeout: float = 600,
        env: Mapping[str, str] | None = None,
        cold: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        options = options or SessionOptions()
        self.name = folder.name
        self.timeout = timeout
        self._sent = 0
        self._buffer = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = self._spawn(command or _command(options.threads), options.threads, env or {})
        exchange = _make_exchange()
        self.exchange = Exchange(exchange, "c")
        self._cleanup = weakref.finalize(self, _end, self._process, exchange)
        try:
            self._start(str(folder.absolute()), options, cold=cold)
        except BaseException:
            self._cleanup()
            self._stderr.close()
            raise

    def _spawn(self, command: Sequence[str], threads: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                env={**os.environ, **_QUIET, **thread_environment(threads), **env},
                start_new_session=True,  # Ctrl-C reaches this process, which ends the worker in its own order
            )
        except OSError as error:
            raise WorkerError(f"can't start the worker {command[0]}: {error.strerror}", hint="check the path") from None

    def request(self, op: str, /, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply, ``timeout`` seconds at most; then the worker is killed."""
        if not self._cleanup.alive:
            raise WorkerError(f"the worker of {self.name} is closed", hint="start another")
        self._sent += 1
        message = {"id": self._sent, "op": op, "timeout_s": self.timeout, **fields}
        try:
            self._write(pack(message))
            reply = unpack(self._read_line(op))
        except (WorkerError, KeyboardInterrupt):
            self.kill()
            raise
        if reply.get("id") != self._sent:
            self.kill()
            raise WorkerError(
                f"the worker of {self.name} answered request {reply.get('id')!r} instead of {self._sent}",
                hint="see docs/worker-protocol.md",
            )
        if reply.get("ok") is not True:
            raise rebuild_error(reply.get("error"))
        result = reply.get("result")
        return result if isinstance(result, dict) else {}

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker: reading its reply tells how it died
            self._process.stdin.write(data)

    def _read_line(self, op: str) -> bytes:
        """One line of the worker's output, or :class:`WorkerError` when it dies, takes too long or floods."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._error(f"did not answer {op} within {self.timeout:g} s and was killed", "raise timeout")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died(op)
                self._buffer += chunk
                if len(self._buffer) > MAX_LINE_BYTES:
                    raise self._error(f"sent more than {MAX_LINE_BYTES} bytes in a line", "tensors travel as files")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, op: str) -> EdgestillError:
        try:
            status = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return self._error(f"closed its output during {op}", "see docs/worker-protocol.md")
        if status >= 0:
            return self._error(f"ended with status {status} during {op}", "the last lines say why")
        name = signal.Signals(-status).name
        killed = "the system may have run out of memory: use a smaller batch or length"
        return self._error(f"died of {name} during {op}", killed if name == "SIGKILL" else "the last lines say why")

    def _error(self, what: str, hint: str) -> WorkerError:
        tail = " | ".join(self.last_words())
        text = f"the worker of {self.name} {what}" + (f"; last lines: {tail}" if tail else "")
        error = WorkerError(text, hint=hint)
        error.add_note(f"the worker's standard error ended with:\n{self._stderr_tail()}")
        return error

    def last_words(self) -> list[str]:
        """The last lines that the worker wrote to standard error, without blank ones, and without the trace that
        Python adds to a crash when something stands before it (native libraries say there why they abort)."""
        text, _, trace = self._stderr_tail().partition(_CRASH)
        lines = [" ".join(line.split()) for line in (text if text.strip() else trace).splitlines()]
        return [line for line in lines if line][-_TAIL_LINES:]

    def _stderr_tail(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return re.sub(r"\x1b\[[0-9;]*m", "", data.decode(errors="replace"))

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def kill(self) -> None:
        """End the worker at once and remove the exchange folder."""
        self._cleanup()

    def close(self) -> None:
        """Ask the worker to end, wait a little, make sure that it did, remove the exchange folder."""
        if self._cleanup.alive:
            self.timeout = min(self.timeout, _CLOSE_SECONDS)
            # It ends in any case; a busy machine may let it take longer than we wait.
            with contextlib.suppress(WorkerError, subprocess.TimeoutExpired):
                self.request("close")
                self._process.wait(_CLOSE_SECONDS)
        self._cleanup()
        if not self._stderr.closed:
            self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostTarget:
    """This machine: a :class:`edgestill.runtimes.targets.Target` that starts a :class:`LocalWorker` each time."""

    name = "host"
    source: Literal["measured"] = "measured"

    def __init__(self, address: str = "") -> None:
        if address:
            raise UsageError(f"host:{address}", hint="this machine is just `host`")

    def open_worker(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> LocalWorker:
        """A worker process of its own."""
        return LocalWorker(folder, options, cold=cold)

    def facts(self) -> None:
        """``None``: this machine describes itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _command(threads: int) -> list[str]:
    # -P: a file named numpy.py in the working directory is not what the worker should import
    return [
        sys.executable,
        "-P",
        "-m",
        "edgestill.runtimes.worker",
        "--threads",
        str(threads),
        "--parent",
        str(os.getpid()),
    ]


def _end(process: subprocess.Popen[bytes], exchange: Path) -> None:
    """Kill the worker and what it started, reap it, remove its exchange folder. Safe to call when it is gone."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    shutil.rmtree(exchange, ignore_errors=True)


def _make_exchange() -> Path:
    """A new private exchange folder; those of processes that no longer exist are removed first."""
    root = exchange_root()
    for stale in root.glob(f"{_PREFIX}*"):
        owner = stale.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not is_alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
