"""Our GGUF of SmolLM2 against llama.cpp's own converter: the same bits and keys, in less time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgestill.artifact import open_artifact

from ..context import Context
from ..environments import LLAMA_CPP_CONVERTER
from ..registry import Taken, figure
from .export import artifacts, beside, ratio

TO = "gguf:f16"
PEER = "llama.cpp's convert_hf_to_gguf.py"


@figure(
    "gguf_bit_equal", group="export", title="tensors and tokenizer keys of an f16 file that differ", unit="entries",
    limit=0.0, peer=PEER, environment=LLAMA_CPP_CONVERTER,
)  # fmt: skip
def gguf_bit_equal(context: Context, variant: str) -> Taken:
    """Every tensor (name, type, shape, bytes) and every ``tokenizer.*`` key of either file counts."""
    beside(context, TO, "decoder")
    folder, theirs = artifacts(context)
    ours, peer = (_contents(path) for path in (open_artifact(folder).entry, theirs))
    differing = sorted(name for name in ours.keys() | peer.keys() if not _same(ours.get(name), peer.get(name)))
    tensors = sum(not name.startswith("tokenizer.") for name in ours)
    how = f"{tensors} tensors, {len(ours) - tensors} tokenizer keys, {context.model_note('decoder')}"
    if differing:
        how += "; differing: " + ", ".join(differing[:12])
    return Taken(float(len(differing)), how, void="a tiny model" if context.tiny else "")


@figure(
    "gguf_time", group="export", title="time of an f16 export of SmolLM2 over llama.cpp's converter", unit="ratio",
    limit=0.5, peer=PEER, environment=LLAMA_CPP_CONVERTER,
)  # fmt: skip
def gguf_time(context: Context, variant: str) -> Taken:
    return ratio(context, TO, "seconds", "decoder")


@figure(
    "gguf_memory", group="export", title="peak memory of an f16 export of SmolLM2 over llama.cpp's converter",
    unit="ratio", limit=0.5, peer=PEER, environment=LLAMA_CPP_CONVERTER,
)  # fmt: skip
def gguf_memory(context: Context, variant: str) -> Taken:
    return ratio(context, TO, "peak_bytes", "decoder")


def _contents(path: Path) -> dict[str, Any]:
    """Tensors and tokenizer keys of a file, read by llama.cpp's own package: type, shape and bytes, or value."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    found: dict[str, Any] = {
        tensor.name: (int(tensor.tensor_type), tuple(int(size) for size in tensor.shape), np.asarray(tensor.data))
        for tensor in reader.tensors
    }
    return found | {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, tuple) and isinstance(right, tuple):
        return left[:2] == right[:2] and np.array_equal(left[2].view(np.uint8), right[2].view(np.uint8))
    return left is not None and right is not None and left == right
