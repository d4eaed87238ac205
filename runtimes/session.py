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

__all__ = ["DecodedToken", "Session", "SessionInfo", "SessionOptions"]

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

        Returns float32 ``[B, T, V]`` logits (text-generation; rows of padding are unspecified), ``[B, C]`` logits
        (text-classification) or ``[B, D]`` embeddings, pooled and normalised as the artifact says
        (feature-extraction).
        """
        ...

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """Greedy decoding with the KV cache (text-generation only): exactly ``max_new_tokens`` tokens, end-of-text
        not obeyed, so that timings are comparable. Ties go to the lowest id."""
        ...

    def close(self) -> None:
        """Free everything; further calls are errors."""
        ...


def open_session(folder: Path, options: SessionOptions | None = None) -> Session:
    """Open a sealed artifact folder, or a Transformers model folder (then with torch, fp32).

    Raises :class:`edgestill.errors.MissingDependency` when the runtime is not installed, and
    :class:`edgestill.errors.BadInput` for a damaged artifact.
    """
    from ..artifact import ARTIFACT_FILE, open_artifact

    options = options or SessionOptions()
    if not (folder / ARTIFACT_FILE).exists():
        from .torch_session import TorchSession

        return TorchSession(folder, options)
    artifact = open_artifact(folder)
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
            from ..errors import Unsupported

            raise Unsupported(f"no runtime opens format {other!r}", hint="known: onnx, gguf, coreml")
