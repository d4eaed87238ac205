"""The HTTP server behind the page: hands out its files, carries requests, replies, tensors and the artifact's files.

All addresses lie below a random token, so that no other page of the browser, and nobody else on the network, gets
anything. What the page may fetch is a fixed table; no path of a request ever becomes a path on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import math
import queue
import re
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ....artifact import ARTIFACT_FILE, Artifact
from ....errors import UsageError
from ....files import safe_join
from ...protocol import MAX_LINE_BYTES

__all__ = ["Launch", "PageServer"]

PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".mjs": "text/javascript; charset=utf-8", ".wasm": "application/wasm"}
_POLL_SECONDS = 10.0  # how long a question for work stays open
_STEP_SECONDS = 0.1
_HELLO_BYTES = 4096
_TENSOR = re.compile(r"([cw])\d{1,9}\.bin")
_CHUNK_BYTES = 1 << 20
_POLICY = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src 'self'; "
    "style-src 'unsafe-inline'; img-src data:"
)


@dataclass
class Launch:
    """One worker in the page: its artifact, where its tensors lie, and its two queues."""

    artifact: Artifact
    exchange: Path
    requests: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    replies: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    failure: str | None = None
    ended: bool = False
    phase: Callable[[str], None] = lambda _: None


class PageServer:
    """Serves one page at a time at :attr:`address`; ``host`` and ``port`` are what it listens on (port 0: any free).

    ``page`` is what the page says of its browser, ``None`` until one has connected; ``gone_seconds`` is how long it has
    been away. Raises :class:`UsageError` when it can't listen there.
    """

    def __init__(self, ort_files: Mapping[str, Path], host: str = "127.0.0.1", port: int = 0) -> None:
        self.token = secrets.token_urlsafe(16)
        self.page: Mapping[str, Any] | None = None
        self.connected = threading.Event()
        self.launches: dict[str, Launch] = {}
        self.commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.files = {"": PAGE / "page.html", **{path.name: path for path in PAGE.glob("*.mjs")}}
        self.files |= {f"ort/{name}": path for name, path in ort_files.items()}
        self.stopped = False
        self._lock = threading.Lock()
        self._owner: str | None = None
        self._polls = 0
        self._left = time.monotonic()
        self._closed = False  # the page said good-bye
        try:
            self._http = _Server((host, port), _Handler)
        except OSError as error:
            hint = "another program listens there: choose another port" if error.errno == errno.EADDRINUSE else ""
            text = f"can't listen on {host}:{port}: {error.strerror or error}"
            raise UsageError(text, hint=hint or "write it as web:ADDRESS:PORT, an address of this machine") from None
        self._http.pages = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="web", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What the browser opens."""
        host, port = str(self._http.server_address[0]), int(self._http.server_address[1])
        shown = _outward_address() if host in ("0.0.0.0", "::") else host
        return f"http://{shown}:{port}/{self.token}/"

    @property
    def gone_seconds(self) -> float:
        """How long no page has been connected."""
        with self._lock:
            if self._closed:
                return math.inf
            return 0.0 if self._polls else time.monotonic() - self._left

    def add(self, launch: Launch) -> str:
        """Let the page start a worker for ``launch``; its number."""
        number = str(len(self.launches) + 1)
        self.launches[number] = launch
        self.commands.put({"start": number})
        return number

    def end(self, number: str) -> None:
        """Let the page end that worker, whatever it is doing."""
        self.launches[number].ended = True
        self.commands.put({"end": number})

    def stop(self) -> None:
        """Say good-bye to the page and stop serving."""
        if not self.stopped:
            self.stopped = True
            self._http.shutdown()
            self._http.server_close()
            self._thread.join(5)

    # ---- what the page asks ---------------------------------------------------------------------------------------

    def claim(self, told: Mapping[str, Any]) -> bool:
        """Whether this page may work here: the first one, or another once that is gone."""
        identity = str(told.get("page"))
        with self._lock:
            if self._owner is None or (identity != self._owner and not self._polls):
                if self.page is not None:  # workers of a page that was closed or loaded anew are gone
                    for launch in self.launches.values():
                        launch.ended = True
                self._owner, self.page, self._closed = identity, dict(told), False
            if identity != self._owner:
                return False
            self._polls += 1
        self.connected.set()
        return True

    def release(self) -> None:
        """A page's question ended."""
        with self._lock:
            self._polls -= 1
            self._left = time.monotonic()

    def left(self, identity: str) -> None:
        """The page says that it is being closed."""
        with self._lock:
            if identity == self._owner:
                self._owner, self._closed = None, True
                self.connected.clear()


class _Server(ThreadingHTTPServer):
    pages: PageServer
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up in the middle is no news; the client notices what it misses."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        pages = self.server.pages
        _, token, *rest = self.path.partition("?")[0].split("/", 2) if "/" in self.path[1:] else ("", "")
        if not hmac.compare_digest(token.encode(errors="replace"), pages.token.encode()):
            return self._refuse(403, "this address is not, or no longer, valid: take the one that edgestill prints")
        path = rest[0] if rest else ""
        parts = path.split("/")
        match (method, parts):
            case ("GET", _) if path in pages.files:
                return self._file(pages.files[path])
            case ("POST", ["next"]):
                return self._next(pages)
            case ("POST", ["bye"]):
                pages.left(self._body(_HELLO_BYTES).decode(errors="replace"))
                return self._send(204)
            case (_, ["w", number, *what]) if number in pages.launches:
                return self._launch(pages, pages.launches[number], method, what)
        return self._refuse(404, f"no such thing: {path[:80]}")

    def _next(self, pages: PageServer) -> None:
        try:
            told = json.loads(self._body(_HELLO_BYTES))
        except ValueError:
            return self._refuse(400, "not JSON")
        if not isinstance(told, dict) or not pages.claim(told):
            return self._refuse(409, "another page is connected")
        try:
            command = self._wait(pages.commands, pages)
            return self._json({"stop": True} if pages.stopped else command or {})
        finally:
            pages.release()

    def _launch(self, pages: PageServer, launch: Launch, method: str, what: list[str]) -> None:
        match (method, what):
            case ("POST", ["request"]):
                self._body(0)
                line = self._wait(launch.requests, pages, launch)
                if launch.ended:
                    return self._refuse(410, "closed")
                return self._send(200, line, "application/json") if line else self._send(204)
            case ("POST", ["reply"]):
                launch.replies.put(self._body(MAX_LINE_BYTES))
                return self._send(204)
            case ("POST", ["failed"]):
                launch.failure = _message(self._body(_HELLO_BYTES))
                return self._send(204)
            case ("POST", ["phase"]):
                launch.phase(self._body(_HELLO_BYTES).decode(errors="replace"))
                return self._send(204)
            case ("GET", ["artifact", "manifest"]):
                return self._file(launch.artifact.path / ARTIFACT_FILE)
            case ("GET", ["artifact", index]) if index.isdecimal() and int(index) < len(launch.artifact.manifest.files):
                entry = launch.artifact.manifest.files[int(index)]
                return self._file(safe_join(launch.artifact.path, entry.path), entry.path)
            case ("GET", ["tensor", name]) if _TENSOR.fullmatch(name) and name[0] == "c":
                self._file(launch.exchange / name, name)
                (launch.exchange / name).unlink(missing_ok=True)
                return None
            case ("PUT", ["tensor", name]) if _TENSOR.fullmatch(name) and name[0] == "w":
                return self._store(launch.exchange / name)
        return self._refuse(404, f"no such thing: {'/'.join(what)[:80]}")

    def _wait(self, waiting: queue.SimpleQueue[Any], pages: PageServer, launch: Launch | None = None) -> Any:
        """The next entry of a queue; ``None`` after a while, or when nobody is left to tell it to."""
        deadline = time.monotonic() + _POLL_SECONDS
        while time.monotonic() < deadline and not pages.stopped and not (launch and launch.ended):
            with contextlib.suppress(queue.Empty):
                return waiting.get(timeout=_STEP_SECONDS)
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError  # the page is closed
        return None

    def _body(self, most: int) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        if size > most:
            self.close_connection = True
            self._refuse(413, f"{size} bytes are too many here")
            raise ConnectionAbortedError
        return self.rfile.read(size)

    def _file(self, path: Path, name: str = "") -> None:
        try:
            stream = path.open("rb")
        except OSError as error:
            message = f"{name or path.name} can't be read: {error.strerror}"
            return self._refuse(404, message, kind="BadInput", hint="it was there when the hashes were checked")
        with stream:
            size = path.stat().st_size
            self._head(200, size, _TYPES.get(path.suffix, "application/octet-stream"))
            while chunk := stream.read(_CHUNK_BYTES):
                self.wfile.write(chunk)
        return None

    def _store(self, path: Path) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        try:
            with path.open("xb") as out:
                while left and (chunk := self.rfile.read(min(left, _CHUNK_BYTES))):
                    out.write(chunk)
                    left -= len(chunk)
        except OSError as error:
            self.close_connection = True
            text = f"a tensor of the worker can't be written: {error.strerror}"
            kind = "ResourceExhausted" if error.errno == errno.ENOSPC else "WorkerError"
            return self._refuse(507, text, kind=kind, hint="free some room, then run the same command again")
        return self._send(204)

    def _json(self, value: Mapping[str, Any]) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: int, message: str, *, kind: str = "WorkerError", hint: str = "") -> None:
        body = json.dumps({"kind": kind, "message": message, "hint": hint}).encode()
        self._send(status, body, "application/json")

    def _send(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
        self._head(status, len(body), kind)
        self.wfile.write(body)

    def _head(self, status: int, size: int, kind: str) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
        # Cross-origin isolation: a fine clock (5 microseconds instead of 100) and threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the token stands in the address
        self.end_headers()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return "the worker script did not start"


def _outward_address() -> str:
    """The address by which the network sees this machine (no packet is sent for that)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
