"""Students cut from their teacher: keep some of its layers, and everything else as it is.

A layer-reduced copy of the teacher beats a foreign small model (sentence-transformers, DistilBERT). Keeping all
layers gives the teacher's outputs exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..checkpoints import ARCHITECTURES, ModelFolder, SentenceEncoder, load_torch
from ..errors import RecipeError, Unsupported
from ..recipe import StudentConfig

__all__ = [
    "BlockOutputs",
    "base_model",
    "blocks",
    "choose_layers",
    "cut_layers",
    "make_student",
    "map_layers",
    "spread",
]

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


def map_layers(how: str, keep: Sequence[int], total: int) -> tuple[int, ...]:
    """Which teacher layer each student layer imitates: ``kept``, ``skip`` or ``last`` (PKD, arXiv 1908.09355).

    >>> map_layers("kept", (0, 2, 5), 6), map_layers("skip", (0, 2, 5), 6), map_layers("last", (0, 2, 5), 6)
    ((0, 2, 5), (1, 3, 5), (3, 4, 5))
    """
    count = len(keep)
    if how == "kept":
        return tuple(keep)
    if how == "skip":
        return tuple((index + 1) * total // count - 1 for index in range(count))
    if how == "last":
        return tuple(range(total - count, total))
    raise RecipeError(f"unknown layer_map {how!r}", hint="known: kept, skip, last")


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


def make_student(teacher: ModelFolder, keep: Sequence[int]) -> nn.Module:
    """A fresh fp32 copy of the teacher with only the layers ``keep``, in ``eval()``."""
    student = load_torch(teacher.path)
    cut_layers(student, keep)
    return student


class BlockOutputs:
    """Collects what chosen blocks put out in a forward pass, through hooks.

    Not ``output_hidden_states``: there, index 0 is the embedding and the last entry comes after the final norm.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[int]) -> None:
        layers = blocks(model)
        self._found: dict[int, Tensor] = {}
        self._chosen = tuple(chosen)
        self._handles = [layers[index].register_forward_hook(self._keeper(index)) for index in set(chosen)]

    def _keeper(self, index: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._found[index] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> tuple[Tensor, ...]:
        """The outputs ``[B, T, D]`` of the last pass, in the order asked for; forgets them."""
        states = tuple(self._found[index] for index in self._chosen)
        self._found.clear()
        return states

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
