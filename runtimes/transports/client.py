"""The client's side of the worker protocol: one method an operation, whatever carries the messages."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import Unsupported, WorkerError
from ..profiling import Phase, Profile, Row
from ..protocol import PROTOCOL_VERSION, Exchange
from ..session import DecodedToken, SessionInfo, SessionOptions

__all__ = ["WorkerClient"]


class WorkerClient(abc.ABC):
    """A worker with an open model. A transport gives :meth:`request` and an ``exchange`` folder, then calls
    :meth:`_start`.

    ``load_seconds`` is from the start of loading until ready; the check of hashes and the runtime's import come before
    (``prepare_seconds``). ``cold_load_seconds`` is the same number when the page cache was really evicted before, else
    ``None`` with a ``cold_reason``. ``stable``: the warm-up before the last timings ended steady (else at its bound).
    """

    exchange: Exchange
    capabilities: Mapping[str, Any]
    load_seconds: float
    prepare_seconds: float
    cold_load_seconds: float | None
    cold_reason: str | None
    stable: bool = True
    _info: SessionInfo

    @abc.abstractmethod
    def request(self, op: str, /, **fields: Any) -> dict[str, Any]:
        """Send one request and return the ``result`` of its reply; errors of the worker are raised as they were."""

    def _start(self, folder: str, options: SessionOptions, *, cold: bool) -> None:
        """Shake hands and open ``folder`` (a path of the worker's machine)."""
        hello = self.request("hello", protocol=PROTOCOL_VERSION, exchange=str(self.exchange.folder))
        if hello.get("protocol") != PROTOCOL_VERSION:
            raise WorkerError(
                f"the worker speaks protocol {hello.get('protocol')!r}, this edgestill {PROTOCOL_VERSION}",
                hint="use the same edgestill on both sides",
            )
        self.capabilities = hello
        chosen = {"threads": options.threads, "backend": options.backend, "extra": dict(options.extra)}
        opened = self.request("open", folder=folder, options=chosen, cold=cold)
        try:
            self._info = _info(opened["info"])
            self.load_seconds = float(opened["load_seconds"])
            self.prepare_seconds = float(opened["prepare_seconds"])
            eviction = opened.get("cold")
            self.cold_load_seconds = self.load_seconds if eviction and eviction["worked"] else None
            self.cold_reason = eviction["reason"] if eviction else "the page cache was not evicted"
        except (KeyError, TypeError, ValueError) as error:
            raise _broken("open", error) from None

    def info(self) -> SessionInfo:
        """Who runs this, as it said when it opened."""
        return self._info

    def forward(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """:meth:`edgestill.runtimes.session.Session.forward` on the worker."""
        sent = self.request("forward", ids=self._put(ids), mask=self._put(mask))
        return self.exchange.take(sent.get("output"))

    def decode(self, prompt_ids: Sequence[int], n: int, logits: bool = False) -> list[DecodedToken]:
        """:meth:`edgestill.runtimes.session.Session.decode` on the worker, all ``n`` tokens at once."""
        prompt = [int(token) for token in prompt_ids]
        result = self.request("decode", prompt_ids=prompt, max_new_tokens=n, logits=logits)
        rows = self.exchange.take(result.get("logits")) if logits else [None] * n
        try:
            pairs = zip(result["ids"], result["seconds"], rows, strict=True)
            return [DecodedToken(int(token), float(seconds), row) for token, seconds, row in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise _broken("decode", error) from None

    def score(self, reference: Path, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
        """:func:`edgestill.runtimes.scoring.score` on the worker, which sees the folder ``reference``."""
        result = self.request("score", reference=str(reference.absolute()), batch_size=batch_size)
        return {name: self.exchange.take(array) for name, array in dict(result.get("arrays", {})).items()}

    def time_forward(
        self,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        *,
        repeats: int,
        warmup: int = 3,
        max_seconds: float = 10.0,
    ) -> list[float]:
        """Seconds of each timed forward pass: :func:`edgestill.runtimes.timing.time_forward` on the worker."""
        bounds = {"repeats": repeats, "warmup": warmup, "max_seconds": max_seconds}
        timed = self.request("time_forward", ids=self._put(ids), mask=self._put(mask), **bounds)
        self.stable = timed.get("stable") is not False
        return [float(seconds) for seconds in timed.get("samples", ())]

    def time_decode(
        self,
        prompt_ids: Sequence[int],
        new_tokens: int,
        *,
        repeats: int,
        warmup: int = 1,
        max_seconds: float = 10.0,
    ) -> list[dict[str, Any]]:
        """``{"first_s", "tokens_s"}`` of each timed generation: :func:`edgestill.runtimes.timing.time_decode`."""
        bounds = {"repeats": repeats, "warmup": warmup, "max_seconds": max_seconds}
        prompt = [int(token) for token in prompt_ids]
        timed = self.request("time_decode", prompt_ids=prompt, max_new_tokens=new_tokens, **bounds)
        self.stable = timed.get("stable") is not False
        return list(timed.get("samples", ()))

    def memory(self) -> dict[str, Any]:
        """Bytes: ``baseline_anonymous`` (runtime imported, nothing loaded), ``load_anonymous`` and ``run_anonymous``
        (highest while loading and while running), ``peak_anonymous``, ``peak_file_backed``, ``peak_rss`` (highest of
        both phases) and more, see docs/worker-protocol.md; ``None`` with a ``reason`` where the system doesn't tell.
        """
        return self.request("memory")

    def facts(self) -> dict[str, Any] | None:
        """The worker's machine, in the keys of :func:`edgestill.runtimes.machine.machine_facts`; ``None`` from a worker
        that does not tell."""
        return self._optional("facts")

    def sensors(self) -> dict[str, Any] | None:
        """One reading of :func:`edgestill.runtimes.sensors.read_sensors`; ``None`` from a worker that has no such
        operation."""
        return self._optional("sensors")

    def profile(
        self,
        ids: npt.NDArray[np.int64] | None = None,
        mask: npt.NDArray[np.int64] | None = None,
        *,
        prompt_ids: Sequence[int] = (),
        new_tokens: int = 0,
        repeats: int = 3,
    ) -> Profile:
        """Time by operator, of forward passes over ``ids`` and ``mask`` or of generations:
        :func:`edgestill.runtimes.profiling.profile_session` on the worker. Never mix its times with speeds.

        :class:`Unsupported` from a worker without that operation.
        """
        if "profile" not in self.capabilities.get("operations", ()):
            raise Unsupported(f"{self.capabilities.get('worker', 'this worker')} does not profile", hint="bench it")
        fields: dict[str, Any] = {"prompt_ids": [int(token) for token in prompt_ids], "max_new_tokens": new_tokens}
        if ids is not None:
            fields = {"ids": self._put(ids), "mask": self._put(np.ones_like(ids) if mask is None else mask)}
        raw = self.request("profile", repeats=repeats, **fields)
        try:
            phases = [Phase(**{**phase, "rows": [Row(**row) for row in phase["rows"]]}) for phase in raw["phases"]]
            return Profile(**{**raw, "phases": phases})
        except (KeyError, TypeError) as error:
            raise _broken("profile", error) from None

    def _optional(self, op: str) -> dict[str, Any] | None:
        return self.request(op) if op in self.capabilities.get("operations", ()) else None

    def _put(self, array: npt.ArrayLike) -> dict[str, Any]:
        return self.exchange.put(np.asarray(array, np.int64))


def _info(raw: Mapping[str, Any]) -> SessionInfo:
    return SessionInfo(**{**raw, "capabilities": tuple(raw["capabilities"])})


def _broken(op: str, error: Exception) -> WorkerError:
    return WorkerError(f"the worker's reply to {op} is incomplete: {error!r}", hint="see docs/worker-protocol.md")
