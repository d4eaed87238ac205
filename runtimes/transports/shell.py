"""What a board and a phone have in common: a POSIX shell at the end of a link that can break.

:class:`RemoteShell` runs scripts there, sends files and brings files back. ssh and adb differ in the command line that
does it; everything above (:mod:`.store`, :mod:`.remote`) knows this class only. A device needs no more than ``sh``,
``cat``, ``mkdir``, ``mv``, ``wc`` and ``sha256sum``: Debian, BusyBox and Android's toybox have them.

Every script ends by writing its status to standard error. Where that line is missing the link broke, whatever the
client's own exit status says: that is how a dropped link is told from a command that failed.
"""

from __future__ import annotations

import abc
import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from ...errors import BadInput, LinkLost, MissingDependency, ResourceExhausted, WorkerError

__all__ = ["STATUS", "Ran", "RemoteShell", "quote", "split_status", "with_status"]

STATUS = "edgestill-status"
"""What the last line of a script's standard error begins with."""

_ATTEMPTS = 4  # how often a push is begun again after a broken link
_STALL_SECONDS = 120.0  # a transfer without a byte of progress
_POLL_SECONDS = 0.05
_TAIL_BYTES = 8192

T = TypeVar("T")


def quote(path: str) -> str:
    """``path`` as one word for any POSIX shell, whatever its characters; a leading ``~/`` is the home folder.

    >>> print(quote("it's"), quote("~/my dir"))
    'it'"'"'s' "$HOME"/'my dir'
    """
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}' if path[2:] else '"$HOME"'
    return shlex.quote(path)


def with_status(script: str) -> str:
    """The script, followed by the line that tells its status."""
    return f'( {script}\n); s=$?; echo "{STATUS} $s" >&2; exit $s'


def split_status(text: str) -> tuple[str, int | None]:
    """Standard error without the status line, and the status (``None``: the line is missing).

    >>> split_status("oh\\nedgestill-status 3\\n")
    ('oh\\n', 3)
    """
    found = re.search(rf"^{STATUS} (\d+)\s*$", text, re.MULTILINE)
    if found is None:
        return text, None
    return text[: found.start()] + text[found.end() + 1 :], int(found[1])


@dataclass(frozen=True)
class Ran:
    """A script that ended on the device: its status, standard output and standard error."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.out.decode(errors="replace")

    @property
    def why(self) -> str:
        """The last line of standard error, for a message."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else f"status {self.status}"


class RemoteShell(abc.ABC):
    """A shell on a device. ``name`` is how messages call the device (``"board pi@10.0.0.7"``).

    Nothing is connected before it is needed. A context manager: the connection ends with it.
    """

    name: str
    connections: int = 0
    """How often it was connected: another number says that the link broke meanwhile."""

    @abc.abstractmethod
    def connect(self) -> None:
        """Be connected: nothing to do while the link stands; after a broken one wait for it, bounded.

        :class:`WorkerError` for a device that can't be reached, :class:`BadInput` for one that may not be trusted or
        that refuses us, :class:`MissingDependency` without the client program.
        """

    @abc.abstractmethod
    def argv(self, script: str) -> list[str]:
        """The command line of a local process that runs ``script`` on the device, over its standard streams."""

    @abc.abstractmethod
    def send(self, source: Path, there: str, offset: int) -> None:
        """Copy the bytes of ``source`` from ``offset`` on to the file ``there``, whose size is ``offset`` (0: new)."""

    @abc.abstractmethod
    def put(self, files: Sequence[Path], folder: str) -> None:
        """Copy local files, by their names, into a folder of the device."""

    @abc.abstractmethod
    def get(self, names: Sequence[str], folder: str, here: Path) -> None:
        """Move files of a device's folder into the folder ``here``."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, script: str, *, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None, seconds: float = 60.0
    ) -> Ran:
        """Run a script and wait for its end.

        With ``stdin`` or ``stdout`` (open files) it is a transfer: no limit but that bytes go on moving; else it may
        take ``seconds``. :class:`LinkLost` when the link broke before the script's end was told.
        """
        moving = stdin or stdout
        with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
            out = stdout or stack.enter_context(tempfile.TemporaryFile())
            process = self._start(self.argv(with_status(script)), stdin or subprocess.DEVNULL, out, errors)
            try:
                ended = _wait(process, _progress(moving) if moving else None, _STALL_SECONDS if moving else seconds)
            finally:
                _kill(process)
            errors.seek(0)
            err, status = split_status(errors.read().decode(errors="replace"))
            if not ended:
                waited = _STALL_SECONDS if moving else seconds
                raise self.lost(f"nothing came from it for {waited:g} s")
            if status is None:
                raise self.lost(_last_line(err) or f"{self.argv('')[0]} ended with status {process.returncode}")
            data = b""
            if stdout is None:
                out.seek(0)
                data = out.read()
            return Ran(status, data, err)

    def check(self, script: str, what: str, **options: Any) -> Ran:
        """:meth:`run`, and an error that says ``what`` failed unless its status is 0."""
        ran = self.run(script, **options)
        if ran.status:
            raise self.failed(what, ran)
        return ran

    def failed(self, what: str, ran: Ran) -> WorkerError | ResourceExhausted | BadInput:
        """The error for a script that ended badly: a full disk and missing rights have their own."""
        if re.search(r"no space left|disk quota exceeded|ENOSPC", ran.err, re.IGNORECASE):
            return ResourceExhausted(f"{self.name}: no space left: {what} failed", hint="free some room there")
        if re.search(r"permission denied|read-only file system", ran.err, re.IGNORECASE):
            return BadInput(f"{self.name}: {what} failed: {ran.why}", hint="choose a folder that the user may write to")
        return WorkerError(f"{self.name}: {what} failed: {ran.why}", hint="try the same by hand on the device")

    def steady(self, work: Callable[[], T]) -> T:
        """Do what can be begun again (a push, a look); when the link breaks, wait for it and begin again."""
        for attempt in range(_ATTEMPTS):
            self.connect()
            try:
                return work()
            except LinkLost:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _start(self, argv: list[str], stdin: Any, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        except FileNotFoundError:
            raise self._no_client() from None

    def _no_client(self) -> MissingDependency:
        program = self.argv("")[0]
        package = {"ssh": "openssh-client"}.get(program, program)
        return MissingDependency(f"{program} is not installed here", hint=f"apt install {package}")

    def lost(self, reason: str) -> LinkLost:
        """The error for a link that broke."""
        return LinkLost(
            f"the link to {self.name} broke: {reason}", hint="check its power and network, then run the same again"
        )


def _progress(file: IO[bytes]) -> Callable[[], int]:
    """Bytes that have passed: the child shares our descriptor's position when it reads, and a file grows."""
    return lambda: os.lseek(file.fileno(), 0, os.SEEK_CUR) + os.fstat(file.fileno()).st_size


def _wait(process: subprocess.Popen[bytes], progress: Callable[[], int] | None, seconds: float) -> bool:
    """Whether the process ended; not, when it took (or made no progress for) ``seconds``."""
    since, seen = time.monotonic(), -1
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            return True
        now = progress() if progress else 0
        if now != seen and progress:
            since, seen = time.monotonic(), now
        if time.monotonic() - since > seconds:
            return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
