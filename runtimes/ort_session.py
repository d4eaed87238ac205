"""ONNX Runtime behind the session protocol. Numpy and onnxruntime only: it runs on devices."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact
from ..errors import BadInput, MissingDependency, Unsupported
from .ort_profile import OrtRecorder
from .session import DecodedToken, Floats, Ints, SessionInfo, SessionOptions

__all__ = ["OrtSession"]

CPU = "CPUExecutionProvider"
_PRECISE, _UNSHARE = "session.x64quantprecision", "AddInitializerWithOrtValue"  # see precision.py, unshared.py
_QUIET = 3  # severity "error": the runtime's warnings are about its own graph rewriting


class OrtSession:
    """An ONNX artifact in ONNX Runtime.

    ``options.backend`` is an execution provider (default: CPU); ``options.extra`` are session config entries of ONNX
    Runtime by their names (``{"session.x64quantprecision": "1"}``), and ``"graph_optimization"``
    (``all | extended | basic | none``).
    """

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingDependency.package("onnxruntime", "runtimes") from None
        self._ort = onnxruntime
        self._manifest = artifact.manifest
        self._backend = options.backend or CPU
        if self._backend not in onnxruntime.get_available_providers():
            known = ", ".join(onnxruntime.get_available_providers())
            raise Unsupported(f"onnxruntime has no backend {self._backend!r} here", hint=f"available: {known}")
        onnxruntime.set_default_logger_severity(_QUIET)
        onnxruntime.disable_telemetry_events()
        self._artifact, self._options = artifact, options
        chosen = _session_options(onnxruntime, options)
        try:
            self._session = self._load(artifact, chosen, options)
            self._inputs = {item.name: item for item in self._session.get_inputs()}
            self._outputs = [item.name for item in self._session.get_outputs()]
        except _errors(onnxruntime) as error:
            raise BadInput(
                f"{artifact.entry}: onnxruntime {onnxruntime.__version__} can't load it: {_first_line(error)}",
                hint="export it again, or update onnxruntime; the artifact's minimum_runtime says what it needs",
            ) from error
        named = artifact.manifest.outputs[0].name if artifact.manifest.outputs else ""
        self._output = named if named in self._outputs else self._outputs[0]
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        # A graph of standard operators puts the new tokens behind the past; ONNX Runtime's own extends a buffer.
        lengths = [item.shape[2] for item in self._session.get_outputs() if item.name.startswith("present.")]
        self._appends = lengths[:1] == ["total"]

    def _load(self, artifact: Artifact, chosen: Any, options: SessionOptions) -> Any:
        open_ = self._ort.InferenceSession
        try:
            return open_(str(artifact.entry), chosen, providers=[self._backend])
        except _errors(self._ort) as error:
            if _PRECISE not in options.extra or _UNSHARE not in str(error):
                raise
        from .unshared import external_folder, unshared_graph

        again = _session_options(self._ort, options)
        again.add_session_config_entry(*external_folder(artifact))
        return open_(unshared_graph(artifact), again, providers=[self._backend])

    def info(self) -> SessionInfo:
        """Runtime, version, execution provider and how many nodes it took."""
        manifest = self._manifest
        decodes = ("decode",) if manifest.task == "text-generation" and self._past else ()
        return SessionInfo(
            runtime="onnxruntime", version=str(self._ort.__version__), backend=str(self._session.get_providers()[0]),
            task=manifest.task, capabilities=("forward", *decodes, "score", "latency"),
            vocab_size=manifest.vocab_size, max_length=manifest.max_length, placement=self._placement(),
        )  # fmt: skip

    def forward(self, ids: Ints, attention_mask: Ints) -> Floats:
        """See :class:`edgestill.runtimes.session.Session`."""
        self._check_length(ids.shape[1])
        feed = self._feed(ids, attention_mask, 0)
        feed |= {name: self._empty(name, ids.shape[0]) for name in self._past}
        try:
            (result,) = self._live().run([self._output], feed)
        except _errors(self._ort) as error:
            raise BadInput(
                f"onnxruntime {self._ort.__version__} can't run it: {_first_line(error)}",
                hint="export it again; are ids and mask what the artifact takes?",
            ) from error
        result = np.asarray(result, np.float32)
        if self._manifest.task == "feature-extraction" and not self._manifest.pooling_in_graph:
            return self._pool(result, attention_mask)
        return result

    def _feed(self, ids: Ints, mask: Ints, past: int) -> dict[str, Any]:
        """Values of the inputs that the graph has, in its integer type; ``past`` tokens came before ``ids``."""
        values = {
            "input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids),
            "position_ids": np.broadcast_to(past + np.arange(ids.shape[1]), ids.shape),
        }  # fmt: skip
        types = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
        return {
            name: np.ascontiguousarray(value, types.get(self._inputs[name].type, np.int64))
            for name, value in values.items()
            if name in self._inputs
        }

    def _pool(self, hidden: Floats, mask: Ints) -> Floats:
        """Token states ``[B, T, D]`` to embeddings ``[B, D]``, for a graph that leaves that to the caller."""
        if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
            raise BadInput(f"{self._output} has shape {list(hidden.shape)}", hint="expected [batch, length, width]")
        if self._manifest.pooling == "cls":
            pooled = hidden[:, 0]
        elif self._manifest.pooling == "last":
            pooled = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        pooled = np.asarray(pooled, np.float32)
        if self._manifest.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), np.float32(1e-12))
        return pooled

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """See :class:`edgestill.runtimes.session.Session`. Keys and values stay in one buffer that each step extends.

        Raises :class:`Unsupported` for an encoder, :class:`BadInput` when prompt and new tokens exceed
        ``max_length``.
        """
        if not self._past:
            raise Unsupported(f"a {self._manifest.task} artifact does not decode", hint="use forward")
        if not prompt_ids:
            raise BadInput("the prompt is empty", hint="give at least one token")
        total = len(prompt_ids) + max_new_tokens
        self._check_length(total)
        ids = np.asarray([prompt_ids], np.int64)
        if self._appends or "foreign" in self._manifest.lineage:
            return self._grow(ids, max_new_tokens, logits)
        return self._decode(ids, max_new_tokens, total, logits)

    def _decode(self, ids: Ints, count: int, total: int, logits: bool) -> Iterator[DecodedToken]:
        session = self._live()
        mask = np.ones((1, total), np.int64)
        binding = session.io_binding()
        for name in self._past:
            shape, dtype = self._cache_shape(name, 1, total)
            buffer = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        used, logits_at = ids.shape[1], len(self._past)
        begin = time.perf_counter()
        for _ in range(count):
            binding.bind_output("logits")  # again: it is 1 row after the prompt
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", mask[:, :used])
            session.run_with_iobinding(binding)
            last = binding.get_outputs()[logits_at].numpy()[0, -1]
            token = int(last.argmax())
            end = time.perf_counter()
            yield DecodedToken(token, end - begin, np.array(last, np.float32) if logits else None)
            begin = time.perf_counter()
            ids = np.array([[token]], np.int64)
            used += 1

    def _grow(self, ids: Ints, count: int, logits: bool) -> Iterator[DecodedToken]:
        """Decoding by a graph whose ``present`` is ``past`` with the new tokens appended, as exporters of PyTorch
        modules and our portable graphs have it: what comes out goes in as it is."""
        binding, used = self._live().io_binding(), 0
        for name in self._past:
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(self._empty(name, 1)))
        names = [self._output, *(name.replace("past_key_values", "present") for name in self._past)]
        begin = time.perf_counter()
        for _ in range(count):
            for name in names:
                binding.bind_output(name)
            mask = np.ones((1, used + ids.shape[1]), np.int64)
            for name, value in self._feed(ids, mask, used).items():
                binding.bind_cpu_input(name, value)
            self._live().run_with_iobinding(binding)
            said, *kept = binding.get_outputs()
            used += ids.shape[1]
            last = said.numpy()[0, -1]
            token = int(last.argmax())
            end = time.perf_counter()
            yield DecodedToken(token, end - begin, np.array(last, np.float32) if logits else None)
            begin = time.perf_counter()
            for name, value in zip(self._past, kept, strict=True):
                binding.bind_ortvalue_input(name, value)
            ids = np.array([[token]], np.int64)

    @contextlib.contextmanager
    def profiling(self) -> Iterator[OrtRecorder]:
        """Open the model anew with the runtime's profiler on, and read its profile when the block is left."""
        self._live()
        self._session = None  # not both in memory
        recorder = OrtRecorder()
        with tempfile.TemporaryDirectory(prefix="edgestill-profile-") as folder:
            chosen = _session_options(self._ort, self._options)
            chosen.enable_profiling, chosen.profile_file_prefix = True, str(Path(folder) / "ort")
            self._session = self._load(self._artifact, chosen, self._options)
            try:
                yield recorder
            finally:
                written = self._live().end_profiling()
            recorder.read(Path(written))

    def close(self) -> None:
        """Free the model."""
        self._session = None

    def _live(self) -> Any:
        if self._session is None:
            raise BadInput("this session is closed", hint="open the artifact again")
        return self._session

    def _check_length(self, tokens: int) -> None:
        # the rotary tables end there, and the runtime does not check
        if tokens > self._manifest.max_length:
            raise BadInput(
                f"{tokens} tokens are more than the artifact's {self._manifest.max_length}",
                hint="cut the text, or export with a larger context_length",
            )

    def _cache_shape(self, name: str, batch: int, length: int) -> tuple[tuple[int, ...], Any]:
        item = self._inputs[name]
        dtype = np.float16 if item.type == "tensor(float16)" else np.float32
        return (batch, item.shape[1], length, item.shape[3]), dtype

    def _empty(self, name: str, batch: int) -> Any:
        shape, dtype = self._cache_shape(name, batch, 0)
        return np.zeros(shape, dtype)

    def _placement(self) -> dict[str, int]:
        """Nodes by execution provider, after the runtime's own graph rewriting."""
        rows: dict[str, int] = {}
        if not hasattr(self._live(), "get_provider_graph_assignment_info"):  # before onnxruntime 1.24
            return rows
        for part in self._live().get_provider_graph_assignment_info():
            rows[part.ep_name] = rows.get(part.ep_name, 0) + len(part.get_nodes())
        return rows


def _session_options(ort: Any, options: SessionOptions) -> Any:
    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    result = ort.SessionOptions()
    result.intra_op_num_threads = options.threads
    result.inter_op_num_threads = 1
    result.log_severity_level = _QUIET
    result.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in options.extra.items():
        if key == "graph_optimization":
            if value not in levels:
                raise BadInput(f"graph_optimization {value!r}", hint="known: " + ", ".join(levels))
            result.graph_optimization_level = levels[value]
        else:
            result.add_session_config_entry(str(key), str(value))
    return result


def _errors(ort: Any) -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no common base, and what its bindings raise (names not in UTF-8)."""
    state = ort.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail", "NotFound")  # fmt: skip
    own = tuple(getattr(state, name) for name in names if hasattr(state, name))
    return (*own, ValueError, RuntimeError, TypeError)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
