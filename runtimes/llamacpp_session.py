"""Runs a GGUF artifact with llama.cpp on the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import BadInput, UsageError
from .gguf_file import GgufFile
from .llamacpp_api import KV_TYPES, LlamaContext, LlamaModel, engine_version
from .llamacpp_profile import GgmlRecorder
from .session import DecodedToken, SessionInfo, SessionOptions

__all__ = ["LlamaCppSession"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]

# Rows of logits computed together: bounds llama.cpp's buffer for them (64 x 49,152 x 4 bytes = 12.6 MB).
_LOGIT_ROWS = 64
_PROMPT_BATCH = 512
_FIRST_LENGTH = 512
_MOST_SEQUENCES = 64


class LlamaCppSession:
    """A :class:`edgestill.runtimes.session.Session` for GGUF.

    ``options.extra``: ``kv`` is the type of the KV cache (``"f16"`` by default, ``"f32"``, ``"q8_0"``), ``flash``
    ``"auto"``, ``"on"`` or ``"off"`` (the default with ``f32``), ``mmap`` whether to map the file or to copy it.

    Raises :class:`MissingDependency` without llama-cpp-python, :class:`BadInput` for a damaged file.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        if options.backend not in (None, "cpu"):
            raise UsageError(f"llama.cpp has no backend {options.backend!r} here", hint="leave backend out")
        extra = dict(options.extra)
        self._kv = str(extra.pop("kv", "f16"))
        # Flash attention rounds keys and values to float16 whatever the cache holds.
        self._flash: Any = extra.pop("flash", "off" if self._kv == "f32" else "auto")
        use_mmap = bool(extra.pop("mmap", True))
        if extra or self._kv not in KV_TYPES or self._flash not in ("auto", "on", "off"):
            raise UsageError(f"unknown option for llama.cpp in {dict(options.extra)}", hint="kv, flash, mmap")
        self._manifest = artifact.manifest
        self._threads = options.threads
        with GgufFile(artifact.entry) as file:  # llama.cpp may abort on what this refuses
            if "general.architecture" not in file.metadata or not file.tensors:
                raise BadInput(f"{artifact.entry} holds no model", hint="export it again")
        self._model = LlamaModel(artifact.entry, use_mmap=use_mmap)
        self._context: LlamaContext | None = None
        self._kind = ""
        self._timed = False
        self._recorder: GgmlRecorder | None = None
        if self._model.vocab_size != self._manifest.vocab_size:
            raise BadInput(
                f"{artifact.entry}: {self._model.vocab_size} tokens, artifact.json says {self._manifest.vocab_size}",
                hint="export it again",
            )

    def info(self) -> SessionInfo:
        """Who runs this; ``placement`` tells the KV cache's type, e.g. ``{"kv:f16": 1}`` (text-generation)."""
        generates = self._manifest.task == "text-generation"
        return SessionInfo(
            runtime="llama.cpp",
            version=engine_version(),
            backend="cpu",
            task=self._manifest.task,
            capabilities=("forward", "score", "latency", "tokenize", *(["decode"] if generates else [])),
            vocab_size=self._model.vocab_size,
            max_length=self._manifest.max_length,
            placement={f"kv:{self._kv}": 1} if generates else {},
        )

    def forward(self, ids: Ints, attention_mask: Ints) -> Floats:
        """See :meth:`edgestill.runtimes.session.Session.forward`. Rows of padding are zero."""
        rows = [self._checked(row[: int(mask.sum())]) for row, mask in zip(ids, attention_mask, strict=True)]
        if self._manifest.task == "text-generation":
            out = np.zeros((*ids.shape, self._model.vocab_size), np.float32)
            for index, row in enumerate(rows):
                self._row_logits(row, out[index])
            return out
        return self._pooled(rows)

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """See :meth:`edgestill.runtimes.session.Session.decode`."""
        if self._manifest.task != "text-generation":
            raise UsageError(f"a {self._manifest.task} model can't decode", hint="use forward")
        prompt = self._checked(np.asarray(prompt_ids, np.int64), len(prompt_ids) + max_new_tokens - 1)
        context = self._open("decode", len(prompt) + max_new_tokens, 1)
        context.forget()
        begin = time.perf_counter()
        for start in range(0, len(prompt), context.batch):
            context.feed(prompt[start : start + context.batch])
        for step in range(max_new_tokens):
            row = context.logits()[0]
            chosen = int(row.argmax())  # the lowest of equal ones
            now = time.perf_counter()
            yield DecodedToken(chosen, now - begin, row.copy() if logits else None)
            if step + 1 < max_new_tokens:
                begin = time.perf_counter()
                context.feed(np.array([chosen], np.int32))

    def tokenize(self, text: str) -> list[int]:
        """The ids that an app gets which hands ``text`` to llama.cpp, special tokens as the file says."""
        return self._model.tokenize(text, add_special=True)

    def keep_timings(self) -> None:
        """Let llama.cpp count its own timings from now on."""
        if not self._timed:
            self._timed = True
            self._drop_context()
        elif self._context is not None:
            self._context.reset_timings()

    @contextlib.contextmanager
    def profiling(self) -> Iterator[GgmlRecorder]:
        """Take the time of each node of the graph, in a context of its own."""
        timings = self._context.timings() if self._timed and self._context is not None else {}
        self._drop_context()
        self._recorder = GgmlRecorder(timings)
        try:
            yield self._recorder
        finally:
            self._drop_context()
            self._recorder = None

    def close(self) -> None:
        """See :meth:`edgestill.runtimes.session.Session.close`."""
        self._drop_context()
        self._model.close()

    def _checked(self, row: npt.NDArray[Any], length: int | None = None) -> Tokens:
        most = self._manifest.max_length
        if not 0 < len(row) <= most or (length or 0) > most:
            raise UsageError(f"{length or len(row)} tokens; this artifact takes 1 to {most}", hint="cut the input")
        if row.min() < 0 or row.max() >= self._model.vocab_size:
            raise UsageError(f"token id outside 0 … {self._model.vocab_size - 1}", hint="is it the right tokenizer?")
        return np.ascontiguousarray(row, np.int32)

    def _row_logits(self, row: Tokens, out: Floats) -> None:
        context = self._open("logits", len(row), _LOGIT_ROWS)
        context.forget()
        for start in range(0, len(row), _LOGIT_ROWS):
            part = row[start : start + _LOGIT_ROWS]
            context.feed(part, all_logits=True)
            out[start : start + len(part)] = context.logits(len(part))

    def _pooled(self, rows: list[Tokens]) -> Floats:
        """Sequences share a batch as far as they fit; each attends to itself only."""
        context = self._open("pooled", max(_PROMPT_BATCH, *(len(row) for row in rows)), 0)
        width = self._model.classes if self._manifest.task == "text-classification" else self._model.width
        out: list[Floats] = []
        group: list[Tokens] = []
        for row in rows:
            if group and (sum(map(len, group)) + len(row) > context.batch or len(group) == _MOST_SEQUENCES):
                out.append(context.pooled(group, width))
                group = []
            group.append(row)
        out.append(context.pooled(group, width))
        vectors = np.concatenate(out)
        if self._manifest.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _open(self, kind: str, length: int, outputs: int) -> LlamaContext:
        """A context of a kind that holds ``length`` tokens; the last one when it fits."""
        if self._context is None or self._kind != kind or self._context.length < length:
            self._drop_context()
            room = max(_FIRST_LENGTH, 1 << (length - 1).bit_length())
            batch = {"logits": _LOGIT_ROWS, "decode": _PROMPT_BATCH, "pooled": room}[kind]
            self._context = LlamaContext(
                self._model, length=room, batch=batch, outputs=outputs, threads=self._threads, kv=self._kv,
                flash=self._flash, embeddings=kind == "pooled", sequences=_MOST_SEQUENCES if kind == "pooled" else 1,
                timed=self._timed, watch=self._recorder.callback if self._recorder else None,
            )  # fmt: skip
            self._kind = kind
        return self._context

    def _drop_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
