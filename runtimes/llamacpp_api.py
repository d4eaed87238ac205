"""The one file that touches llama.cpp's C structs, through the ctypes bindings of llama-cpp-python.

Those bindings copy the header of one engine version; a library of another version would read our structs shifted, and
wrong numbers or a crash would follow. So before first use :func:`engine` compares sizes and default values, from the
first to the last field of each struct, with what this file was written for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, EdgestillError, MissingDependency, Unsupported

__all__ = ["LlamaContext", "LlamaModel", "engine", "engine_version"]

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_LOAD_MMAP, _LOAD_COPY = 1, 0
_INSTALL = "pip install 'llama-cpp-python>=0.3.36,<0.4'"

# Struct -> its size, and fields (the first, the last, some between) with the values that the C library sets by default.
_LAYOUT: dict[str, tuple[int, dict[str, Any]]] = {
    "llama_model_params": (
        80, {"n_gpu_layers": -1, "split_mode": 1, "lazy_mode": 1, "vocab_only": False, "use_extra_bufts": True},
    ),
    "llama_context_params": (
        160,
        {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_outputs_max_per_seq": 1, "pooling_type": -1,
         "yarn_ext_factor": -1.0, "type_k": 1, "type_v": 1, "embeddings": False, "no_perf": True, "n_samplers": 0},
    ),
    "llama_model_quantize_params": (
        64, {"nthread": 0, "output_tensor_type": 43, "quantize_output_tensor": True, "max_buf_size": 8 << 30},
    ),
}  # fmt: skip
_SIZES = {"llama_batch": 56, "llama_model_kv_override": 264}


def _silent_log(level: int, text: bytes, data: object) -> None:
    """What llama.cpp says is dropped; it fails by return codes, which we turn into errors."""


@cache
def engine() -> ModuleType:
    """The bindings, checked against the library they loaded and made quiet.

    Raises :class:`MissingDependency` when they are not installed or of another version than this file knows.
    """
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as api
    except ModuleNotFoundError:
        raise MissingDependency.package("llama-cpp-python", "runtimes") from None
    except (OSError, RuntimeError) as error:  # the shared library is missing or of another machine
        raise MissingDependency(f"llama-cpp-python does not load: {error}", hint=_INSTALL) from None
    wrong = _layout_error(api)
    if wrong:
        raise MissingDependency(f"llama-cpp-python {llama_cpp.__version__} is not what we know: {wrong}", hint=_INSTALL)
    quiet = api.llama_log_callback(_silent_log)
    engine.keep = quiet  # type: ignore[attr-defined]  # C holds the pointer: it must not be collected
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    return api


def _layout_error(api: ModuleType) -> str | None:
    """The first difference between the bindings, the loaded library and :data:`_LAYOUT`."""
    for name, (size, defaults) in _LAYOUT.items():
        if ctypes.sizeof(getattr(api, name)) != size:
            return f"{name} has {ctypes.sizeof(getattr(api, name))} bytes, expected {size}"
        values = getattr(api, name.replace("_params", "_default_params"))()
        for field, expected in defaults.items():
            if getattr(values, field) != expected:
                return f"{name}.{field} is {getattr(values, field)}, expected {expected}"
    for name, size in _SIZES.items():
        if ctypes.sizeof(getattr(api, name)) != size:
            return f"{name} has {ctypes.sizeof(getattr(api, name))} bytes, expected {size}"
    return None


def engine_version() -> str:
    """Versions of the bindings and of the llama.cpp in them: ``"0.3.36 (llama.cpp 0.5.0-dev)"``."""
    import llama_cpp

    return f"{llama_cpp.__version__} (llama.cpp {engine().llama_version().decode()})"


class LlamaModel:
    """A GGUF file opened by llama.cpp, memory-mapped.

    ``overrides`` replace string keys of the file's metadata (a key and a value of at most 127 bytes each).
    Check the file with :class:`edgestill.runtimes.gguf_file.GgufFile` first: llama.cpp may abort on a damaged one.
    """

    def __init__(
        self, path: Path, *, vocab_only: bool = False, use_mmap: bool = True, overrides: Mapping[str, str] | None = None
    ) -> None:
        self.api = engine()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.load_mode = _LOAD_MMAP if use_mmap else _LOAD_COPY
        if overrides:
            pairs = (self.api.llama_model_kv_override * (len(overrides) + 1))()  # ended by an empty key
            for pair, (key, value) in zip(pairs, overrides.items(), strict=False):
                pair.tag, pair.key, pair.value.val_str = 3, key.encode(), value.encode()
            params.kv_overrides = pairs
        self.handle = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise BadInput(f"llama.cpp can't load {path}", hint="the file is damaged or of a newer llama.cpp")
        self.vocab = self.api.llama_model_get_vocab(self.handle)
        self.vocab_size = int(self.api.llama_vocab_n_tokens(self.vocab))
        self.classes = 0 if vocab_only else int(self.api.llama_model_n_cls_out(self.handle))
        self.width = 0 if vocab_only else int(self.api.llama_model_n_embd(self.handle))

    def close(self) -> None:
        """Free the model; contexts must be closed before."""
        if self.handle:
            self.api.llama_model_free(self.handle)
            self.handle = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Token ids that llama.cpp makes of ``text``."""
        data = text.encode()
        room = len(data) + 8
        while True:
            out = (ctypes.c_int32 * room)()
            count = self.api.llama_tokenize(self.vocab, data, len(data), out, room, add_special, parse_special)
            if count >= 0:
                return list(out[:count])
            if count == -(2**31):
                raise Unsupported("a text too long for llama.cpp's tokenizer", hint="pass it in pieces")
            room = -count


class LlamaContext:
    """Room to compute in: KV cache, batch buffers, threads.

    ``outputs`` is how many rows of logits one batch may ask for: the buffer for them is ``outputs * vocab_size``
    float32. With ``embeddings`` a batch gives one pooled vector per sequence instead. ``timed``: llama.cpp counts its
    own :meth:`timings`. ``watch``, a ``ggml_backend_sched_eval_callback``, is called before and after each node.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        length: int,
        batch: int,
        outputs: int,
        threads: int,
        kv: str = "f16",
        flash: Literal["auto", "on", "off"] = "auto",
        embeddings: bool = False,
        sequences: int = 1,
        timed: bool = False,
        watch: Any = None,
    ) -> None:
        self.model, self.api = model, model.api
        self._watch = watch  # C holds the pointer: it must live as long as the context
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = length, batch, sequences
        # Attention without a causal mask needs a sequence whole in one physical batch.
        params.n_ubatch = batch if embeddings else min(batch, 512)
        params.n_outputs_max, params.n_outputs_max_per_seq = (0, 0) if embeddings else (outputs, outputs)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = _FLASH[flash]
        params.embeddings = embeddings
        params.kv_unified = embeddings
        params.no_perf = not timed
        if watch is not None:
            params.cb_eval = watch
        self.handle = self.api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise EdgestillError(
                f"llama.cpp can't make a context of {length} tokens", hint="take a shorter context, or free memory"
            )
        self.length = int(self.api.llama_n_ctx(self.handle))
        self.batch = batch
        self._memory = self.api.llama_get_memory(self.handle)  # null for an encoder

    def close(self) -> None:
        """Free it."""
        if self.handle:
            self.api.llama_free(self.handle)
            self.handle = None

    def timings(self) -> dict[str, float]:
        """llama.cpp's own counters since the last reset (``llama_perf_context``): milliseconds and tokens of prompts
        (batches of several tokens) and of single tokens."""
        data = self.api.llama_perf_context(self.handle)
        names = ("t_load_ms", "t_p_eval_ms", "n_p_eval", "t_eval_ms", "n_eval")
        return {name: float(getattr(data, name)) for name in names}

    def reset_timings(self) -> None:
        """Start the counters anew."""
        self.api.llama_perf_context_reset(self.handle)

    def forget(self) -> None:
        """Empty the KV cache."""
        if self._memory:
            self.api.llama_memory_clear(self._memory, False)

    def feed(self, ids: Tokens, *, all_logits: bool = False) -> None:
        """Append ``ids`` (contiguous int32, at most ``batch`` of them) to sequence 0; compute the logits of the last
        one, or of all."""
        ones = np.ones(len(ids), np.int8)
        batch = self.api.llama_batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(self.api.llama_token_p),
            logits=ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)) if all_logits else None,
        )
        self._run(batch)

    def logits(self, rows: int = 1) -> Floats:
        """``[rows, vocab_size]``: a view of llama.cpp's buffer, valid until the next :meth:`feed`."""
        pointer = self.api.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.model.vocab_size))

    def pooled(self, texts: list[Tokens], width: int) -> Floats:
        """Run whole sequences together (at most ``batch`` tokens); their pooled outputs ``[texts, width]``, a copy."""
        counts = np.array([len(ids) for ids in texts])
        token = np.concatenate(texts).astype(np.int32)
        position = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        owner = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
        ones = np.ones(len(token), np.int32)
        wanted = np.ones(len(token), np.int8)
        pointers = owner.ctypes.data + 4 * np.arange(len(token), dtype=np.uintp)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        batch = self.api.llama_batch(
            n_tokens=len(token),
            token=token.ctypes.data_as(int32_p),
            pos=position.ctypes.data_as(int32_p),
            n_seq_id=ones.ctypes.data_as(int32_p),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self.forget()
        self._run(batch)
        rows = [self.api.llama_get_embeddings_seq(self.handle, index) for index in range(len(texts))]
        return np.stack([np.ctypeslib.as_array(row, shape=(width,)) for row in rows])

    def _run(self, batch: Any) -> None:
        code = self.api.llama_decode(self.handle, batch)
        if code != 0:
            raise EdgestillError(
                f"llama.cpp failed with code {code} on a batch of {batch.n_tokens} tokens",
                hint="an id outside the vocabulary, or more tokens than the context holds",
            )
