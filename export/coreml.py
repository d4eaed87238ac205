"""Write Core ML packages: encoders as ML programs for iOS 16 or later, decoders with a stateful KV cache for iOS 18."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures import ARCHITECTURES
from ..artifact import ISLANDS_FILE, Histogram, StoredTensor, TensorSpec
from ..errors import Unsupported
from ..files import atomic_write
from ..progress import Progress, silent
from . import coreml_target
from .coreml_compress import Coder, Fallback
from .coreml_islands import Islands, as_json, describe
from .coreml_target import Target
from .writer import Draft, Weights, context_length

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig
    from .source import Source

__all__ = ["ENTRY", "Converted", "convert", "write"]

ENTRY = "model.mlpackage"
_LONGEST_CONTEXT = 2048
"""Tokens of a decoder's state, by default: the cache is allocated whole, and positions are exact in float16."""


# Decoders that the wrapper of coreml_programs.py does not know, with what it lacks.
_NO_PROGRAM = {
    "gemma3_text": "its layers see different windows and have two rotary tables",
    "gpt2": "its positions are looked up, not rotated",
}


def write(
    source: Source,
    folder: Path,
    config: ExportConfig,
    calibration: Sequence[str] = (),
    progress: Progress = silent,
    *,
    types: Mapping[str, str] | None = None,
    converted: Converted | None = None,
    coder: Coder | None = None,
) -> Draft:
    """Write ``model.mlpackage`` into ``folder``, its matrices stored as ``config`` says, and ``islands.json``.

    ``types`` gives some parameters (names of the model folder) another storage, in the same language. ``converted`` is
    what :func:`convert` made of the same model, and ``coder`` finds the codes. Needs about four times the float32 model
    in memory. Raises :class:`edgestill.errors.EdgestillError` when coremltools can't convert
    the model or changed its weights, :class:`Unsupported` for a target that is too old for what is asked, and
    :class:`MissingDependency` without coremltools.
    """
    from ..runtimes.milproto import load_program
    from ..runtimes.payload_coreml import histogram
    from . import coreml_package

    model = source.folder
    made = converted or convert(source, config, types or {}, progress, calibration)
    target, tensors = made.target, made.tensors
    plan = coreml_package.plan_of(made.program, tensors, target.quantisation, types or {})
    progress(f"{config.variant}: compressing and writing" if plan else f"{config.variant}: writing")
    package = folder / ENTRY
    fallbacks = coreml_package.write_package(
        made.program, package, description=made.description, license=model.license, plan=plan, coder=coder
    )
    if made.islands is not None:
        facts = {"source": made.source, **as_json(made.islands)}
        atomic_write(folder / ISLANDS_FILE, json.dumps(facts, indent=1) + "\n")
    program = load_program(package)
    rows = histogram(program)
    generates = model.task == "text-generation"
    decoder = _decoder_specs(model, "float32" if target.quantisation.bits == 32 else "float16")
    inputs, outputs = decoder if generates else _encoder_specs(model, target)
    return Draft(
        entry=ENTRY,
        inputs=inputs,
        outputs=outputs,
        shapes=target.shapes,
        max_length=made.context if generates else target.lengths[-1],
        contents=_contents(rows, fallbacks, tensors, made.islands),
        dtype_histogram=rows,
        minimum_runtime={"ios": str(target.ios)},
        kv_cache_bytes_per_token=made.cache_bytes,
        pooling_in_graph=model.pooling is not None,
        tensors=coreml_package.with_grids(tensors, program),
    )


@dataclass(frozen=True)
class Converted:
    """A model as a program with float weights: what coremltools made (``program``), where each parameter lies in it
    (``tensors``), for whom (``target``, ``context`` tokens), the cache's bytes a token, and which operations stay in
    float32 (``islands``; ``None`` when all of them are) by what was measured on the text that ``source`` names."""

    program: Any
    tensors: list[StoredTensor]
    target: Target
    context: int
    cache_bytes: int | None
    description: str
    islands: Islands | None
    source: str


def convert(
    source: Source, config: ExportConfig, types: Mapping[str, str], progress: Progress, texts: Sequence[str]
) -> Converted:
    """The model traced and converted, its weights found again; its float32 islands are measured on ``texts``, or on
    built-in lines when there are none. Raises as :func:`write` does."""
    from ..runtimes.milproto import load_program
    from . import coreml_convert, coreml_package

    model = source.folder
    if model.task == "token-classification":
        raise Unsupported("Core ML: no program of a token-classification model", hint="export it to onnx")
    generates = model.task == "text-generation"
    if generates and model.architecture in _NO_PROGRAM:
        able = [name for name, row in ARCHITECTURES.items() if row.family == "decoder" and name not in _NO_PROGRAM]
        raise Unsupported(
            f"Core ML: no stateful program of {model.architecture} ({_NO_PROGRAM[model.architecture]})",
            hint=f"decoders that have one: {', '.join(able)}; export this one to onnx or gguf",
        )
    context = context_length(model, config, _LONGEST_CONTEXT if generates else None)
    target = coreml_target.choose(model, config, context, types)
    progress(f"{config.variant}: tracing and converting")
    torch_model = source.torch()[0]
    used = _parameters(torch_model, model)
    cache = _cache_bytes(torch_model) if generates else None
    precision: Any = "float32" if target.quantisation.bits == 32 else "islands"
    if generates:
        converted = coreml_convert.convert_decoder(source, torch_model, context, precision=precision, texts=texts)
    else:
        converted = coreml_convert.convert_encoder(
            source, torch_model, target.lengths, shapes=target.shapes, precision=precision, ios=target.ios,
            texts=texts,
        )  # fmt: skip
    del torch_model
    tensors = coreml_package.map_weights(load_program(Path(converted.model.package_path)), Weights(model.path), used)
    description = f"{model.task}, {config.quantisation}, by edgestill"
    return Converted(converted.model, tensors, target, context, cache, description, converted.islands, converted.source)


def _contents(
    rows: Mapping[str, Histogram], fallbacks: Sequence[Fallback], tensors: Sequence[StoredTensor],
    islands: Islands | None,
) -> str:  # fmt: skip
    """What is inside, what is computed in float32, and which parameters could not be stored as asked."""
    said = ", ".join(f"{row.tensors} tensors {name}" for name, row in rows.items()) + describe(islands)
    if not fallbacks:
        return said
    names = {tensor.stored: tensor.name for tensor in tensors}
    first = fallbacks[0]
    more = f" and {len(fallbacks) - 1} more" if fallbacks[1:] else ""
    return f"{said} ({names[first.name]}{more} fell back, to {first.stored}: {first.reason})"


def _parameters(torch_model: object, model: ModelFolder) -> list[str]:
    """Stored parameters that the traced model has, by their names in the folder."""
    inner = getattr(torch_model, "encoder", torch_model) if model.pooling is not None else torch_model
    names = {name for name, _ in inner.named_parameters()}  # type: ignore[attr-defined]
    return [name for name in Weights(model.path) if name in names]


def _cache_bytes(torch_model: object) -> int:
    """Bytes of keys and values that one token adds to the state, float16."""
    config = torch_model.config  # type: ignore[attr-defined]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size)


def _encoder_specs(model: ModelFolder, target: Target) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    length = target.lengths[0] if target.shapes == "fixed" else "length"
    inputs = tuple(TensorSpec(name, "int32", (1, length)) for name in ("input_ids", "attention_mask"))
    if model.pooling is not None:
        return inputs, (TensorSpec("sentence_embedding", "float32", (1, model.hidden_size)),)
    return inputs, (TensorSpec("logits", "float32", (1, len(model.labels))),)


def _decoder_specs(model: ModelFolder, dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = (
        TensorSpec("input_ids", "int32", (1, "length")),
        TensorSpec("causal_mask", dtype, (1, 1, "length", "total")),
    )
    return inputs, (TensorSpec("logits", dtype, (1, "length", model.vocab_size)),)
