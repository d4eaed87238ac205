"""Attention heads: whole key-value groups go together with their query heads, or query heads go inside every group.

The size of a head stays, so the attention's inner width shrinks. That needs a config with a ``head_dim`` of its own:
Llama, Qwen2, Qwen3 and Gemma 3 have one. BERT, its kin, DistilBERT and GPT-2 compute it as ``hidden / heads`` when a
config is read (Transformers 5 has dropped its own head pruning), so a student with fewer heads would not load: refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..checkpoints import ARCHITECTURES, ModelFolder
from ..errors import RecipeError, Unsupported
from .anatomy import SLICES, base_model, blocks, set_everywhere, teacher_widths
from .importance import Floats, best
from .width import cut_linear

__all__ = ["HeadCounts", "choose_heads", "cut_heads", "resolve_heads"]


@dataclass(frozen=True)
class HeadCounts:
    """``heads`` query heads over ``kv_heads`` groups."""

    heads: int
    kv_heads: int


def resolve_heads(folder: ModelFolder, heads: int | None, kv_heads: int | None) -> HeadCounts:
    """What a recipe's ``heads`` and ``kv_heads`` come to; :class:`RecipeError` where the groups don't divide.

    ``kv_heads`` alone removes groups with all their query heads; ``heads`` alone removes query heads evenly inside
    the groups (or, where every head is its own group, groups).
    """
    widths = teacher_widths(folder)
    each = widths.heads // widths.kv_heads
    if heads is None and kv_heads is None:
        return HeadCounts(widths.heads, widths.kv_heads)
    groups = kv_heads or (heads if each == 1 and heads else widths.kv_heads)
    queries = heads or groups * each
    if groups > widths.kv_heads:
        raise RecipeError(
            f"[student] kv_heads = {groups}, but the teacher has {widths.kv_heads} groups", hint="keep fewer"
        )
    if queries > widths.heads:
        raise RecipeError(f"[student] heads = {queries}, but the teacher has {widths.heads}", hint="keep fewer")
    if queries % groups or queries // groups > each:
        most = groups * each
        raise RecipeError(
            f"[student] heads = {queries} can't be shared by {groups} groups of the teacher's {each} query heads",
            hint=f"a multiple of {groups}, at most {most}",
        )
    row = ARCHITECTURES[folder.architecture]
    if (queries, groups) != (widths.heads, widths.kv_heads) and row.head_size_from_hidden:
        raise Unsupported(
            f"fewer attention heads in {folder.architecture}: its config can't say a head's size, which it takes to be "
            "hidden size / heads, so the student would not load",
            hint="cut `ffn` or `layers` instead",
        )
    if row.heads_divide_hidden and folder.hidden_size % queries:
        raise Unsupported(
            f"{queries} attention heads in {folder.architecture}: its config is refused unless they divide the hidden "
            f"size, {folder.hidden_size}",
            hint="keep a number of heads that does",
        )
    return HeadCounts(queries, groups)


def choose_heads(scores: Floats, kv_heads: int, wanted: HeadCounts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one layer's query ``scores`` [heads], over ``kv_heads`` groups: the query heads and the groups that stay.

    A group counts as the sum of its query heads; inside each kept group the best ones stay.

    >>> choose_heads(np.array([1.0, 1.0, 3.0, 2.0]), 2, HeadCounts(1, 1))
    ((2,), (1,))
    """
    grouped = scores.reshape(kv_heads, -1)
    each = grouped.shape[1]
    groups = best(grouped.sum(1), wanted.kv_heads)
    inside = [best(grouped[group], wanted.heads // wanted.kv_heads) for group in groups]
    return tuple(group * each + at for group, chosen in zip(groups, inside, strict=True) for at in chosen), groups


def cut_heads(model: nn.Module, queries: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> None:
    """Keep only the query heads ``queries[i]`` and groups ``groups[i]`` of layer i, in place, config included."""
    base = base_model(model)
    config = base.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    table = SLICES[config.model_type]
    for layer, chosen, shared in zip(blocks(model), queries, groups, strict=True):
        index = {"query": _rows(chosen, size), "kv": _rows(shared, size)}
        for name, found in table.items():
            if found.what != "ffn":
                cut_linear(layer.get_submodule(name), index[found.what], found)
        for module in layer.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = len(chosen) // len(shared)
    set_everywhere(model, num_attention_heads=len(queries[0]), num_key_value_heads=len(groups[0]), head_dim=int(size))


def _rows(heads: Sequence[int], size: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.arange(head * size, (head + 1) * size) for head in heads]))
