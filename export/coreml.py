"""Write Core ML packages: encoders as ML programs for iOS 16, decoders with a stateful KV cache for iOS 18."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures import ARCHITECTURES
from ..artifact import TensorSpec
from ..errors import Unsupported
from ..progress import Progress, silent
from .writer import Draft, Weights, context_length

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["ENTRY", "write"]

ENTRY = "model.mlpackage"
_LONGEST_CONTEXT = 2048
"""Tokens of a decoder's state, by default: the cache is allocated whole, and positions are exact in float16."""


# Decoders that the wrapper of coreml_programs.py does not know, with what it lacks.
_NO_PROGRAM = {
    "gemma3_text": "its layers see different windows and have two rotary tables",
    "gpt2": "its positions are looked up, not rotated",
}


def write(
    model: ModelFolder,
    folder: Path,
    config: ExportConfig,
    calibration: Sequence[str] = (),
    progress: Progress = silent,
) -> Draft:
    """Write ``model.mlpackage`` into ``folder``; quantisations: ``fp16`` (with float32 where float16 is too small) and
    ``int8`` (weights, one scale a row).

    Needs about four times the float32 model in memory. Raises :class:`edgestill.errors.EdgestillError` when
    coremltools can't convert the model or changed its weights, and :class:`MissingDependency` without it.
    """
    from ..checkpoints import load_torch
    from ..runtimes.milproto import load_program
    from ..runtimes.payload_coreml import histogram
    from . import coreml_convert, coreml_package

    generates = model.task == "text-generation"
    if generates and model.architecture in _NO_PROGRAM:
        able = [name for name, row in ARCHITECTURES.items() if row.family == "decoder" and name not in _NO_PROGRAM]
        raise Unsupported(
            f"Core ML: no stateful program of {model.architecture} ({_NO_PROGRAM[model.architecture]})",
            hint=f"decoders that have one: {', '.join(able)}; export this one to onnx or gguf",
        )
    context = context_length(model, config, _LONGEST_CONTEXT if generates else None)
    progress(f"{config.variant}: tracing and converting")
    torch_model = load_torch(model.path)
    used = _parameters(torch_model, model)
    convert = coreml_convert.convert_decoder if generates else coreml_convert.convert_encoder
    converted = convert(model, torch_model, context)
    cache = _cache_bytes(torch_model) if generates else None
    if config.quantisation == "int8":
        progress(f"{config.variant}: quantising weights")
        converted = coreml_convert.compress_int8(converted)
    progress(f"{config.variant}: writing")
    package = folder / ENTRY
    coreml_package.write_package(
        converted, package, description=f"{model.task}, {config.quantisation}, by edgestill", license=model.license
    )
    program = load_program(package)
    rows = histogram(program)
    inputs, outputs = _decoder_specs(model) if generates else _encoder_specs(model)
    return Draft(
        entry=ENTRY,
        inputs=inputs,
        outputs=outputs,
        shapes="dynamic",
        max_length=context,
        contents=", ".join(f"{row.tensors} tensors {name}" for name, row in rows.items()),
        dtype_histogram=rows,
        minimum_runtime={"ios": "18" if generates else "16"},
        kv_cache_bytes_per_token=cache,
        pooling_in_graph=model.pooling is not None,
        tensors=coreml_package.map_weights(program, Weights(model.path), used),
    )


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


def _encoder_specs(model: ModelFolder) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = tuple(TensorSpec(name, "int32", (1, "length")) for name in ("input_ids", "attention_mask"))
    if model.pooling is not None:
        return inputs, (TensorSpec("sentence_embedding", "float32", (1, model.hidden_size)),)
    return inputs, (TensorSpec("logits", "float32", (1, len(model.labels))),)


def _decoder_specs(model: ModelFolder) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = (
        TensorSpec("input_ids", "int32", (1, "length")),
        TensorSpec("causal_mask", "float16", (1, 1, "length", "total")),
    )
    return inputs, (TensorSpec("logits", "float16", (1, "length", model.vocab_size)),)
