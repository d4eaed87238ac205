"""A headless Chromium of this machine: found, started with an empty profile, ended with all that belongs to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ....errors import MissingDependency, WorkerError
from ....files import is_alive

__all__ = ["BROWSER_VARIABLE", "Browser", "browser_name", "browser_version", "find_browser", "private_folder"]

BROWSER_VARIABLE = "EDGESTILL_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "microsoft-edge")
_MAC = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--metrics-recording-only", "--no-proxy-server", "--mute-audio",
    # One renderer, so that it is clear whose memory is looked at; never slowed down for being out of sight.
    "--disable-features=SpareRendererForSitePerProcess,Translate", "--disable-renderer-backgrounding",
    "--disable-background-timer-throttling",
)  # fmt: skip
# The youngest first: each also names those that it descends from.
_AGENTS = {
    "Edge": "(?:Edg|EdgA|EdgiOS)", "Opera": "OPR", "Samsung Internet": "SamsungBrowser",
    "Firefox": "(?:Firefox|FxiOS)", "HeadlessChrome": "HeadlessChrome", "Chrome": "(?:Chrome|CriOS)",
    "Safari": "Version",
}  # fmt: skip
_SMALL_SHARED_MEMORY = 256 << 20
_PREFIX = "edgestill-"
_TAIL_BYTES = 4096
_CLOSE_SECONDS = 5.0


def find_browser() -> Path:
    """``$EDGESTILL_BROWSER``, else the first Chromium or Chrome of this machine; :class:`MissingDependency`."""
    if own := os.environ.get(BROWSER_VARIABLE):
        if found := shutil.which(own):
            return Path(found)
        raise MissingDependency(f"{BROWSER_VARIABLE} is {own}, which can't be run", hint="name a Chromium or Chrome")
    candidates = [shutil.which(name) for name in _NAMES] + [path for path in _MAC if Path(path).exists()]
    for candidate in candidates:
        if candidate:
            return Path(candidate)
    raise MissingDependency(
        "no Chromium on this machine (needed for target web)",
        hint="apt install chromium, or open the page yourself with target web:127.0.0.1:8000",
    )


def browser_version(browser: Path) -> str:
    """What the browser calls itself, ``"Chromium 150.0.7871.100"``."""
    try:
        said = subprocess.run([browser, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkerError(f"{browser} does not start: {error}", hint="run it by hand to see more") from None
    lines = said.stdout.strip().splitlines()
    words = lines[-1].split(" built on")[0].strip() if lines else ""
    return words or browser.name


def browser_name(agent: str) -> str:
    """What a user agent string (which names all its ancestors too) says that it is.

    >>> browser_name("Mozilla/5.0 (Linux; Android 14) AppleWebKit/537.36 Chrome/150.0.0.0 Mobile Safari/537.36")
    'Chrome 150.0.0.0'
    """
    for name, token in _AGENTS.items():
        if found := re.search(rf"{token}/([\d.]+)", agent):
            return f"{name} {found[1]}"
    return "unknown browser"


class Browser:
    """A running browser that shows ``address``, as a process group of its own with a profile that is thrown away;
    ``more`` are further options of its command line."""

    def __init__(self, executable: Path, address: str, more: Sequence[str] = ()) -> None:
        self._profile = private_folder(Path(tempfile.gettempdir()))
        self._stderr: IO[bytes] = (self._profile / "stderr").open("w+b")
        flags = [*_FLAGS, *more, f"--user-data-dir={self._profile / 'profile'}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to be root with it
        if _shared_memory_is_small():
            flags.append("--disable-dev-shm-usage")
        try:
            self._process = subprocess.Popen(
                [str(executable), *flags, address],
                stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr, start_new_session=True,
                env={**os.environ, "HOME": str(self._profile)},
            )  # fmt: skip
        except OSError as error:
            self._stderr.close()
            shutil.rmtree(self._profile, ignore_errors=True)
            raise WorkerError(f"can't start {executable}: {error.strerror}", hint="check the path") from None
        self._end = weakref.finalize(self, _end, self._process, self._stderr, self._profile)

    @property
    def pid(self) -> int:
        """The process that was started, the parent (or its parent) of all others."""
        return self._process.pid

    def status(self) -> int | None:
        """Exit status (negative: signal) of a browser that has ended by itself, else ``None``."""
        return self._process.poll() if self._end.alive else 0

    def last_words(self) -> str:
        """The last line that it wrote that says something."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._stderr.fileno()).st_size
            text = os.pread(self._stderr.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
            return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        return ""

    def close(self) -> None:
        """End it and remove its profile."""
        self._end()


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes], profile: Path) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_CLOSE_SECONDS)
    stderr.close()
    shutil.rmtree(profile, ignore_errors=True)


def private_folder(root: Path) -> Path:
    """A new folder of this process in ``root``; those of processes that no longer exist are removed first."""
    for stale in root.glob(f"{_PREFIX}[0-9]*-*"):
        owner = stale.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not is_alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def _shared_memory_is_small() -> bool:
    """Containers often have 64 MiB of it, which a browser outgrows."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return True
    return stats.f_bavail * stats.f_frsize < _SMALL_SHARED_MEMORY
