"""GGUF for llama.cpp and what stands on it (Ollama, LM Studio): a model folder in, one file out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..artifact import Histogram, StoredTensor, TensorSpec
from ..errors import Unsupported
from ..grids import GGML_GRIDS, ggml_size, quantise
from ..progress import Progress
from ..quantisation_gguf import FILE_TYPES, parse
from ..runtimes.ggml_api import quantise_rows, requires_importance
from ..runtimes.gguf_file import GgufFile, GgufTensor
from ..runtimes.llamacpp_api import engine, engine_version
from .allocate_space import Encode
from .gguf_importance import Importance, importance_matrix
from .gguf_layout import Placed, place, rope_factors
from .gguf_metadata import Metadata, importance_metadata, kv_cache_bytes_per_token, model_metadata
from .gguf_tokenizer import tokenizer_metadata
from .gguf_types import FLOATS, NEED_IMPORTANCE, Mixture, needs_importance, storage_order, tensor_types
from .gguf_write import TensorSlot, write_gguf
from .writer import Draft, Weights, context_length

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig
    from .source import Source

__all__ = ["write"]

Floats = npt.NDArray[np.float32]

_ENTRY = "model.gguf"
_ROPE_FACTORS = "rope_freqs.weight"
# Values that are read, quantised and written at a time: memory follows this, not the model.
_PIECE_VALUES = 1 << 21


def write(
    source: Source,
    folder: Path,
    config: ExportConfig,
    calibration: Sequence[str],
    progress: Progress,
    *,
    types: Mapping[str, str] | None = None,
    encode: Encode | None = None,
) -> Draft:
    """Write ``source`` as ``folder/model.gguf`` in one of :data:`edgestill.quantisation_gguf.FILE_TYPES`.

    The file is the one that ``llama_model_quantize`` would make of the float32 model, byte for byte, but made piece by
    piece with GGML's own quantisers. ``types`` gives parameters, by name, another grid (``"q5_k"``, ``"iq4_xs"``):
    they get exactly that one, and with ``encode`` their bytes come from there. Where the type asks for an importance
    matrix (or one in ``types`` needs it and there is no ``encode``), it is measured on ``calibration``.

    Raises :class:`edgestill.errors.Unsupported` for what llama.cpp can't run (architecture, head, activation,
    tokenizer) and for a type that needs calibration texts where there are none, :class:`edgestill.errors.UsageError`
    for a wrong entry in ``types``, :class:`edgestill.errors.BadInput` for weights that are not finite, and
    :class:`edgestill.errors.MissingDependency` without ``llama-cpp-python``.
    """
    engine()
    model = source.folder
    kind = parse(config.quantisation)
    length = context_length(model, config)
    weights = Weights(model.path)
    placed = place(model, {name: weights.shape(name) for name in weights})
    needed = encode is None and any(grid in NEED_IMPORTANCE for grid in (types or {}).values())
    weighed = kind.importance or needed
    grids = tensor_types(placed, _mixture(model, kind.base, importance=weighed), types)
    importance = importance_matrix(source, calibration, progress) if weighed else None
    if encode is None:
        _check_importance(placed, grids, kind.base, importance)
    progress(f"{config.variant}: tokenizer", 0.0)
    metadata = model_metadata(model, length, FILE_TYPES[kind.base].number)
    tokenizer = tokenizer_metadata(model, metadata, folder)
    metadata |= tokenizer.metadata
    if importance is not None:
        metadata |= importance_metadata(importance.sha256, len(importance.values), importance.texts)
    if FILE_TYPES[kind.base].grid not in FLOATS:  # where llama_model_quantize puts them
        for key in ("general.quantization_version", "general.file_type"):
            metadata[key] = metadata.pop(key)
    target = folder / _ENTRY
    _write_tensors(
        target, model, metadata, placed, grids, weights, importance, kind.base, config.variant, progress, encode
    )
    with GgufFile(target) as written:
        histogram = written.histogram()
        _check_types(written, grids)
        contents = _contents(kind.name, FILE_TYPES[kind.base].grid, written.tensors, histogram)
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


def _mixture(model: ModelFolder, file_type: str, *, importance: bool) -> Mixture:
    heads = model.config.get("num_attention_heads") or 1
    gqa = heads // (model.config.get("num_key_value_heads") or heads) if model.task == "text-generation" else 1
    return Mixture(file_type, model.architecture, model.layers, gqa, importance)


def _write_tensors(
    path: Path,
    model: ModelFolder,
    metadata: Metadata,
    placed: Sequence[Placed],
    grids: Mapping[str, str],
    weights: Weights,
    importance: Importance | None,
    file_type: str,
    variant: str,
    progress: Progress,
    encode: Encode | None,
) -> None:
    sources = {item.stored: item for item in placed}
    factors = rope_factors(model) if model.task == "text-generation" else None
    slots: dict[str, TensorSlot] = {} if factors is None else {_ROPE_FACTORS: (_ROPE_FACTORS, factors.shape, "f32")}
    slots |= {item.stored: (item.stored, item.stored_shape, grids[item.stored]) for item in placed}
    order = list(slots) if FILE_TYPES[file_type].grid in FLOATS else storage_order(slots)
    threads, done = _threads(), 0

    def read(name: str) -> Iterator[Any]:
        nonlocal done
        done += 1
        progress(f"{variant}: {name} as {slots[name][2]}", 0.1 + 0.85 * done / len(slots))
        if name == _ROPE_FACTORS:
            yield factors
            return
        item, grid = sources[name], grids[name]
        own = encode if grid not in FLOATS else None
        weight = importance.weights(item.name) if importance is not None else None
        for piece in item.pieces(weights.rows, _PIECE_VALUES):
            yield _encode(item.name, grid, piece, weight, threads, own)

    write_gguf(path, metadata, [slots[name] for name in order], read)


def _check_importance(
    placed: Sequence[Placed], grids: Mapping[str, str], file_type: str, importance: Importance | None
) -> None:
    """:class:`Unsupported` for a tensor that would be garbage without the importance that it lacks."""
    for item in placed:
        grid = grids[item.stored]
        lacking = importance is None or item.name not in importance.values
        if lacking and (needs_importance(item.stored, grid, file_type) or requires_importance(grid)):
            raise Unsupported(
                f"{item.name} can't be {grid}: it is multiplied by nothing, so no importance of it can be measured",
                hint="give it a larger type",
            )


def _encode(
    name: str, grid: str, piece: Floats, weight: Floats | None, threads: int, own: Encode | None
) -> npt.NDArray[Any]:
    """The stored bytes of some rows of the parameter ``name``."""
    if own is not None:
        return own(name, grid, piece)
    if grid == "f32":
        return np.ascontiguousarray(piece, "<f4")
    if grid == "f16":
        if piece.size and np.abs(piece).max() > np.finfo(np.float16).max:
            raise Unsupported(f"{name} holds weights too large for f16", hint="take bf16, f32 or a quantised type")
        return quantise("f16", piece)
    return quantise_rows(grid, piece, weight, threads)


def _check_types(written: GgufFile, grids: Mapping[str, str]) -> None:
    wrong = [name for name, grid in grids.items() if written.tensors[name].grid != grid]
    assert not wrong, wrong


def _threads() -> int:
    """CPUs that this process may use; the bytes don't depend on it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(model: ModelFolder) -> TensorSpec:
    if model.task == "text-generation":
        return TensorSpec("logits", "float32", ("batch", "length", model.vocab_size))
    if model.task == "text-classification":
        return TensorSpec("logits", "float32", ("batch", len(model.labels)))
    return TensorSpec("sentence_embedding", "float32", ("batch", model.hidden_size))


def _contents(kind: str, grid: str, tensors: Mapping[str, GgufTensor], histogram: Mapping[str, Histogram]) -> str:
    """What is really inside: a label like Q4_K_M is a wish, and tensors with odd rows get another type.

    ``"Q4_K_M: 272 tensors: 30 q4_k, …; 180 fell back (180 to q5_0, 61.05 MB): row size not divisible by 256"``
    """
    found = ", ".join(f"{row.tensors} {name}" for name, row in histogram.items())
    label = f"{kind.upper()}: {len(tensors)} tensors: {found}"
    block = GGML_GRIDS[grid].elements
    fallen: dict[str, list[tuple[int, ...]]] = {}
    for tensor in tensors.values():
        if tensor.grid != "f32" and tensor.shape[-1] % block and GGML_GRIDS[tensor.grid].elements < block:
            fallen.setdefault(tensor.grid, []).append(tensor.shape)
    if fallen:
        where = " and ".join(
            f"{len(shapes)} to {name}, {sum(ggml_size(name, shape) for shape in shapes) / 1e6:,.2f} MB"
            for name, shapes in sorted(fallen.items())
        )
        count = sum(map(len, fallen.values()))
        label += f"; {count} fell back ({where}): row size not divisible by {block}"
    return label
