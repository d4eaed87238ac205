"""What happens inside of a model while it reads: block outputs, attention, queries, keys and values, through hooks.

Nothing is computed twice and the model's own code runs, so that what is heard is what it does: with its rotary
positions, position biases, norms and masks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..checkpoints import ARCHITECTURES
from ..errors import RecipeError
from .anatomy import SLICES, base_model, blocks
from .hooks import BlockOutputs
from .signal import Attention, Hidden, Relations

__all__ = ["Heard", "Taps"]

# Where attention shows itself in families whose attention module never gives it out: a module that it passes through.
_PASSES_THROUGH = {"mpnet": "dropout"}


@dataclass(frozen=True)
class Heard:
    """What was heard in one forward pass; a field is ``None`` where nobody asked.

    ``blocks``: outputs [B, T, D] of the chosen blocks; ``attention``: their maps [B, H, T, T], H query heads (with
    grouped queries, each with the keys of its group); ``relations``: of the **last** chosen block.
    """

    blocks: tuple[Tensor, ...] | None = None
    attention: tuple[Tensor, ...] | None = None
    relations: Relations | None = None

    def outside(self) -> Heard:
        """The same as copies that autograd may save (it refuses tensors of ``inference_mode``)."""

        def copies(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(tensor.clone() for tensor in tensors)

        found = self.relations
        if found is not None:
            found = replace(found, queries=found.queries.clone(), keys=found.keys.clone(), values=found.values.clone())
        return Heard(copies(self.blocks), copies(self.attention), found)


class Taps:
    """Listens to the blocks ``layers`` of a model of the architectures table; ``kinds`` of :data:`.signal.INSIDE`.

    Listening to attention makes the model compute it step by step ("eager"): the fused kernels never hold the maps.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], kinds: Collection[type]) -> None:
        total = len(blocks(model))
        if not layers or not all(0 <= layer < total for layer in layers):
            raise RecipeError(f"no layers {list(layers)} in a model of {total}", hint=f"name layers 0 to {total - 1}")
        self._layers = tuple(layers)
        self._base = base_model(model)
        self._handles: list[Any] = []
        self._attention: dict[int, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._kinds = frozenset(kinds)
        self._open = False
        self._was: str | None = None
        # From here to `take`: a layer that is computed again for its gradient must not be heard again.
        self._handles.append(self._base.register_forward_pre_hook(self._begin))
        self._blocks = BlockOutputs(model, layers) if Hidden in self._kinds else None
        if Attention in self._kinds:
            self._was = self._base.config._attn_implementation
            self._base.set_attn_implementation("eager")
            for layer in set(layers):
                self._listen_to_attention(blocks(model)[layer], layer)
        if Relations in self._kinds:
            self._listen_to_vectors(blocks(model)[self._layers[-1]])

    @property
    def _family(self) -> str:
        return str(self._base.config.model_type)

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._open = True
        self._attention.clear()
        self._vectors.clear()

    def _listen_to_attention(self, block: nn.Module, layer: int) -> None:
        [query, *_] = _projections(self._family)
        attention = block.get_submodule(query.rpartition(".")[0])
        inner = _PASSES_THROUGH.get(self._family)

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._open:
                self._attention[layer] = output if inner else output[1]

        heard = attention.get_submodule(inner) if inner else attention
        self._handles.append(heard.register_forward_hook(keep))

    def _listen_to_vectors(self, block: nn.Module) -> None:
        names = _projections(self._family)

        def keeper(name: str) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                if self._open:
                    self._vectors[name] = output

            return keep

        for name in names:
            self._handles.append(block.get_submodule(name).register_forward_hook(keeper(name)))

    def _relations(self) -> Relations:
        config = self._base.config
        heads = int(getattr(config, ARCHITECTURES[self._family].heads_key))
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        found = [self._vectors[name] for name in _projections(self._family)]
        if len(found) == 1:  # fused: queries, then keys, then values
            size = found[0].shape[-1] // (heads + 2 * groups)
            found = list(found[0].split([heads * size, groups * size, groups * size], dim=-1))
        queries, keys, values = found
        return Relations(queries, keys, values, groups)

    def take(self) -> Heard:
        """What the last forward pass said, in the order of the layers asked for; forgets it."""
        heard = Heard(
            blocks=self._blocks.take() if self._blocks is not None else None,
            attention=tuple(self._attention[layer] for layer in self._layers) if Attention in self._kinds else None,
            relations=self._relations() if Relations in self._kinds else None,
        )
        self._open = False
        self._attention.clear()
        self._vectors.clear()
        return heard

    def remove(self) -> None:
        """Take the hooks off; attention is computed as before."""
        for handle in self._handles:
            handle.remove()
        if self._blocks is not None:
            self._blocks.remove()
        if self._was is not None:
            self._base.set_attn_implementation(self._was)


def _projections(family: str) -> tuple[str, ...]:
    """Modules inside a block that make queries, keys and values, in this order; one name where they are fused."""
    table = SLICES[family]
    if fused := [name for name, part in table.items() if part.what == "qkv"]:
        return tuple(fused)
    queries = [name for name, part in table.items() if (part.what, part.axis) == ("query", 0)]
    others = [name for name, part in table.items() if (part.what, part.axis) == ("kv", 0)]
    return tuple(dict.fromkeys([*queries, *others]))
