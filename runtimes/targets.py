"""Where a worker runs: this machine, a board over ssh, a phone over adb, an emulated core, a browser.

A target is named by one word, ``SCHEME`` or ``SCHEME:ADDRESS`` (``host``, ``qemu:cortex-a76``, ``ssh://pi@board``).
Each scheme is a file of :mod:`edgestill.runtimes.transports`, imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from ..errors import UsageError, nearest
from .session import SessionOptions
from .transports.client import WorkerClient

__all__ = ["SCHEMES", "Scheme", "Source", "Target", "TargetName", "open_target", "parse_target"]

Source = Literal["measured", "emulated", "predicted"]


@dataclass(frozen=True)
class TargetName:
    """A target as typed: ``scheme`` and what follows it (``""`` where nothing does)."""

    scheme: str
    address: str = ""

    def __str__(self) -> str:
        if self.scheme == "ssh":
            return f"ssh://{self.address}"
        return f"{self.scheme}:{self.address}" if self.address else self.scheme


@runtime_checkable
class Target(Protocol):
    """A place that runs workers. A context manager: what it opened once for all workers ends with it.

    ``source`` says what a number taken there is: ``measured`` on real hardware, or ``emulated``.
    """

    name: str
    source: Source

    def open_worker(
        self, folder: Path, options: SessionOptions, *, cold: bool = False
    ) -> AbstractContextManager[WorkerClient]:
        """Start a worker there that opens ``folder`` of this machine (``cold``: page cache evicted first)."""
        ...

    def facts(self) -> Mapping[str, Any] | None:
        """The machine, with the keys of :func:`edgestill.bench.environment.describe_environment`; ``None``: this
        one."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Scheme:
    """How a kind of target is typed (``form``), the origin of its numbers, and where its class is.

    ``opens`` is ``module:class`` below :mod:`edgestill.runtimes.transports`, called with the address; ``""`` for a
    kind that runs no worker.
    """

    form: str
    source: Source
    description: str
    opens: str = ""


SCHEMES: Mapping[str, Scheme] = {
    "host": Scheme("host", "measured", "this machine", "local:HostTarget"),
    "ssh": Scheme("ssh://USER@BOARD:PORT/FOLDER", "measured", "a board, through OpenSSH", "ssh:SshTarget"),
    "adb": Scheme("adb:SERIAL", "measured", "an Android phone, with the native runner", "adb:AdbTarget"),
    "profile": Scheme("profile:NAME", "predicted", "a documented device, by calculation"),
    "qemu": Scheme("qemu:CORE", "emulated", "an emulated core: outputs, instruction counts", "qemu:QemuTarget"),
    "web": Scheme(
        "web[:HOST:PORT]",
        "measured",
        "headless Chromium here, or any browser that opens the page",
        "web.target:WebTarget",
    ),
}


def parse_target(text: str) -> TargetName:
    """``text`` taken apart; :class:`UsageError` for a scheme that nobody knows.

    >>> parse_target("host"), parse_target(" host ") == parse_target("host")
    (TargetName(scheme='host', address=''), True)
    """
    scheme, _, address = text.strip().partition(":")
    if scheme not in SCHEMES:
        hint = f"{nearest(scheme, list(SCHEMES))}; `edgestill devices list` shows how each is written"
        raise UsageError(f"unknown target {text!r}", hint=hint)
    return TargetName(scheme, address.removeprefix("//") if scheme == "ssh" else address)


def open_target(text: str) -> Target:
    """The target that ``text`` names; :class:`UsageError` when it is unknown or runs no worker."""
    name = parse_target(text)
    kind = SCHEMES[name.scheme]
    if not kind.opens:
        raise UsageError(f"{name} runs nothing", hint=f"{kind.form}: {kind.description}")
    module, _, attribute = kind.opens.partition(":")
    found = importlib.import_module(f".transports.{module}", __package__)
    target: Target = getattr(found, attribute)(name.address)
    return target
