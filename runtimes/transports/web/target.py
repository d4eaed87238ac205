"""The target ``web``: an ONNX artifact in onnxruntime-web, the runtime of web apps on phones and everywhere else.

``web`` starts a headless Chromium of this machine, a fresh one for every launch. ``web:HOST:PORT`` waits for a browser
to open the page (``web:0.0.0.0:8000``: a phone on the same network); there each launch is a fresh Web Worker, whose
WebAssembly memory starts empty.

What a page can't do is done on this side: ``score`` reads a reference folder, so the browser sends its outputs and
:mod:`edgestill.runtimes.scoring` reduces them, with the same code as everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import queue
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy.typing as npt

from ....artifact import ARTIFACT_FILE, open_artifact
from ....errors import Unsupported, UsageError, WorkerError
from ... import scoring
from ...machine import machine_facts
from ...protocol import Exchange, exchange_root, pack, rebuild_error, unpack
from ...session import Session, SessionInfo, SessionOptions
from ..client import WorkerClient
from .browser import Browser, browser_name, browser_version, find_browser, private_folder
from .runtime import ort_web_files
from .server import Launch, PageServer

__all__ = ["WebTarget", "WebWorker"]

_START_SECONDS = 180.0  # for a browser to start and load the page, on a busy machine
_VISIT_SECONDS = 600.0  # for somebody to open the page on a phone
_GONE_SECONDS = 10.0  # without a sign of life
_STEP_SECONDS = 0.1
_CLOSE_SECONDS = 5.0
_CLOSED = "open the address again and keep the page in front, the screen on"


class WebTarget:
    """See the module. ``address`` is ``""`` (headless Chromium here) or ``HOST:PORT``; ``ask`` is told the
    address to open. :class:`UsageError` for another address."""

    source: Literal["measured"] = "measured"

    def __init__(self, address: str = "", *, timeout: float = 600, ask: Callable[[str], None] | None = None) -> None:
        self.name = f"web:{address}" if address else "web"
        self.timeout = timeout
        self.ask = ask or _say_nothing
        self._listen = _parse(address) if address else None
        self._server: PageServer | None = None
        self._facts: Mapping[str, Any] | None = None

    def open_worker(self, folder: Path, options: SessionOptions, *, cold: bool = False) -> WebWorker:
        """Open the artifact ``folder`` in a fresh browser, or in a fresh worker of the page that is connected.

        Raises :class:`Unsupported` for what is not ONNX, :class:`BadInput` for a changed artifact,
        :class:`MissingDependency` without a browser, :class:`WorkerError` when no page connects.
        """
        if not (folder / ARTIFACT_FILE).exists():
            raise Unsupported(f"{folder.name}: a browser runs ONNX artifacts only", hint="export it: edgestill export")
        artifact = open_artifact(folder)
        if artifact.manifest.format != "onnx":
            raise Unsupported(
                f"{folder.name}: a browser runs onnx, this artifact is {artifact.manifest.format}",
                hint="export onnx:int8, onnx:int4 or onnx:fp32",
            )
        server, browser = self._connect()
        launch = Launch(artifact, private_folder(exchange_root()))
        return WebWorker(server, browser, launch, options, timeout=self.timeout, cold=cold)

    def _connect(self) -> tuple[PageServer, Browser | None]:
        if self._listen is None:
            executable = find_browser()
            server = PageServer(ort_web_files())
            try:
                browser = Browser(executable, server.address)
            except BaseException:
                server.stop()
                raise
            try:
                _await_page(server, browser, _START_SECONDS)
            except BaseException:
                browser.close()
                server.stop()
                raise
            return server, browser
        server = self._serve()
        if not server.connected.is_set() or server.gone_seconds > _GONE_SECONDS:
            self.ask(f"open {server.address} in the browser that is to be measured")
            server.connected.clear()
            _await_page(server, None, _VISIT_SECONDS)
        return server, None

    def _serve(self) -> PageServer:
        if self._server is None:
            assert self._listen is not None
            self._server = PageServer(ort_web_files(), *self._listen)
        return self._server

    @property
    def address(self) -> str | None:
        """What a browser has to open (from now on it is listened there), ``None`` when one is started here."""
        return self._serve().address if self._listen is not None else None

    def facts(self) -> Mapping[str, Any]:
        """The machine: of a headless browser this one, with ``browser`` and its version; of another what its page tells
        (a browser hides the processor). Waits for a page."""
        if self._facts is None:
            self._facts = self._ask_facts()
        return self._facts

    def _ask_facts(self) -> Mapping[str, Any]:
        python = {"python": platform.python_version()}
        if self._listen is None:
            return {**machine_facts(), "versions": python, "browser": browser_version(find_browser())}
        server, _ = self._connect()
        page = server.page or {}
        agent, memory, cores = str(page.get("agent", "")), page.get("memory_gib"), page.get("cores")
        return {
            "system": str(page.get("platform") or "unknown system"), "release": None, "machine": "wasm32",
            "cpu": None, "cpu_flags": [], "cores_physical": None, "cores_logical": cores, "cores_usable": cores,
            "memory_bytes": int(memory * 2**30) if isinstance(memory, (int, float)) else None,
            "governor": None, "governor_reason": "a page can't see it", "versions": python,
            "browser": browser_name(agent), "user_agent": agent[:300],
        }  # fmt: skip

    def close(self) -> None:
        """End the page and stop listening."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WebWorker(WorkerClient):
    """A worker in a page of ``server``; ``browser`` is ended with it when it was started for it. A context manager.

    ``timeout`` is in seconds for each request. A page that is closed, a browser that dies and a request that takes too
    long are :class:`WorkerError`.
    """

    def __init__(
        self,
        server: PageServer,
        browser: Browser | None,
        launch: Launch,
        options: SessionOptions,
        *,
        timeout: float = 600,
        cold: bool = False,
    ) -> None:
        self.name = launch.artifact.path.name
        self.timeout = timeout
        self.exchange = Exchange(launch.exchange, "c")
        self._server, self._browser, self._launch = server, browser, launch
        self._sent = 0
        self._closed = False
        self._number = server.add(launch)
        try:
            self._start(self.name, options, cold=cold)
        except BaseException:
            self.kill()
            raise
        known = self._info.capabilities
        self._info = dataclasses.replace(self._info, capabilities=(*known[:-1], "score", *known[-1:]))

    def info(self) -> SessionInfo:
        """Who runs this; ``score`` is among the capabilities because this side reduces what the browser computes."""
        return self._info

    def request(self, op: str, /, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply, ``timeout`` seconds at most; then the worker is ended."""
        self._sent += 1
        reply = self.exchange_line(pack({"id": self._sent, "op": op, "timeout_s": self.timeout, **fields}), op)
        if reply.get("id") != self._sent:
            self.kill()
            text = f"the worker of {self.name} answered request {reply.get('id')!r} instead of {self._sent}"
            raise WorkerError(text, hint="see docs/worker-protocol.md")
        if reply.get("ok") is not True:
            raise rebuild_error(reply.get("error"))
        result = reply.get("result")
        return result if isinstance(result, dict) else {}

    def exchange_line(self, line: bytes, what: str) -> dict[str, Any]:
        """Send one line, whatever it is, and give back the reply to it."""
        if self._closed:
            raise WorkerError(f"the worker of {self.name} is closed", hint="start another")
        self._launch.requests.put(line)
        deadline = time.monotonic() + self.timeout
        try:
            while True:
                try:
                    return unpack(self._launch.replies.get(timeout=_STEP_SECONDS))
                except queue.Empty:
                    self._look(what)
                    if time.monotonic() > deadline:
                        text = f"the worker of {self.name} did not answer {what} within {self.timeout:g} s"
                        raise WorkerError(f"{text} and was ended", hint="raise timeout") from None
        except (WorkerError, KeyboardInterrupt):
            self.kill()
            raise

    def _look(self, what: str) -> None:
        """Raise :class:`WorkerError` when no answer can come any more."""
        if self._browser is not None and (status := self._browser.status()) is not None:
            raise _dead(self._browser, status, f"during {what} of {self.name}")
        if self._launch.failure is not None:
            raise WorkerError(f"the worker of {self.name} failed in the browser during {what}: {self._launch.failure}",
                              hint="the browser must know module workers and WebAssembly SIMD: update it")  # fmt: skip
        if self._launch.ended:
            raise WorkerError(f"the page was loaded anew during {what} of {self.name}", hint=_CLOSED)
        if self._server.gone_seconds > _GONE_SECONDS:
            raise WorkerError(f"the page was closed, or fell asleep, during {what} of {self.name}", hint=_CLOSED)

    def score(self, reference: Path, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
        """:func:`edgestill.runtimes.scoring.score` on this side, of what the browser computes; ``reference`` is a
        folder of this machine."""
        # As far as scoring asks (info, forward), a client is a session.
        return scoring.score(cast(Session, self), reference, batch_size=batch_size)

    def kill(self) -> None:
        """End the worker at once, with its browser when it has one of its own, and remove the exchange folder."""
        if self._closed:
            return
        self._closed = True
        self._server.end(self._number)
        if self._browser is not None:
            self._browser.close()
            self._server.stop()
        shutil.rmtree(self.exchange.folder, ignore_errors=True)

    def close(self) -> None:
        """Ask the worker to free its model, then end it."""
        if not self._closed:
            self.timeout = min(self.timeout, _CLOSE_SECONDS)
            with contextlib.suppress(WorkerError):  # it is ended in any case
                self.request("close")
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _say_nothing(message: str) -> None:
    """Nobody listens."""


def _await_page(server: PageServer, browser: Browser | None, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not server.connected.wait(_STEP_SECONDS):
        if browser is not None and (status := browser.status()) is not None:
            raise _dead(browser, status, "before it showed the page")
        if time.monotonic() > deadline:
            if browser is None:
                text = f"no browser opened {server.address} within {seconds:g} s"
                raise WorkerError(text, hint="are both in one network, and does a firewall let the port through?")
            words = browser.last_words()
            raise WorkerError(f"the browser did not show the page within {seconds:g} s: {words}", hint="try again")


def _dead(browser: Browser, status: int, when: str) -> WorkerError:
    words = browser.last_words()
    how = f"died of signal {-status}" if status < 0 else f"ended with status {status}"
    text = f"the browser {how} {when}" + (f"; last line: {words}" if words else "")
    return WorkerError(text, hint="the system may have run out of memory, or the browser can't run here at all")


def _parse(address: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise UsageError(f"target web:{address}", hint="web (headless Chromium here) or web:0.0.0.0:8000 (any browser)")
    return found[1].strip("[]"), int(found[2])
