"""A look at a model before anything is converted: what it is and how big, from config and headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifact import Pooling, Task
from .checkpoints import (
    ARCHITECTURES,
    Architecture,
    check_numbers,
    find_architecture,
    positions,
    read_config,
)
from .errors import BadInput
from .model_import import find_weights, gguf_inside, infer_task, license_of, read_source_facts, spdx

__all__ = ["Inspection", "Widths", "inspect_model"]


@dataclass(frozen=True)
class Inspection:
    """What a Transformers folder or a GGUF file holds. ``parameters`` counts stored weights, ``embedding`` those of the
    token embeddings, ``max_length`` is in tokens, ``size_bytes`` the files of the weights as they are."""

    source: Path
    architecture: str
    task: Task
    layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    parameters: int
    embedding: int
    size_bytes: int
    license: str | None = None
    pooling: Pooling | None = None
    widths: Widths | None = None

    def student_parameters(
        self, layers: int, *, ffn: float | None = None, heads: int | None = None, kv_heads: int | None = None
    ) -> int:
        """Parameters when only ``layers`` of its layers are kept, with ``ffn`` neurons (1 or less: that share) and so
        many ``heads`` over ``kv_heads`` groups; the rest (embeddings, norms, output) stays."""
        per_layer = (self.parameters - self.embedding) / self.layers
        if self.widths is not None:
            per_layer -= self.widths.saved(ffn, heads, kv_heads)
        return self.embedding + round(per_layer * layers)


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer: ``ffn`` neurons of ``neuron`` parameters each, ``heads`` over ``kv_heads`` groups, each of them
    with two matrices of ``head`` parameters (biases left out)."""

    ffn: int
    neuron: int
    heads: int
    kv_heads: int
    head: int

    @classmethod
    def of(cls, config: Mapping[str, Any], row: Architecture) -> Widths:
        """What a config says."""
        hidden, heads = int(config[row.hidden_key]), int(config[row.heads_key])
        size = int(config.get("head_dim") or hidden // heads)
        matrices = 3 if row.gated else 2
        groups = int(config.get("num_key_value_heads") or heads)
        return cls(int(config[row.ffn_key]), matrices * hidden, heads, groups, hidden * size)

    def saved(self, ffn: float | None, heads: int | None, kv_heads: int | None) -> float:
        """Parameters of a layer that a narrower one does not have."""
        each = self.heads // self.kv_heads
        groups = kv_heads or (heads if each == 1 and heads else self.kv_heads)
        neurons = self.ffn if ffn is None else self.ffn * ffn if ffn <= 1 else ffn
        gone = 2 * (self.heads - (heads or groups * each)) + 2 * (self.kv_heads - groups)
        return (self.ffn - neurons) * self.neuron + gone * self.head


def inspect_model(source: Path, *, task: str | None = None) -> Inspection:
    """Look at ``source`` without loading a weight; raises what :func:`edgestill.checkpoints.prepare_model` would raise
    for a model that can't be used (:class:`BadInput`, :class:`edgestill.errors.Unsupported`)."""
    if not source.exists():
        raise BadInput(f"{source} does not exist", hint="pass a Transformers folder or a .gguf file")
    if gguf := gguf_inside(source):
        return _inspect_gguf(gguf)
    if source.is_file():
        raise BadInput(f"{source} is not a model", hint="pass a Transformers folder or a .gguf file")
    facts = read_source_facts(source)
    config = read_config(facts.root)
    row = find_architecture(config, facts.root)
    chosen = infer_task(config, row, facts, task)
    find_architecture(config, facts.root, chosen)
    check_numbers(config, row, facts.root)
    files, header = find_weights(facts.root)
    size = sum(file.stat().st_size for file in files)
    embedding = int(config["vocab_size"]) * int(config[row.hidden_key])
    # A torch file has no header to read without loading it; its bytes are fp32 weights, near enough for a plan.
    parameters = sum(math.prod(tensor.shape) for tensor in header.values()) if header else size // 4
    pooling = (facts.pooling or "mean") if chosen == "feature-extraction" else None
    return Inspection(
        source, config["model_type"], chosen, config[row.layers_key], config[row.hidden_key], config["vocab_size"],  # type: ignore[arg-type]
        min(facts.max_length or 1 << 30, positions(config, row)), parameters, embedding, size,
        facts.license or license_of(source, config), pooling, Widths.of(config, row),
    )  # fmt: skip


def _inspect_gguf(path: Path) -> Inspection:
    from .gguf_import import open_gguf
    from .gguf_import import read_config as read_gguf_config

    opened = open_gguf(path)
    config = read_gguf_config(opened)
    stated = opened.metadata.get("general.license")
    return Inspection(
        path, config["model_type"], "text-generation", config["num_hidden_layers"], config["hidden_size"],
        config["vocab_size"], config["max_position_embeddings"],
        sum(math.prod(int(size) for size in tensor.shape) for tensor in opened.tensors.values()),
        config["vocab_size"] * config["hidden_size"], path.stat().st_size,
        spdx(stated) if isinstance(stated, str) else None, None, Widths.of(config, ARCHITECTURES[config["model_type"]]),
    )  # fmt: skip
