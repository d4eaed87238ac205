"""Depth: which of the teacher's layers a student keeps, and dropping the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..checkpoints import ARCHITECTURES
from ..errors import RecipeError
from ..recipe import StudentConfig
from .anatomy import base_model, blocks

__all__ = ["choose_layers", "cut_layers", "spread"]

# Config entries that hold one value for each layer. Transformers 5 checks the length of `layer_types`.
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` layers, evenly, the first and the last among them (one layer: the first).

    >>> spread(3, 6), spread(4, 12), spread(1, 6)
    ((0, 2, 5), (0, 4, 7, 11), (0,))
    """
    if count == 1:
        return (0,)
    # Half up, but in whole numbers, so that no rounding mode decides; 2.5 goes down as DistilBERT's map does.
    return tuple((2 * index * (total - 1) + count - 2) // (2 * (count - 1)) for index in range(count))


def choose_layers(config: StudentConfig, total: int) -> tuple[int, ...]:
    """The teacher layers that a recipe keeps; all when it says nothing. :class:`RecipeError` for impossible ones."""
    if config.keep is not None:
        if not config.keep or config.keep[-1] >= total:
            raise RecipeError(
                f"[student] keep = {list(config.keep)}, but the teacher has layers 0 to {total - 1}",
                hint="name layers that it has",
            )
        return tuple(config.keep)
    if config.layers is not None and config.layers > total:
        raise RecipeError(f"[student] layers = {config.layers}, but the teacher has {total}", hint="keep fewer")
    return spread(config.layers or total, total)


def cut_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Drop all layers of ``model`` but ``keep``, in place: weights, layer numbers and per-layer config lists.

    Nothing is copied, so tied embeddings stay tied.
    """
    base = base_model(model)
    row = ARCHITECTURES[base.config.model_type]
    layers = blocks(model)
    total = len(layers)
    parent, _, name = row.layers.rpartition(".")
    kept = nn.ModuleList([layers[index] for index in keep])
    setattr(base.get_submodule(parent), name, kept)
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # the KV cache is indexed by it
    configs = {id(part.config): part.config for part in (model, base) if hasattr(part, "config")}
    for config in configs.values():
        for key in PER_LAYER_KEYS:
            values = getattr(config, key, None)
            if isinstance(values, (list, tuple)) and len(values) == total:
                setattr(config, key, [values[index] for index in keep])
        setattr(config, row.layers_key, len(keep))
