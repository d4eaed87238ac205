"""A GGUF file (Llama, Qwen2, Qwen3) -> a model folder: dequantised weights, config and tokenizer.

Each tensor is dequantised straight from the file's memory map; nothing of the GGUF itself is copied. Names and the
rotary permutation follow llama.cpp's ``convert_hf_to_gguf.py``; the token kinds are those of the GGUF specification.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import ModelFolder, TensorHeader, check_sizes, find_architecture, open_model
from .errors import BadInput, MissingDependency, Unsupported
from .files import atomic_directory
from .gguf_header import check_gguf_header
from .gguf_names import LLAMA_LIKE
from .progress import Progress, silent

__all__ = ["GgufSource", "import_gguf", "open_gguf"]

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROTARY_PERMUTED = ("llama",)  # llama.cpp stores Llama's q and k rows in the order of its own rotary kernel
_GLOBAL, _IN_BLOCK = ({stored: name for name, stored in names.items()} for names in LLAMA_LIKE)
_IGNORED = ("rope_freqs.weight",)  # only there with rotary scaling, which is refused


class GgufSource:
    """An opened GGUF file: metadata by key, and tensors by name (:class:`gguf.ReaderTensor`)."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Metadata ``key`` as ``kind``; :class:`BadInput` when it is of another kind, or absent without default."""
        value = self.metadata.get(key, default)
        if value is None or not isinstance(value, kind):
            what = "is missing" if value is None else f"is {str(value)[:40]!r}"
            raise BadInput(f"{self.path}: metadata {key} {what}", hint="the file is damaged or of an unknown dialect")
        return value


def open_gguf(path: Path) -> GgufSource:
    """Read the header of a GGUF file. Whatever a crafted header does to the reader is one :class:`BadInput`."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingDependency.package("gguf", "export") from None
    if not path.is_file():
        raise BadInput(f"{path} does not exist", hint="check the path")
    check_gguf_header(path)
    try:
        with np.errstate(all="ignore"):
            reader = gguf.GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    except MemoryError:
        raise BadInput(f"{path} has a damaged GGUF header: sizes beyond memory", hint="fetch the file again") from None
    except Exception as error:  # IndexError, ValueError, KeyError, struct.error …: all mean the same for a header
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path} is truncated or not a GGUF file: {reason}", hint="fetch the file again") from None
    return GgufSource(path, metadata, tensors)


def import_gguf(path: Path, out: Path, *, license: str | None = None, progress: Progress = silent) -> ModelFolder:
    """Turn a GGUF file into the model folder ``out`` (whole or not at all) and open it.

    Raises :class:`BadInput` for a damaged file and :class:`Unsupported` for another architecture, rotary scaling,
    mixtures of experts or a tokenizer that can't be rebuilt.
    """
    progress("reading the GGUF header", 0.0)
    source = open_gguf(path)
    config = read_config(source)
    names = {name: _student_name(name, source) for name in source.tensors if name not in _IGNORED}
    shapes = {names[n]: TensorHeader("F32", tuple(int(d) for d in source.tensors[n].shape[::-1])) for n in names}
    check_sizes(config, find_architecture(config, path), shapes, path)
    progress("rebuilding the tokenizer", 0.1)
    try:
        from .gguf_tokenizer import build_tokenizer
        from .torch_models import build_model, load_tokenizer, write_folder
    except ModuleNotFoundError as error:
        raise MissingDependency.package(error.name or "torch", "distill") from None
    from .gguf_origin import origin_from_gguf
    from .model_import import check_tokenizer, spdx

    tokenizer = build_tokenizer(source, config["max_position_embeddings"])
    state = _read_weights(source, config, names, progress)
    model = build_model(config, state, "text-generation", path)
    del state
    stated = source.metadata.get("general.license")
    described = ModelFolder(
        path=out, config={}, architecture=config["model_type"], task="text-generation", pooling=None, normalize=False,
        max_length=config["max_position_embeddings"], vocab_size=0, layers=0, hidden_size=0,
        license=license or (spdx(stated) if isinstance(stated, str) else None), labels=(), parameters=0, size_bytes=0,
        origin=origin_from_gguf(source.metadata),
    )  # fmt: skip
    progress("writing the model folder", 0.8)
    with atomic_directory(out) as folder:
        write_folder(model, tokenizer, folder, described)
        check_tokenizer(tokenizer, load_tokenizer(folder), path)
    progress("model folder written", 1.0)
    return open_model(out)


def read_config(source: GgufSource) -> dict[str, Any]:
    """A Transformers config from the metadata."""
    name = source.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise Unsupported(
            f"{source.path}: unsupported GGUF architecture {name!r}",
            hint=f"supported: {', '.join(ARCHITECTURES)}; else start from its Transformers folder",
        )

    def number(key: str, default: int | None = None) -> int:
        return int(source.get(f"{name}.{key}", int, default))

    scaling = source.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", None) or "rope_freqs.weight" in source.tensors:
        raise Unsupported(f"{source.path}: rotary scaling {scaling!r}", hint="start from its Transformers folder")
    if source.metadata.get(f"{name}.expert_count"):
        raise Unsupported(f"{source.path}: a mixture of experts", hint="use a dense model")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    if heads <= 0:
        raise BadInput(f"{source.path}: {heads} attention heads", hint="the file is damaged")
    head_dim = number("attention.key_length", number("rope.dimension_count", hidden // heads))
    if number("rope.dimension_count", head_dim) != head_dim or number("attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{source.path}: partial rotary embedding", hint="start from its Transformers folder")
    tokens = source.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[name],
        "architectures": [_CLASSES[name]],
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(source.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(source.get(f"{name}.rope.freq_base", float, 10000.0)),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in source.tensors and name != "qwen2",
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.get("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": source.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if name == "qwen2":
        del config["attention_bias"], config["head_dim"]  # its q, k, v always have one; its head size is derived
        if head_dim * heads != hidden:
            raise Unsupported(f"{source.path}: head size {head_dim} with {heads} heads of {hidden}", hint="use qwen3")
    _check_shapes(source, config, head_dim)
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32, so that 1e-5 does not become 9.999999747378752e-06.

    >>> _shortest(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))


def _check_shapes(source: GgufSource, config: Mapping[str, Any], head_dim: int) -> None:
    """Every tensor has the shape that the metadata promises (so that permuting and loading can't fail oddly)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    expected = {
        "attn_q.weight": (query, hidden), "attn_k.weight": (key, hidden), "attn_v.weight": (key, hidden),
        "attn_output.weight": (hidden, query), "ffn_gate.weight": (ffn, hidden), "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn), "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
    }  # fmt: skip
    for name, tensor in source.tensors.items():
        shape = tuple(int(size) for size in tensor.shape[::-1])
        wanted = expected.get(re.sub(r"^blk\.\d+\.", "", name), shape)
        if shape != wanted:
            raise BadInput(
                f"{source.path}: {name} is {list(shape)}, metadata says {list(wanted)}", hint="it is damaged"
            )


def _student_name(name: str, source: GgufSource) -> str:
    outside, _, kind = name.rpartition(".")
    if outside in _GLOBAL and kind == "weight":
        return f"{_GLOBAL[outside]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)", name)
    if match is None or match[2] not in _IN_BLOCK:
        raise Unsupported(f"{source.path}: unknown tensor {name}", hint="start from its Transformers folder")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"


def _read_weights(
    source: GgufSource, config: Mapping[str, Any], names: Mapping[str, str], progress: Progress
) -> dict[str, Any]:
    """State dict in fp32: dequantised, q and k back in the order of Transformers' rotary embedding."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state: dict[str, Any] = {}
    for done, (name, target) in enumerate(names.items()):
        tensor = source.tensors[name]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise Unsupported(
                f"{source.path}: {name} of type {tensor.tensor_type.name}: {error}", hint="use another quantisation"
            ) from None
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in heads and config["model_type"] in _ROTARY_PERMUTED:
            values = _undo_rotary_permutation(values, heads[part])
        if not np.isfinite(values).all():
            raise BadInput(f"{source.path}: {name} holds NaN or infinite values", hint="the file is damaged")
        state[target] = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the map is read-only
        progress("dequantising", 0.2 + 0.5 * (done + 1) / len(names))
    return state


def _undo_rotary_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head (rows ``[heads, half, 2]``); Transformers keeps them apart."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
