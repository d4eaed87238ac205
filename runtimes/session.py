"""What every runtime gives: one protocol for torch, onnxruntime, llama.cpp and Core ML. Numpy only.

A session opens one artifact (or model folder) and runs it. It is used inside a worker process
(:mod:`edgestill.runtimes.worker`), never in the process that steers a run: native libraries may abort.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, Unsupported

__all__ = [
    "DecodedToken",
    "Session",
    "SessionInfo",
    "SessionOptions",
    "check_batch",
    "check_prompt",
    "open_session",
]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SessionOptions:
    """How to open: CPU threads; a backend of the runtime (``None``: its CPU default); further runtime options."""

    threads: int = 2
    backend: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SessionInfo:
    """What runs: ``runtime`` (``"onnxruntime"``), its ``version``, the ``backend`` that was really used
    (``"CPUExecutionProvider"``, ``"cpu"``, ``"mil-interpreter"``), the artifact's ``task``, and ``capabilities``
    (subset of ``forward decode score latency``; a program that is only interpreted has no ``latency``)."""

    runtime: str
    version: str
    backend: str
    task: str
    capabilities: tuple[str, ...]
    vocab_size: int
    max_length: int
    placement: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodedToken:
    """One greedily decoded token: its id, the seconds since the previous one (the first one includes the prompt), and
    on request the float32 logits ``[vocab]`` that it was chosen from."""

    id: int
    seconds: float
    logits: Floats | None = None


@runtime_checkable
class Session(Protocol):
    """An opened model. Right padding; positions count real tokens from 0."""

    def info(self) -> SessionInfo:
        """Who runs this."""
        ...

    def forward(self, ids: Ints, attention_mask: Ints) -> Floats:
        """Run ``ids [B, T]`` with ``attention_mask [B, T]`` (1 real, 0 padding on the right).

        Returns float32 ``[B, T, V]`` logits (text-generation), ``[B, T, C]`` logits (token-classification;
        in both rows of padding are unspecified), ``[B, C]`` logits (text-classification) or ``[B, D]`` embeddings,
        pooled and normalised as the artifact says (feature-extraction).
        """
        ...

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """Greedy decoding with the KV cache (text-generation only): exactly ``max_new_tokens`` tokens, end-of-text
        not obeyed, so that timings are comparable. Ties go to the lowest id."""
        ...

    def close(self) -> None:
        """Free everything; further calls are errors."""
        ...


def check_batch(ids: npt.NDArray[Any], mask: npt.NDArray[Any], info: SessionInfo) -> None:
    """The input of ``forward`` keeps the protocol: int64 ``[B, T]``, ids of the vocabulary, right padding, at least one
    real token a row, not longer than the model takes. :class:`BadInput` names what does not."""
    hint = "ids and attention_mask are int64 [batch, length], padded on the right"
    if ids.ndim != 2 or ids.shape != mask.shape or 0 in ids.shape:
        raise BadInput(f"ids {list(ids.shape)} with mask {list(mask.shape)}", hint=hint)
    if ids.dtype != np.int64 or mask.dtype != np.int64:
        raise BadInput(f"ids of {ids.dtype} with mask of {mask.dtype}", hint=hint)
    if ids.min() < 0 or ids.max() >= info.vocab_size:
        raise BadInput(f"token ids {ids.min()} to {ids.max()}, the vocabulary has {info.vocab_size}", hint=hint)
    if ((mask != 0) & (mask != 1)).any() or (np.diff(mask, axis=1) > 0).any() or not mask[:, 0].all():
        raise BadInput("the mask is not ones followed by zeros", hint=hint)
    if ids.shape[1] > info.max_length:
        raise BadInput(f"{ids.shape[1]} tokens, the model takes {info.max_length}", hint="cut the text")


def check_prompt(prompt_ids: Sequence[int], max_new_tokens: int, info: SessionInfo) -> None:
    """The input of ``decode`` is possible, or :class:`BadInput`."""
    if info.task != "text-generation":
        raise Unsupported(f"a {info.task} model does not decode", hint="use forward")
    if not prompt_ids or max_new_tokens < 1:
        raise BadInput(f"{len(prompt_ids)} prompt tokens, {max_new_tokens} new ones", hint="at least one of each")
    if min(prompt_ids) < 0 or max(prompt_ids) >= info.vocab_size:
        raise BadInput(f"a prompt id is outside the vocabulary of {info.vocab_size}", hint="use the model's tokenizer")
    if len(prompt_ids) + max_new_tokens > info.max_length:
        total = f"{len(prompt_ids)} + {max_new_tokens}"
        raise BadInput(f"{total} tokens, the model takes {info.max_length}", hint="shorten the prompt")


def open_session(folder: Path, options: SessionOptions | None = None, *, check: bool = True) -> Session:
    """Open a sealed artifact folder, or a Transformers model folder (then with torch, fp32).

    ``check=False`` skips the comparison of the payload with its hashes, for a caller that just did it. Raises
    :class:`edgestill.errors.MissingDependency` when the runtime is not installed, and
    :class:`edgestill.errors.BadInput` for a damaged artifact.
    """
    from ..artifact import ARTIFACT_FILE, open_artifact

    options = options or SessionOptions()
    if not (folder / ARTIFACT_FILE).exists():
        from .torch_session import TorchSession

        return TorchSession(folder, options)
    artifact = open_artifact(folder, check=check)
    match artifact.manifest.format:
        case "onnx":
            from .ort_session import OrtSession

            return OrtSession(artifact, options)
        case "gguf":
            from .llamacpp_session import LlamaCppSession

            return LlamaCppSession(artifact, options)
        case "coreml":
            from .coreml_session import open_coreml

            return open_coreml(artifact, options)
        case other:
            raise Unsupported(f"no runtime opens format {other!r}", hint="known: onnx, gguf, coreml")
