"""The sections of ``[distill]`` that say how weights are trained, beside its plain keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .recipe_base import Positive, PositiveFloat, Strict

__all__ = ["LoraConfig"]


class LoraConfig(Strict):
    """`[distill.lora]`: train small matrices beside the weights and add them to the weights in the end."""

    rank: Positive = 16
    """inner width of the added matrices."""
    alpha: PositiveFloat = 32.0
    """their product is multiplied by `alpha / rank`."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """names of the linear layers that get them, e.g. `["q_proj", "v_proj"]`; by default every one inside the layers."""
