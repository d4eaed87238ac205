"""What a worker does with each request: one opened model, its timings and its memory. Numpy only.

:mod:`edgestill.runtimes.worker` moves the messages; here is one method an operation. Speed, memory and accuracy are
meant to be taken in separate launches. The memory sampler runs in every operation that runs the model, timed ones too:
it costs about 60 microseconds in 10 milliseconds (figure ``harness_cpu``), and a peak that nobody saw would cost more.
"""

from __future__ import annotations

import dataclasses
import importlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..artifact import ARTIFACT_FILE, open_artifact
from ..errors import BadInput, MissingDependency, WorkerError
from . import memory, timing
from .machine import machine_facts
from .profiling import profile_session
from .protocol import OPERATIONS, PROTOCOL_VERSION, Exchange
from .scoring import score
from .sensors import read_sensors
from .session import Session, SessionInfo, SessionOptions, check_batch, check_prompt, open_session

__all__ = ["Prepare", "Service", "import_runtime", "prepare_session"]

# Everything that comes before loading (checks, imports); what it returns loads.
Prepare = Callable[[Path, SessionOptions], Callable[[], Session]]
Fields = Mapping[str, Any]

# Format -> (session module, runtime modules). They are imported before the memory baseline is taken, and outside the
# load time. A session module may have a function ``preload(folder)`` that imports more of what it will need.
_RUNTIMES = {
    "torch": ("torch_session", ("torch", "transformers")),
    "onnx": ("ort_session", ("onnxruntime",)),
    "gguf": ("llamacpp_session", ("llama_cpp",)),
    "coreml": ("coreml_session", ()),
}


def import_runtime(form: str, folder: Path) -> None:
    """Import what opening ``folder``, of format ``form``, needs, or :class:`MissingDependency`."""
    session, modules = _RUNTIMES[form]
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise MissingDependency.package(module, "distill" if form == "torch" else "runtimes") from None
    imported = importlib.import_module(f".{session}", __package__)
    preload = getattr(imported, "preload", None)
    if preload is not None:
        preload(folder)


def prepare_session(folder: Path, options: SessionOptions) -> Callable[[], Session]:
    """Check the artifact's hashes and import its runtime; the function that is returned loads it."""
    form = open_artifact(folder).manifest.format if (folder / ARTIFACT_FILE).exists() else "torch"
    import_runtime(form, folder)
    return lambda: open_session(folder, options, check=False)


class Service:
    """One worker's state. ``default`` is opened by an ``open`` without ``folder``."""

    def __init__(self, default: Path | None = None, *, prepare: Prepare = prepare_session) -> None:
        self.exchange: Exchange | None = None
        self._default = default
        self._prepare = prepare
        self._opened: tuple[Session, SessionInfo] | None = None
        self._loading = memory.PeakSampler()
        self._running = memory.PeakSampler()
        self._memory: dict[str, Any] = {}
        self._operations: dict[str, Callable[[Fields], dict[str, Any]]] = {
            "hello": self.hello,
            "open": self.open,
            "info": self.info,
            "forward": self.forward,
            "decode": self.decode,
            "score": self.score,
            "time_forward": self.time_forward,
            "time_decode": self.time_decode,
            "memory": self.memory,
            "facts": self.facts,
            "sensors": self.sensors,
            "profile": self.profile,
            "close": self.close,
        }

    def handle(self, request: Fields) -> dict[str, Any]:
        """Do what ``request["op"]`` says and return the ``result`` object of the reply; errors are raised."""
        name = request.get("op")
        if not isinstance(name, str) or name not in self._operations:
            raise WorkerError(f"unknown operation {name!r}", hint=f"known: {', '.join(OPERATIONS)}")
        return self._operations[name](request)

    def hello(self, request: Fields) -> dict[str, Any]:
        """Agree on the version, learn the exchange folder, say what this worker is and can."""
        version = _field(request, "protocol", int)
        if version != PROTOCOL_VERSION:
            raise WorkerError(
                f"the client speaks protocol {version}, this worker {PROTOCOL_VERSION}",
                hint="use the same edgestill on both sides",
            )
        folder = Path(_field(request, "exchange", str))
        if not folder.is_dir():
            raise BadInput(f"exchange folder {folder} does not exist", hint="make it before hello")
        self.exchange = Exchange(folder, "w")
        return {
            "protocol": PROTOCOL_VERSION,
            "worker": "edgestill-python",
            "version": __version__,
            "operations": list(OPERATIONS),
            "machine": platform.machine(),
            "system": sys.platform,
        }

    def open(self, request: Fields) -> dict[str, Any]:
        """Check the artifact's hashes, import its runtime, take the memory baseline, then load it and time that."""
        if self.exchange is None:
            raise WorkerError("open before hello", hint="shake hands first")
        if self._opened is not None:
            raise WorkerError("a model is open already", hint="one worker, one model: start another")
        folder = Path(_field(request, "folder", str)) if "folder" in request else self._default
        if folder is None:
            raise WorkerError("open without a folder", hint="name it in the message or on the command line")
        options = _options(request.get("options", {}))
        started = time.perf_counter()
        load = self._prepare(folder, options)
        prepare_seconds = time.perf_counter() - started
        eviction = memory.evict_page_cache(folder) if request.get("cold") else None
        baseline = memory.read_memory()
        resets = memory.reset_peak()
        with self._loading.sampling():
            started = time.perf_counter()
            session = load()
            load_seconds = time.perf_counter() - started
        self._memory = {
            "baseline_anonymous": baseline.anonymous,
            "baseline_file_backed": baseline.file_backed,
            "baseline_rss": baseline.rss,
            "loaded_anonymous": memory.read_memory().anonymous,
            "load_peak_rss": memory.peak_rss() if resets else None,
            "resets": resets,
        }
        memory.reset_peak()
        self._running.sample()
        self._opened = (session, session.info())
        return {
            "info": _info_fields(self._opened[1]),
            "load_seconds": load_seconds,
            "prepare_seconds": prepare_seconds,
            "cold": dataclasses.asdict(eviction) if eviction else None,
        }

    def info(self, request: Fields) -> dict[str, Any]:
        """The session's :class:`SessionInfo`."""
        return {"info": _info_fields(self._model()[1])}

    def forward(self, request: Fields) -> dict[str, Any]:
        """One forward pass; the output is checked to be float32 of the shape that the task has."""
        session, info = self._model()
        ids, mask = self._batch(request, info)
        with self._running.sampling():
            output = session.forward(ids, mask)
        _check_output(output, ids, info)
        return {"output": self._send(output)}

    def decode(self, request: Fields) -> dict[str, Any]:
        """Greedy decoding: ids, seconds a token and, on request, the logits ``[new_tokens, vocab]``."""
        session, info = self._model()
        prompt, count = _prompt(request, info)
        wanted = bool(request.get("logits", False))
        with self._running.sampling():
            tokens = list(session.decode(prompt, count, logits=wanted))
        return {
            "ids": [int(token.id) for token in tokens],
            "seconds": [float(token.seconds) for token in tokens],
            "logits": self._send(np.stack([token.logits for token in tokens])) if wanted else None,  # type: ignore[misc]
        }

    def score(self, request: Fields) -> dict[str, Any]:
        """Compare with a reference folder on this side: :func:`edgestill.runtimes.scoring.score`."""
        session, _ = self._model()
        folder = Path(_field(request, "reference", str))
        with self._running.sampling():
            arrays = score(session, folder, batch_size=int(request.get("batch_size", 8)))
        return {"arrays": {name: self._send(array) for name, array in arrays.items()}}

    def time_forward(self, request: Fields) -> dict[str, Any]:
        """Raw seconds of forward passes: :func:`edgestill.runtimes.timing.time_forward`."""
        session, info = self._model()
        ids, mask = self._batch(request, info)
        with self._running.sampling():
            timed = timing.time_forward(session, ids, mask, **_bounds(request))
        return dataclasses.asdict(timed)

    def time_decode(self, request: Fields) -> dict[str, Any]:
        """Raw seconds of generations: :func:`edgestill.runtimes.timing.time_decode`."""
        session, info = self._model()
        prompt, count = _prompt(request, info)
        with self._running.sampling():
            timed = timing.time_decode(session, prompt, count, **_bounds(request))
        return dataclasses.asdict(timed)

    def memory(self, request: Fields) -> dict[str, Any]:
        """Bytes, ``null`` with a ``reason`` where this system does not tell. See docs/worker-protocol.md."""
        self._model()
        load, run = self._loading, self._running
        facts = dict(self._memory)
        resets = facts.pop("resets")
        run_peak = memory.peak_rss()
        reason = None
        if run.anonymous is None:
            reason = f"{sys.platform} does not tell anonymous from file-backed memory"
        elif not resets:
            reason = "/proc/self/clear_refs can't be written: one peak_rss for loading and running"
        return facts | {
            "load_anonymous": load.anonymous,
            "run_anonymous": run.anonymous,
            "peak_anonymous": _highest(load.anonymous, run.anonymous),
            "peak_file_backed": _highest(load.file_backed, run.file_backed),
            "run_peak_rss": run_peak if resets else None,
            "peak_rss": _highest(facts["load_peak_rss"], run_peak),
            "samples": load.samples + run.samples,
            "reason": reason,
        }

    def facts(self, request: Fields) -> dict[str, Any]:
        """The machine: :func:`edgestill.runtimes.machine.machine_facts`. Needs no model."""
        return machine_facts()

    def sensors(self, request: Fields) -> dict[str, Any]:
        """One reading: :func:`edgestill.runtimes.sensors.read_sensors`. Needs no model."""
        return read_sensors()

    def profile(self, request: Fields) -> dict[str, Any]:
        """Time by operator: :func:`edgestill.runtimes.profiling.profile_session`."""
        session, info = self._model()
        given: dict[str, Any] = {"repeats": _field(request, "repeats", int)}
        if given["repeats"] < 1:
            raise BadInput(f"can't profile {given['repeats']} repeats", hint="at least 1")
        if "ids" in request:
            given["ids"], given["mask"] = self._batch(request, info)
        else:
            given["prompt_ids"], given["new_tokens"] = _prompt(request, info)
        return dataclasses.asdict(profile_session(session, **given))

    def close(self, request: Fields) -> dict[str, Any]:
        """Close the model; the worker ends after the reply."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].close()
        return {}

    def _model(self) -> tuple[Session, SessionInfo]:
        if self._opened is None:
            raise WorkerError("no model is open", hint="send open first")
        return self._opened

    def _send(self, array: Any) -> dict[str, Any]:
        assert self.exchange is not None  # open came after hello
        return self.exchange.put(array)

    def _batch(self, request: Fields, info: SessionInfo) -> tuple[Any, Any]:
        assert self.exchange is not None
        ids, mask = (self.exchange.take(_field(request, name, dict)) for name in ("ids", "mask"))
        check_batch(ids, mask, info)
        return ids, mask


def _field(request: Fields, name: str, kind: type) -> Any:
    value = request.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadInput(f"{request.get('op')}: {name} is {value!r}", hint=f"{name} must be of type {kind.__name__}")
    return value


def _options(raw: Any) -> SessionOptions:
    known = {field.name for field in dataclasses.fields(SessionOptions)}
    if not isinstance(raw, dict) or not set(raw) <= known:
        raise BadInput(f"open: options are {raw!r}", hint=f"known: {', '.join(sorted(known))}")
    options = SessionOptions(**raw)
    if not isinstance(options.threads, int) or options.threads < 1:
        raise BadInput(f"open: {options.threads!r} threads", hint="at least 1")
    return options


def _prompt(request: Fields, info: SessionInfo) -> tuple[list[int], int]:
    prompt, count = _field(request, "prompt_ids", list), _field(request, "max_new_tokens", int)
    if not all(isinstance(token, int) for token in prompt):
        raise BadInput(f"{request.get('op')}: prompt_ids are not all integers", hint="token ids")
    check_prompt(prompt, count, info)
    return prompt, count


def _bounds(request: Fields) -> dict[str, Any]:
    return {
        "repeats": _field(request, "repeats", int),
        "warmup": _field(request, "warmup", int),
        "max_seconds": float(_field(request, "max_seconds", (int, float))),  # type: ignore[arg-type]
    }


def _info_fields(info: SessionInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(info), "placement": dict(info.placement)}


def _check_output(output: Any, ids: Any, info: SessionInfo) -> None:
    """A runtime that breaks the session's contract is told from one that computes wrong numbers."""
    expected: tuple[int, ...] = (len(ids),)
    if info.task == "text-generation":
        expected = (*ids.shape, info.vocab_size)
    elif info.task == "token-classification" and output.ndim == 3:
        expected = (*ids.shape, output.shape[2])
    elif output.ndim == 2:
        expected = (len(ids), output.shape[1])
    if output.dtype != np.float32 or output.shape != expected:
        raise WorkerError(
            f"{info.runtime} gave {output.dtype} {list(output.shape)} instead of float32 {list(expected)}",
            hint="the session breaks its contract (runtimes/session.py)",
        )


def _highest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
