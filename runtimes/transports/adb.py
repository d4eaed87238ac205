"""An Android phone over adb: ``adb:SERIAL``, through the system's adb client.

A phone has no Python and lets nobody but its shell user in, so what runs there is the native runner, below
``/data/local/tmp/edgestill``: GGUF on the CPU, and ONNX with a ``libonnxruntime.so`` that the user gives. A phone that
is hot clocks down without saying so; each launch waits until it is cool (:mod:`.cooling`), and the record says how long
that took and how warm it was.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...artifact import Artifact
from ...errors import BadInput, LinkLost, Unsupported, UsageError, WorkerError
from .cooling import Limits, read_thermal, wait_until_cool
from .options import parse_query
from .remote import RemoteTarget, Settings
from .shell import Ran, RemoteShell, quote

__all__ = ["AdbShell", "AdbTarget"]

DEFAULT_FOLDER = "/data/local/tmp/edgestill"
RECONNECT_SECONDS = 60.0
_FORM = "adb:SERIAL, as `adb devices` shows it"
_STATE_SECONDS = 20.0


class AdbShell(RemoteShell):
    """:class:`RemoteShell` through ``adb -s SERIAL shell``. adb's own server keeps the connection."""

    def __init__(self, serial: str) -> None:
        self.name = f"phone {serial}"
        self._serial = serial
        self._up = False

    def argv(self, script: str) -> list[str]:
        """See :class:`RemoteShell`. ``-T``: no terminal, which would change line ends."""
        return ["adb", "-s", self._serial, "shell", "-T", script]

    def connect(self) -> None:
        """See :class:`RemoteShell`: the phone is there, its shell answers, and it trusts this machine."""
        deadline = time.monotonic() + (RECONNECT_SECONDS if self.connections else 0)
        while not self._up:
            said = self._state()
            if said == "device":
                self._up = True
                self.connections += 1
            elif "unauthorized" in said:
                raise BadInput(f"{self.name} does not trust this machine", hint="unlock it and allow USB debugging")
            elif "no permissions" in said:
                raise BadInput(f"{self.name}: {said}", hint="udev rules: apt install android-sdk-platform-tools-common")
            elif time.monotonic() >= deadline:
                raise WorkerError(f"{self.name} can't be reached: {said}", hint="adb devices shows what is there")
            else:
                time.sleep(1.0)

    def send(self, source: Path, there: str, offset: int) -> None:
        """See :class:`RemoteShell`. ``adb push`` always sends all of a file."""
        if offset:
            self.run(f"rm -f {quote(there)}")
        self._adb(["push", str(source.absolute()), there], f"sending {source.name}")

    def put(self, files: Sequence[Path], folder: str) -> None:
        """See :class:`RemoteShell`."""
        self._adb(["push", *(str(file.absolute()) for file in files), f"{folder}/"], "sending tensors")

    def get(self, names: Sequence[str], folder: str, here: Path) -> None:
        """See :class:`RemoteShell`."""
        paths = [f"{folder}/{name}" for name in names]
        self._adb(["pull", *paths, f"{here}/"], "fetching tensors")
        self.run(f"rm -f {' '.join(map(quote, paths))}")

    def lost(self, reason: str) -> LinkLost:
        """See :class:`RemoteShell`; the phone is looked for again."""
        self._up = False
        return super().lost(reason)

    def close(self) -> None:
        """Nothing to end: adb's server serves others too."""

    def _state(self) -> str:
        code, said = self._client(["get-state"], _STATE_SECONDS)
        return said.strip().splitlines()[-1].removeprefix("error: ") if said.strip() else f"status {code}"

    def _adb(self, arguments: list[str], what: str) -> None:
        """A transfer: adb tells on standard error and in its status why it failed."""
        code, said = self._client(arguments, None)
        if code == 0:
            return
        line = said.strip().splitlines()[-1] if said.strip() else f"status {code}"
        if re.search(r"no space left", said, re.IGNORECASE) or not re.search(
            r"no devices|not found|offline|closed|protocol fault|connection reset", said, re.IGNORECASE
        ):
            raise self.failed(what, Ran(code, b"", line))
        raise self.lost(line)

    def _client(self, arguments: list[str], seconds: float | None) -> tuple[int, str]:
        command = ["adb", "-s", self._serial, *arguments]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                timeout=seconds,
            )  # fmt: skip
        except FileNotFoundError:
            raise self._no_client() from None
        except subprocess.TimeoutExpired:
            raise self.lost(f"adb {arguments[0]} did not answer within {seconds:g} s") from None
        return done.returncode, done.stdout.decode(errors="replace")


class AdbTarget(RemoteTarget):
    """``adb:SERIAL`` as a :class:`edgestill.runtimes.targets.Target`; numbers from it are measured.

    Options behind ``?``: ``dir`` (the folder on the phone), ``onnxruntime`` (a library of this machine, for ONNX),
    ``battery_c``, ``status`` and ``wait_s`` (see :class:`.cooling.Limits`).
    """

    def __init__(self, address: str) -> None:
        serial, _, query = address.partition("?")
        if not re.fullmatch(r"[\w.:\[\]%-]+", serial) or serial.startswith("-"):
            raise UsageError(f"not a phone's serial number: {serial!r}", hint=_FORM)
        chosen = parse_query(query, ("dir", "onnxruntime", "battery_c", "status", "wait_s"), f"adb:{serial}")
        try:
            defaults = Limits()
            self._limits = Limits(
                float(chosen.get("battery_c", defaults.battery_c)), int(chosen.get("status", defaults.status)),
                float(chosen.get("wait_s", defaults.wait_s)),
            )  # fmt: skip
        except ValueError:
            raise UsageError(
                f"adb:{address}: a limit is not a number", hint="battery_c=38&status=0&wait_s=600"
            ) from None
        settings = Settings(
            chosen.get("dir", DEFAULT_FOLDER), python=None, runner="native", onnxruntime=chosen.get("onnxruntime")
        )
        super().__init__(f"adb:{address}", AdbShell(serial), settings)

    def before_launch(self) -> dict[str, Any]:
        """Wait until the phone is cool; ``cooling`` for the record. :class:`WorkerError` when it stays warm."""
        return {"cooling": wait_until_cool(self.shell, self._limits)}

    def read_sensors(self) -> Mapping[str, Any]:
        """Battery and thermal status, which only Android's services tell."""
        return read_thermal(self.shell)

    def _choose(self, artifact: Artifact) -> tuple[str, str]:
        if artifact.manifest.format == "onnx" and not self.settings.onnxruntime:
            raise Unsupported(
                f"{self.shell.name}: ONNX over adb needs a libonnxruntime.so of yours, built for Android",
                hint="adb:SERIAL?onnxruntime=/path/to/libonnxruntime.so (jni/arm64-v8a of the package "
                "onnxruntime-android); or measure it in the phone's browser (target web)",
            )
        return super()._choose(artifact)
