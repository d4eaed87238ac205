"""Core ML behind the session protocol: natively on macOS, elsewhere by our interpreter of the saved program.

Numpy and coremltools only. Both sessions feed the same inputs: one sequence at a time, at its true length; a decoder
gets ``input_ids`` and an additive ``causal_mask`` and keeps its KV cache in the program's states.
"""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import BadInput, Unsupported
from .mil.cost import CostRecorder
from .mil.interpreter import Interpreter, RangeRow
from .milproto import coremltools_version, enumerated_lengths, import_coremltools, load_program
from .payload_coreml import stored_bytes, stored_weights
from .session import DecodedToken, Floats, Ints, SessionInfo, SessionOptions, check_batch, check_prompt

__all__ = [
    "COMPUTE_UNITS", "HIDDEN", "MIL_BACKEND", "CoremlSession", "MilSession", "NativeCoreMLSession", "causal_mask",
    "open_coreml",
]  # fmt: skip

HIDDEN = -1e4
"""What is added to a score that must not count; finite, since −∞ times 0 is NaN in float16."""

MIL_BACKEND = "mil-interpreter"
COMPUTE_UNITS = ("ALL", "CPU_AND_GPU", "CPU_AND_NE", "CPU_ONLY")


def open_coreml(artifact: Artifact, options: SessionOptions) -> CoremlSession:
    """The session for this machine: :class:`NativeCoreMLSession` on macOS, else :class:`MilSession`.

    ``options.backend``: a compute unit of Core ML (``ALL``, ``CPU_ONLY``, ``CPU_AND_GPU``, ``CPU_AND_NE``), or
    ``mil-interpreter`` anywhere.
    """
    native = sys.platform == "darwin" and options.backend != MIL_BACKEND
    return NativeCoreMLSession(artifact, options) if native else MilSession(artifact, options)


def causal_mask(new: int, total: int) -> Floats:
    """The additive mask [1, 1, new, total] under which the last ``new`` of ``total`` tokens see what is before them."""
    places = np.arange(total)
    return np.where(places[None] <= places[total - new :, None], 0, HIDDEN).astype(np.float32)[None, None]


def _lengths(artifact: Artifact) -> tuple[int, ...]:
    """The lengths that the program takes, rising; none when it takes any."""
    if artifact.manifest.shapes == "dynamic":
        return ()
    size = artifact.manifest.inputs[0].shape[1]
    return (size,) if isinstance(size, int) else enumerated_lengths(artifact.entry)


class CoremlSession(ABC):
    """What both sessions share. :class:`edgestill.runtimes.session.Session`."""

    def __init__(self, artifact: Artifact) -> None:
        self._manifest = artifact.manifest
        self._output = artifact.manifest.outputs[0].name
        self._dtypes = {spec.name: spec.dtype for spec in artifact.manifest.inputs}
        self._lengths = _lengths(artifact)

    @abstractmethod
    def info(self) -> SessionInfo:
        """Who runs this."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    @abstractmethod
    def _new_state(self) -> Any:
        """Empty KV caches."""

    @abstractmethod
    def _predict(self, inputs: Mapping[str, npt.NDArray[Any]], state: Any) -> Mapping[str, Any]:
        """Run the program once."""

    def forward(self, ids: Ints, attention_mask: Ints) -> Floats:
        """See :class:`edgestill.runtimes.session.Session`; logits of padding are 0."""
        check_batch(ids, attention_mask, self.info())
        rows = [self._row(row[: int(mask.sum())]) for row, mask in zip(ids, attention_mask, strict=True)]
        if self._manifest.task != "text-generation":
            return np.stack(rows)
        result = np.zeros((*ids.shape, self._manifest.vocab_size), np.float32)
        for index, row in enumerate(rows):
            result[index, : len(row)] = row
        return result

    def _row(self, tokens: Ints) -> Floats:
        feed: dict[str, npt.NDArray[Any]] = {"input_ids": tokens[None].astype(np.int32)}
        if self._manifest.task == "text-generation":
            return self._step(feed, len(tokens), self._new_state())
        feed["attention_mask"] = np.ones((1, len(tokens)), np.int32)
        if any(spec.name == "token_type_ids" for spec in self._manifest.inputs):  # of another tool
            feed["token_type_ids"] = np.zeros((1, len(tokens)), np.int32)
        missing = next((length for length in self._lengths if length >= len(tokens)), len(tokens)) - len(tokens)
        if missing:  # lengths that the program does not take are padded, masked inside it
            feed = {name: np.pad(value, ((0, 0), (0, missing))) for name, value in feed.items()}
        return np.asarray(self._predict(feed, None)[self._output], np.float32)[0]

    def _step(self, feed: dict[str, npt.NDArray[Any]], total: int, state: Any) -> Floats:
        feed["causal_mask"] = causal_mask(feed["input_ids"].shape[1], total)
        return np.asarray(self._predict(feed, state)[self._output], np.float32)[0]

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """See :class:`edgestill.runtimes.session.Session`."""
        check_prompt(prompt_ids, max_new_tokens, self.info())
        return self._decode(np.asarray([prompt_ids], np.int32), max_new_tokens, logits)

    def _decode(self, tokens: npt.NDArray[np.int32], count: int, logits: bool) -> Iterator[DecodedToken]:
        state, total = self._new_state(), 0
        for _ in range(count):
            begin = time.perf_counter()
            total += tokens.shape[1]
            last = self._step({"input_ids": tokens}, total, state)[-1]
            token = int(last.argmax())
            yield DecodedToken(token, time.perf_counter() - begin, last.copy() if logits else None)
            tokens = np.array([[token]], np.int32)

    def _info(self, version: str, backend: str, latency: bool) -> SessionInfo:
        manifest = self._manifest
        decodes = ("decode",) if manifest.task == "text-generation" else ()
        return SessionInfo(
            runtime="coreml", version=version, backend=backend, task=manifest.task,
            capabilities=("forward", *decodes, "score", *(("latency",) if latency else ())),
            vocab_size=manifest.vocab_size, max_length=manifest.max_length,
        )  # fmt: skip


class MilSession(CoremlSession):
    """The saved program, executed by :mod:`edgestill.runtimes.mil`: right off a Mac too, but its speed says nothing."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        if options.backend not in (None, MIL_BACKEND):
            raise Unsupported(f"no Core ML backend {options.backend!r} here", hint=f"off macOS: {MIL_BACKEND}")
        super().__init__(artifact)
        program = load_program(artifact.entry)
        expected = {spec.name for spec in artifact.manifest.inputs}
        if set(program.inputs) != expected or self._output not in program.outputs:
            raise BadInput(
                f"{artifact.manifest.entry} takes {', '.join(program.inputs)}, not what artifact.json says",
                hint="export it again",
            )
        self._interpreter: Interpreter | None = Interpreter(program)
        self._version = coremltools_version()

    def info(self) -> SessionInfo:
        """Who runs this: coremltools' version (it parses the program); there is no ``latency``."""
        return self._info(self._version, MIL_BACKEND, latency=False)

    @property
    def ranges(self) -> list[RangeRow]:
        """What each float operation's result reached in all runs so far, in program order."""
        return self._live().ranges

    @property
    def first_overflow(self) -> RangeRow | None:
        """The first operation that left float16 (or made a NaN) from finite arguments."""
        return self._live().first_overflow

    @contextlib.contextmanager
    def profiling(self) -> Iterator[CostRecorder]:
        """Count what each operation costs in the passes inside: operations and bytes, no time."""
        interpreter = self._live()
        sizes = {
            name: stored_bytes(weight, interpreter.program) for name, weight in stored_weights(interpreter.program)
        }
        recorder = CostRecorder(interpreter.program, sizes)
        interpreter.watch = recorder.watch
        try:
            yield recorder
        finally:
            interpreter.watch = None

    def close(self) -> None:
        """Free the program."""
        self._interpreter = None

    def _new_state(self) -> Any:
        return self._live().new_state()

    def _predict(self, inputs: Mapping[str, npt.NDArray[Any]], state: Any) -> Mapping[str, Any]:
        return self._live().run(inputs, state)

    def _live(self) -> Interpreter:
        if self._interpreter is None:
            raise BadInput("this session is closed", hint="open the artifact again")
        return self._interpreter


class NativeCoreMLSession(CoremlSession):
    """Apple's runtime, through ``coremltools.models.MLModel`` (macOS 13 or later; 15 for decoders)."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact)
        self._unit = options.backend or "ALL"
        if self._unit not in COMPUTE_UNITS:
            raise Unsupported(
                f"no Core ML backend {self._unit!r}", hint=f"known: {', '.join(COMPUTE_UNITS)}, {MIL_BACKEND}"
            )
        ct = import_coremltools()
        self._version = f"{coremltools_version()}"
        try:
            self._model = ct.models.MLModel(str(artifact.entry), compute_units=getattr(ct.ComputeUnit, self._unit))
        except (RuntimeError, ValueError, OSError) as error:
            raise BadInput(
                f"{artifact.entry}: Core ML can't load it: {str(error).strip().splitlines()[0]}",
                hint="the artifact's minimum_runtime says which system it needs",
            ) from error

    def info(self) -> SessionInfo:
        """Who runs this: coremltools' version and the compute units that Core ML may use."""
        return self._info(self._version, self._unit, latency=True)

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _new_state(self) -> Any:
        return self._live().make_state()

    def _predict(self, inputs: Mapping[str, npt.NDArray[Any]], state: Any) -> Mapping[str, Any]:
        feed = {name: value.astype(self._dtypes.get(name, value.dtype)) for name, value in inputs.items()}
        model = self._live()
        return dict(model.predict(feed) if state is None else model.predict(feed, state))

    def _live(self) -> Any:
        if self._model is None:
            raise BadInput("this session is closed", hint="open the artifact again")
        return self._model
