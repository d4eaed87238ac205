"""The parts of a Transformer that shape can change: layers, FFN neurons, attention heads, and where each lies.

One table says, for each family, which matrices a neuron or a head is a row or a column of. The count of a planned
student's parameters, the measuring of importance and the cutting itself all read it, so they can't disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..checkpoints import ARCHITECTURES, WEIGHTS_FILE, ModelFolder, SentenceEncoder, read_safetensors_header
from ..errors import Unsupported

__all__ = [
    "SLICES",
    "Part",
    "Slice",
    "Widths",
    "base_model",
    "blocks",
    "count_parameters",
    "find_module",
    "head_size",
    "part_of",
    "set_everywhere",
    "teacher_widths",
]

Part = Literal["embedding", "attention", "ffn", "other"]


@dataclass(frozen=True)
class Slice:
    """One matrix of a layer whose ``axis`` counts neurons (``ffn``), query heads or key-value heads times head size.

    ``qkv`` counts all heads of one matrix for queries, keys and values, in this order. ``axis`` 0: each is some rows of
    ``weight`` (and entries of ``bias``); 1: some columns, the bias stays whole. ``turned``: the weight is stored as
    columns by rows (Conv1D).
    """

    what: Literal["ffn", "query", "kv", "qkv"]
    axis: Literal[0, 1]
    turned: bool = False

    @property
    def stored_axis(self) -> int:
        """The axis of the weight as it is stored."""
        return 1 - self.axis if self.turned else self.axis


_GATED = {
    "mlp.gate_proj": Slice("ffn", 0), "mlp.up_proj": Slice("ffn", 0), "mlp.down_proj": Slice("ffn", 1),
    "self_attn.q_proj": Slice("query", 0), "self_attn.k_proj": Slice("kv", 0), "self_attn.v_proj": Slice("kv", 0),
    "self_attn.o_proj": Slice("query", 1),
}  # fmt: skip
_BERT = {
    "intermediate.dense": Slice("ffn", 0), "output.dense": Slice("ffn", 1),
    "attention.self.query": Slice("query", 0), "attention.self.key": Slice("kv", 0),
    "attention.self.value": Slice("kv", 0), "attention.output.dense": Slice("query", 1),
}  # fmt: skip
_MPNET = {
    "intermediate.dense": Slice("ffn", 0), "output.dense": Slice("ffn", 1),
    "attention.attn.q": Slice("query", 0), "attention.attn.k": Slice("kv", 0), "attention.attn.v": Slice("kv", 0),
    "attention.attn.o": Slice("query", 1),
}  # fmt: skip
_DISTILBERT = {
    "ffn.lin1": Slice("ffn", 0), "ffn.lin2": Slice("ffn", 1),
    "attention.q_lin": Slice("query", 0), "attention.k_lin": Slice("kv", 0), "attention.v_lin": Slice("kv", 0),
    "attention.out_lin": Slice("query", 1),
}  # fmt: skip

_GPT2 = {
    "mlp.c_fc": Slice("ffn", 0, turned=True), "mlp.c_proj": Slice("ffn", 1, turned=True),
    "attn.c_attn": Slice("qkv", 0, turned=True), "attn.c_proj": Slice("query", 1, turned=True),
}  # fmt: skip

SLICES: Mapping[str, Mapping[str, Slice]] = {
    "bert": _BERT, "electra": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "mpnet": _MPNET,
    "distilbert": _DISTILBERT, "llama": _GATED, "qwen2": _GATED, "qwen3": _GATED, "gemma3_text": _GATED, "gpt2": _GPT2,
}  # fmt: skip
"""Model type -> module inside a layer -> how it is sliced."""

_POSITIONS = ("transformer.wpe.weight",)  # tables of positions that no module called embeddings holds


@dataclass(frozen=True)
class Widths:
    """Sizes of one model: ``ffn`` neurons a layer, ``heads`` query heads over ``kv_heads`` groups, token ids."""

    ffn: int
    heads: int
    kv_heads: int
    vocab_size: int


def teacher_widths(folder: ModelFolder) -> Widths:
    """The widths that a model folder has."""
    row, config = ARCHITECTURES[folder.architecture], folder.config
    heads = int(config[row.heads_key])
    return Widths(int(config[row.ffn_key]), heads, int(config.get("num_key_value_heads") or heads), folder.vocab_size)


def head_size(folder: ModelFolder) -> int:
    """Numbers in one attention head; cutting heads does not change it."""
    heads = int(folder.config[ARCHITECTURES[folder.architecture].heads_key])
    return int(folder.config.get("head_dim") or folder.hidden_size // heads)


def part_of(folder: ModelFolder, name: str) -> tuple[Part, int | None, Slice | None]:
    """For a stored tensor: the group it is counted in, its layer, and how it is sliced (``None``: not at all)."""
    prefix = f"{folder.layers_path}."
    if not name.startswith(prefix):
        tables = (folder.embeddings_path, *_POSITIONS)
        table = name in tables or name.startswith("lm_head.") or "embeddings." in name
        return ("embedding" if table else "other"), None, None
    number, _, inside = name.removeprefix(prefix).partition(".")
    module, _, kind = inside.rpartition(".")
    found = SLICES[folder.architecture].get(module)
    group: Part = "other" if found is None else "ffn" if found.what == "ffn" else "attention"
    sliced = None if found is None or (kind == "bias" and found.axis == 1) else found
    return group, int(number), sliced


def count_parameters(folder: ModelFolder, keep: tuple[int, ...], widths: Widths) -> dict[Part, int]:
    """Parameters by group of a student with the teacher's layers ``keep`` and these ``widths``; reads no weight.

    ``embedding``: tables of tokens and positions with their norm, and an output layer that is not tied to them;
    ``other``: norms of the layers, pooler, classifier.
    """
    size = head_size(folder)
    planned = {"ffn": widths.ffn, "query": widths.heads * size, "kv": widths.kv_heads * size,
               "qkv": (widths.heads + 2 * widths.kv_heads) * size}  # fmt: skip
    counts: dict[Part, int] = {"embedding": 0, "attention": 0, "ffn": 0, "other": 0}
    for name, tensor in read_safetensors_header(folder.path / WEIGHTS_FILE).items():
        group, layer, found = part_of(folder, name)
        if layer is not None and layer not in keep:
            continue
        shape = list(tensor.shape)
        if found is not None:
            shape[found.stored_axis if len(shape) > 1 else 0] = planned[found.what]
        if name == folder.embeddings_path or name.startswith("lm_head."):
            shape[0] = widths.vocab_size
        counts[group] += math.prod(shape)
    return counts


def base_model(model: nn.Module) -> Any:
    """The Transformers base model (embeddings and layers, no head) inside a task's model or sentence encoder."""
    if isinstance(model, SentenceEncoder):
        return model.encoder
    inner: Any = model
    return inner.base_model


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a model of the architectures table."""
    base = base_model(model)
    row = ARCHITECTURES.get(base.config.model_type)
    if row is None:
        raise Unsupported(
            f"layers of {base.config.model_type!r}", hint=f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    found: nn.ModuleList = base.get_submodule(row.layers)
    return found


def find_module(model: nn.Module, what: str, axis: int) -> str:
    """The first module inside a layer that slices ``what`` along ``axis``, e.g. ``"mlp.down_proj"``."""
    table = SLICES[base_model(model).config.model_type]
    return next(name for name, found in table.items() if (found.what, found.axis) == (what, axis))


def set_everywhere(model: nn.Module, **values: Any) -> None:
    """Set config entries on the model's config, its base model's and those that its modules hold."""
    base = base_model(model)
    for config in {id(part.config): part.config for part in (model, base) if hasattr(part, "config")}.values():
        for key, value in values.items():
            setattr(config, key, value)
