"""What goes into and comes out of parts of a model in a forward pass, collected by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .anatomy import blocks

__all__ = ["BlockOutputs"]


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
