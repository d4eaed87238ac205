"""How a model is opened when its *answers* count, and how when its *speed* does.

x86 processors without VNNI add pairs of int8 products in 16 bits and cut what does not fit
(:mod:`edgestill.runtimes.saturation`); Arm, WASM and newer x86 don't. ONNX Runtime has an option that takes exact
kernels instead (``session.x64quantprecision``; slower there, without effect elsewhere). Whoever scores a model for
phones takes it; whoever times it must not.
"""

from __future__ import annotations

from pathlib import Path

from ..artifact import ARTIFACT_FILE, open_artifact
from .session import SessionOptions

__all__ = ["PRECISE", "scoring_options", "scoring_protocol"]

PRECISE = "session.x64quantprecision"


def scoring_options(folder: Path, threads: int, backend: str | None = None) -> SessionOptions:
    """Options for a worker whose answers count: exact int8 sums, if ``folder`` is an ONNX artifact."""
    return SessionOptions(threads, backend, {PRECISE: "1"} if _is_onnx(folder) else {})


def scoring_protocol(runtime: str) -> dict[str, str]:
    """What a record says of it, by the runtime that was used."""
    return {"int8_sums": f"exact ({PRECISE}=1)"} if runtime == "onnxruntime" else {}


def _is_onnx(folder: Path) -> bool:
    return (folder / ARTIFACT_FILE).exists() and open_artifact(folder, check=False).manifest.format == "onnx"
