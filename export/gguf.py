"""GGUF for llama.cpp and what stands on it (Ollama, LM Studio): a model folder in, one file out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import Histogram, StoredTensor, TensorSpec
from ..grids import GGML_GRIDS
from ..progress import Progress
from ..runtimes.gguf_file import GgufFile, GgufTensor
from ..runtimes.llamacpp_api import FILE_TYPES, engine, engine_version
from . import gguf_native
from .gguf_layout import Placed, place, rope_factors
from .gguf_metadata import kv_cache_bytes_per_token, model_metadata
from .gguf_tokenizer import tokenizer_metadata
from .gguf_write import TensorSlot, write_gguf
from .writer import Draft, Weights, context_length

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["write"]

_ENTRY = "model.gguf"
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCKS = {"q8_0": 32, "q4_0": 32, "q4_k_m": 256}


def write(
    model: ModelFolder, folder: Path, config: ExportConfig, calibration: Sequence[str], progress: Progress
) -> Draft:
    """Write ``model`` as ``folder/model.gguf`` in ``f32``, ``f16``, ``q8_0``, ``q4_k_m`` or ``q4_0``.

    Quantised types are made by llama.cpp itself from a float32 file that is removed again. ``calibration`` is not used
    by these types. Raises :class:`edgestill.errors.Unsupported` for what llama.cpp can't run (architecture, head,
    activation, tokenizer), :class:`edgestill.errors.MissingDependency` without ``gguf`` or ``llama-cpp-python``.
    """
    engine()
    kind = config.quantisation
    length = context_length(model, config)
    weights = Weights(model.path)
    placed = place(model, {name: weights.shape(name) for name in weights})
    progress(f"{config.variant}: tokenizer", 0.0)
    metadata = model_metadata(model, length, FILE_TYPES["f16" if kind == "f16" else "f32"])
    tokenizer = tokenizer_metadata(model, metadata, folder)
    metadata |= tokenizer.metadata
    target = folder / _ENTRY
    floats = target if kind in ("f32", "f16") else folder / ".float.gguf"
    _write_floats(floats, model, metadata, placed, weights, kind == "f16", config.variant, progress)
    if floats != target:
        progress(f"{config.variant}: quantising with llama.cpp", 0.6)
        gguf_native.quantise(floats, target, kind, _threads())
        floats.unlink()
    with GgufFile(target) as written:
        histogram = written.histogram()
        contents = _contents(kind, written.tensors, histogram)
        if tokenizer.differing_scripts:
            contents += f"; llama.cpp tokenises {', '.join(tokenizer.differing_scripts)} otherwise than Transformers"
        tensors = [
            StoredTensor(item.name, item.stored, written.tensors[item.stored].grid, item.layout)
            for item in placed
            if not item.skip_rows  # stored as float32, so there is nothing to decode
        ]
    return Draft(
        entry=_ENTRY,
        inputs=(TensorSpec("input_ids", "int32", ("batch", "length")),),
        outputs=(_output(model),),
        shapes="dynamic",
        max_length=length,
        contents=contents,
        dtype_histogram=histogram,
        minimum_runtime={"llama.cpp": f"llama-cpp-python {engine_version()}"},
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(model),
        pooling_in_graph=model.task == "feature-extraction",
        tensors=tensors,
    )


def _write_floats(
    path: Path,
    model: ModelFolder,
    metadata: Mapping[str, object],
    placed: Sequence[Placed],
    weights: Weights,
    half: bool,
    variant: str,
    progress: Progress,
) -> None:
    """Matrices in float16 (``half``) or float32, everything else in float32: what llama.cpp's graphs expect."""
    sources = {item.stored: item for item in placed}
    factors = rope_factors(model) if model.task == "text-generation" else None
    slots: list[TensorSlot] = [] if factors is None else [(_ROPE_FACTORS, factors.shape, np.float32)]
    slots += [(i.stored, i.stored_shape, np.float16 if half and i.is_matrix else np.float32) for i in placed]
    done = 0

    def read(name: str) -> np.ndarray:
        nonlocal done
        done += 1
        progress(f"{variant}: {name}", 0.1 + 0.5 * done / len(slots))
        if name == _ROPE_FACTORS:
            assert factors is not None
            return factors
        return sources[name].transform(weights[sources[name].name])

    write_gguf(path, dict(metadata), slots, read)


def _threads() -> int:
    """CPUs that this process may use; the bytes don't depend on it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(model: ModelFolder) -> TensorSpec:
    if model.task == "text-generation":
        return TensorSpec("logits", "float32", ("batch", "length", model.vocab_size))
    if model.task == "text-classification":
        return TensorSpec("logits", "float32", ("batch", len(model.labels)))
    return TensorSpec("sentence_embedding", "float32", ("batch", model.hidden_size))


def _contents(kind: str, tensors: Mapping[str, GgufTensor], histogram: Mapping[str, Histogram]) -> str:
    """What is really inside: a label like Q4_K_M is a wish, and tensors with odd rows get another type.

    ``"Q4_K_M: 30 of 272 tensors q4_k, …; 180 fell back to q5_0 (rows not divisible by 256)"``
    """
    found = ", ".join(f"{row.tensors} {name}" for name, row in histogram.items())
    label = f"{kind.upper()}: {len(tensors)} tensors: {found}"
    block = _BLOCKS.get(kind, 1)
    fallen = Counter(
        tensor.grid
        for tensor in tensors.values()
        if tensor.grid not in ("f32",) and tensor.shape[-1] % block and GGML_GRIDS[tensor.grid].elements < block
    )
    if fallen:
        where = " and ".join(f"{count} to {name}" for name, count in sorted(fallen.items()))
        label += f"; {sum(fallen.values())} fell back ({where}): row size not divisible by {block}"
    return label
