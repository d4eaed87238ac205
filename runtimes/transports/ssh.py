"""A board over ssh: ``ssh://user@board:port/folder?python=…``, through the system's OpenSSH client.

One master connection a target carries everything: a command through it costs a third of a second, a new login one.
The host key must be known (an unknown or a changed one is refused; nothing here ever accepts one), and nobody is asked
for a password: keys or an agent. What the user's ``~/.ssh/config`` says about the host is obeyed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from ...errors import BadInput, EdgestillError, UsageError, WorkerError
from .options import parse_query
from .remote import RemoteTarget, Settings
from .shell import RemoteShell, quote

__all__ = ["SshShell", "SshTarget", "parse_address"]

DEFAULT_FOLDER = "~/.cache/edgestill"
ALIVE_SECONDS = 5  # a silent link is asked for a sign of life this often, four times, then it is broken
ALIVE_COUNT = 4
CONNECT_SECONDS = 15
RECONNECT_SECONDS = 120.0  # how long a link that broke is waited for

_NOT_FOUND = 127
_FORM = "ssh://user@board:22/folder?python=/path/to/python3"
_OPTIONS = {
    "BatchMode": "yes", "StrictHostKeyChecking": "yes", "UpdateHostKeys": "no", "ConnectTimeout": str(CONNECT_SECONDS),
    "ForwardAgent": "no", "ForwardX11": "no", "PermitLocalCommand": "no", "ClearAllForwardings": "yes",
    "RemoteCommand": "none", "RequestTTY": "no", "LogLevel": "ERROR", "ControlPersist": "no",
}  # fmt: skip
# What ssh says -> what it means and what to do. `BadInput`: waiting won't help.
_REFUSALS: tuple[tuple[str, type[EdgestillError], str, str], ...] = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed", BadInput,
     "shows another host key than the known one: refused",
     "somebody may stand between; if the board was set up anew, remove the old key (ssh-keygen -R {known}) and connect "
     "once by hand"),
    ("No .* host key is known for|Host key verification failed", BadInput, "has a host key that is not known: refused",
     "connect once by hand (ssh {login}) and compare the fingerprint with the board's own (ssh-keygen -lf "
     "/etc/ssh/ssh_host_ed25519_key.pub there)"),
    ("Permission denied|Too many authentication failures", BadInput, "refuses the login",
     "a key must let you in without a password: ssh-copy-id {login}"),
    ("Could not resolve hostname", BadInput, "has a name that can't be resolved", "check the spelling, or give its IP"),
    ("Bad configuration|no such file.*config|Can't open user config", BadInput, "can't be reached with this ssh config",
     "ssh -v {login} says which line"),
)  # fmt: skip


def parse_address(address: str) -> tuple[str, int | None, Settings]:
    """``user@host:port/folder?python=…`` taken apart: the destination for ssh, the port, the rest.

    The folder may be percent-encoded; without one it is ``~/.cache/edgestill`` (``/~/x`` is below the home folder).

    >>> parse_address("pi@board:2222/mnt/my%20ssd?python=~/v/bin/python")[2].folder
    '/mnt/my ssd'
    """
    place, _, query = address.partition("?")
    login, slash, path = place.partition("/")
    found = re.fullmatch(r"(?:(?P<user>[^@\s]+)@)?(?P<host>\[[^\[\]@\s]+\]|[^\[\]:@\s]+)(?::(?P<port>\d+))?", login)
    if found is None or login.startswith("-") or (found["host"] or "").startswith("-"):
        raise UsageError(f"not the address of a board: ssh://{address}", hint=_FORM)
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"ssh://{address}: there is no port {port}", hint=_FORM)
    chosen = parse_query(query, ("python", "config", "runner", "onnxruntime"), f"ssh://{address}")
    folder = unquote(path).rstrip("/") if slash else ""
    folder = folder if folder.startswith("~/") else f"/{folder}" if folder else DEFAULT_FOLDER
    host = unquote(found["host"].strip("[]"))
    destination = f"{found['user']}@{host}" if found["user"] else host
    python = chosen.get("python", "python3")
    settings = Settings(folder, python, chosen.get("runner", "auto"), chosen.get("config"), chosen.get("onnxruntime"))
    return destination, port, settings


class SshShell(RemoteShell):
    """:class:`RemoteShell` over one OpenSSH master connection. ``config`` is another ssh config file (``ssh -F``)."""

    def __init__(self, destination: str, port: int | None = None, config: str | None = None) -> None:
        self.name = f"board {destination}" + (f":{port}" if port else "")
        self._port = port
        self._destination = destination
        self._common = ["-F", os.path.expanduser(config)] if config else []
        self._common += [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        self._common += ["-o", f"ServerAliveInterval={ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={ALIVE_COUNT}"]
        self._common += ["-p", str(port)] if port else []
        # Short: the path of a socket has about 100 characters.
        base = "/tmp" if os.access("/tmp", os.W_OK) else None
        self._folder = tempfile.mkdtemp(prefix="edgestill-ssh-", dir=base)
        self._socket = os.path.join(self._folder, "s")
        self._master: subprocess.Popen[bytes] | None = None
        self._refused: EdgestillError | None = None
        self._was_up = False
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._folder, True)

    def argv(self, script: str) -> list[str]:
        """See :class:`RemoteShell`. Only through the master: without one, this must not make a second connection."""
        through = ["-S", self._socket, "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]
        return ["ssh", *through, *self._common, self._destination, f"exec sh -c {shlex.quote(script)}"]

    def connect(self) -> None:
        """See :class:`RemoteShell`. The first time one attempt; after a broken link up to two minutes of them."""
        if self._refused is not None:
            raise self._refused
        if self._master is not None and self._master.poll() is None and os.path.exists(self._socket):
            return
        deadline = time.monotonic() + (RECONNECT_SECONDS if self._was_up else 0)
        pause = 0.5
        while True:
            try:
                self._open_master()
                return
            except WorkerError:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 8.0)

    def _open_master(self) -> None:
        self._end_master()
        command = ["ssh", "-M", "-N", "-S", self._socket, "-o", "ControlMaster=yes", *self._common, self._destination]
        with tempfile.TemporaryFile() as errors:
            self._master = self._start(command, subprocess.DEVNULL, subprocess.DEVNULL, errors)
            weakref.finalize(self, _terminate, self._master)
            deadline = time.monotonic() + CONNECT_SECONDS + 10  # a name to be resolved, a connection, a login
            while not os.path.exists(self._socket):
                if self._master.poll() is not None or time.monotonic() > deadline:
                    self._end_master()
                    errors.seek(0)
                    raise self._refusal(errors.read().decode(errors="replace"))
                time.sleep(0.02)
        self._was_up = True
        self.connections += 1

    def _refusal(self, said: str) -> EdgestillError:
        """The error for what ssh said when it did not connect; one that waiting doesn't cure is remembered."""
        login = f"-p {self._port} {self._destination}" if self._port else self._destination
        host = self._destination.rpartition("@")[2]
        known = f"'[{host}]:{self._port}'" if self._port and self._port != 22 else host
        for pattern, kind, what, hint in _REFUSALS:
            if re.search(pattern, said, re.IGNORECASE):
                self._refused = kind(f"{self.name} {what}", hint=hint.format(login=login, known=known))
                return self._refused
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        error = WorkerError(
            f"{self.name} can't be reached: {lines[-1] if lines else 'no answer'}",
            hint=f"is it on and on this network? Try: ssh {login} true",
        )
        if not self._was_up:
            self._refused = error  # the other artifacts need not wait for it again
        return error

    def send(self, source: Path, there: str, offset: int) -> None:
        """See :class:`RemoteShell`: ``cat`` at the other end appends."""
        with source.open("rb") as stream:
            stream.seek(offset)
            self.check(f"cat {'>>' if offset else '>'} {quote(there)}", f"sending {source.name}", stdin=stream)

    def put(self, files: Sequence[Path], folder: str) -> None:
        """See :class:`RemoteShell`: all in one command where the board has tar, since each command costs its time."""
        if len(files) > 1:
            with tempfile.TemporaryFile() as packed:
                with tarfile.open(fileobj=packed, mode="w") as archive:
                    for file in files:
                        archive.add(file, file.name)
                packed.seek(0)
                ran = self.run(f"tar -xof - -C {quote(folder)}", stdin=packed)
            if ran.status == 0:
                return
            if ran.status != _NOT_FOUND:
                raise self.failed("sending tensors", ran)
        for file in files:
            self.send(file, f"{folder}/{file.name}", 0)

    def get(self, names: Sequence[str], folder: str, here: Path) -> None:
        """See :class:`RemoteShell`."""
        for name in names:
            path = quote(f"{folder}/{name}")
            with (here / name).open("wb") as stream:
                self.check(f"cat {path} && rm -f {path}", f"fetching {name}", stdout=stream)

    def close(self) -> None:
        """End the master connection and with it everything that runs through it."""
        self._end_master()
        self._cleanup()

    def _end_master(self) -> None:
        if self._master is not None:
            _terminate(self._master)
            self._master = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class SshTarget(RemoteTarget):
    """``ssh://…`` as a :class:`edgestill.runtimes.targets.Target`; numbers from it are measured."""

    def __init__(self, address: str) -> None:
        destination, port, settings = parse_address(address)
        super().__init__(f"ssh://{address}", SshShell(destination, port, settings.config), settings)
