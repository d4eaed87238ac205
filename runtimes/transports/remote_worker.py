"""A worker on a device: the worker protocol through a remote shell's standard streams.

Messages pass through the link; tensors are files of an exchange folder on the device, sent before the request that
names them and fetched after the reply that does (their hashes are checked by whoever reads them). Nothing that is timed
waits for the link: the worker takes the times.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EdgestillError, WorkerError
from ...files import list_files
from ..protocol import PROTOCOL_VERSION
from ..sensors import FIELDS
from ..session import SessionOptions
from ..worker import thread_environment
from .load import UNKNOWN, LoadMeter, load_between
from .local import LocalWorker
from .shell import RemoteShell, quote, split_status, with_status
from .store import DeviceStore, LocalFile

__all__ = ["RemoteWorker", "sweep"]

_NOEXEC, _NOT_FOUND = 126, 127


class RemoteWorker(LocalWorker):
    """:class:`LocalWorker` whose process runs a worker on a device.

    ``folder`` is the artifact's folder there (``None``: open nothing, only shake hands). ``exchange`` is the folder for
    tensors there, made and removed with the worker. ``meter`` reads the device's load; ``machine_load`` is
    what others used of the device until :meth:`close`. ``launch_facts`` is what is worth recording of this launch.
    ``outside`` reads sensors that the worker itself can't (Android's services), to fill what it leaves open.
    """

    def __init__(
        self,
        shell: RemoteShell,
        store: DeviceStore,
        name: str,
        folder: str | None,
        options: SessionOptions,
        *,
        exchange: str,
        command: str,
        cold: bool = False,
        timeout: float = 600,
        meter: LoadMeter,
        outside: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self._shell = shell
        self._store = store
        self._folder_there = folder
        self._there = exchange
        self._meter = meter
        self._outside = outside
        self.machine_load: dict[str, Any] = dict(UNKNOWN)
        self.launch_facts: dict[str, Any] = {}
        shell.connect()
        self._before = shell.steady(meter.read)
        script = _script(f"{command} --threads {options.threads}", exchange, options.threads)
        super().__init__(Path(name), options, timeout=timeout, cold=cold, command=shell.argv(with_status(script)))

    def _start(self, folder: str, options: SessionOptions, *, cold: bool) -> None:
        if self._folder_there is not None:
            super()._start(self._folder_there, options, cold=cold)
            return
        self.capabilities = self.request("hello", protocol=PROTOCOL_VERSION, exchange=self._there)

    def request(self, op: str, /, **fields: Any) -> dict[str, Any]:
        """See :class:`LocalWorker`; tensors of the request are sent first, those of the reply fetched."""
        if op == "hello":
            fields["exchange"] = self._there
        here = self.exchange.folder
        if sent := [here / str(one["file"]) for one in _tensors(fields)]:
            with self._killing():
                self._shell.put(sent, self._there)
            for file in sent:
                file.unlink()
        result = super().request(op, **fields)
        if names := [Path(str(one["file"])).name for one in _tensors(result)]:
            with self._killing():
                self._shell.get(names, self._there, here)
        return result

    @contextlib.contextmanager
    def _killing(self) -> Iterator[None]:
        """A tensor that does not pass ends the worker."""
        try:
            yield
        except (EdgestillError, KeyboardInterrupt):
            self.kill()
            raise

    def score(self, reference: Path, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
        """:func:`edgestill.runtimes.scoring.score` on the device; ``reference`` is sent if it is missing."""
        files = {str(path): LocalFile.of(reference / path) for path in list_files(reference)}
        result = self.request("score", reference=self._store.tree(files), batch_size=batch_size)
        return {name: np.asarray(self.exchange.take(array)) for name, array in dict(result.get("arrays", {})).items()}

    def sensors(self) -> dict[str, Any] | None:
        """See :class:`LocalWorker`; what the worker can't read is asked of the system around it."""
        told, more = super().sensors(), self._outside()
        if not told or not more:
            return told or (dict(more) if more else None)
        filled = {name: more[name] for name in FIELDS if told.get(name) is None and more.get(name) is not None}
        reasons = {name: why for name, why in told["reasons"].items() if name not in filled}
        return {**told, **filled, "reasons": reasons}

    def close(self) -> None:
        """See :class:`LocalWorker`; before, the load of the device meanwhile is read."""
        if self._cleanup.alive:
            with contextlib.suppress(EdgestillError):  # a launch that ended well needs no more of the link
                self.machine_load = load_between(self._before, self._meter.read())
        super().close()

    @property
    def alive(self) -> bool:
        """Whether this side still holds it."""
        return self._cleanup.alive

    def _died(self, op: str) -> WorkerError:
        code = self._process.wait(5)
        status = split_status(super()._stderr_tail())[1]
        if status is None:
            said = self.last_words()
            return self._shell.lost(said[-1] if said else f"status {code} during {op}")
        if status == _NOEXEC:
            return self._error("may not be executed there", "choose a folder on a file system without noexec")
        if status == _NOT_FOUND:
            return self._error("could not be started", "is the Python that was named there?")
        if status <= 128:
            return self._error(f"ended with status {status} during {op}", "the last lines say why")
        name = _signal_name(status - 128)
        if name == "SIGILL":
            return self._error(
                f"died of SIGILL during {op}: this processor lacks an instruction that it was built with",
                "use a build for this processor (native runner: edgestill devices build-runner)",
            )
        killed = "the device may have run out of memory: use a smaller model, batch or length"
        return self._error(f"died of {name} during {op}", killed if name == "SIGKILL" else "the last lines say why")

    def _stderr_tail(self) -> str:
        return split_status(super()._stderr_tail())[0]


def _script(command: str, exchange: str, threads: int) -> str:
    """The worker as a child of the script, which tells its status and removes the exchange folder after it.

    Its process id stands in the exchange folder, so that a worker whose link broke can be found and ended. Descriptor
    3: a shell gives a child in the background no standard input of its own accord.
    """
    variables = {**thread_environment(threads), "TOKENIZERS_PARALLELISM": "false"}
    setting = " ".join(f"{name}={value}" for name, value in variables.items())
    folder = quote(exchange)
    return (
        f"umask 077; mkdir -p {folder} && cd {folder} || exit 1\n"
        f"exec 3<&0\n{setting} {command} <&3 3<&- &\np=$!; echo $p > pid; exec 3<&- </dev/null\n"
        f"wait $p; s=$?; cd /; rm -rf {folder}; exit $s"
    )


def sweep(shell: RemoteShell, root: str, lost: Sequence[str]) -> None:
    """End the workers of the ``lost`` exchange folders, whose link broke while they ran, and remove what workers that
    are gone left."""
    mine = " ".join(quote(path) for path in lost) or "''"
    shell.check(
        f'for d in {quote(root)}/exchange/*/; do d=${{d%/}}; [ -d "$d" ] || continue\n'
        '  p=$(cat "$d/pid" 2>/dev/null); gone=1\n'
        '  if [ -n "$p" ] && tr "\\000" " " < /proc/$p/cmdline 2>/dev/null | '
        f"grep -q -F {quote(root + '/')}; then gone=; fi\n"
        f'  for l in {mine}; do if [ "$l" = "$d" ]; then [ -n "$gone" ] || kill -9 "$p"; gone=1; fi; done\n'
        '  [ -z "$gone" ] || rm -rf "$d"\ndone; true',
        "sweeping up",
    )


def _tensors(value: Any) -> Iterator[Mapping[str, Any]]:
    """References to tensor files anywhere in a message."""
    if isinstance(value, Mapping):
        if {"file", "dtype", "shape", "sha256"} <= set(value):
            yield value
            return
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
