"""Which iOS a Core ML program is written for, and which lengths it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import RecipeError, Unsupported, UsageError
from ..quantisation_coreml import CoremlQuantisation, parse

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["Target", "choose", "quantisation_of"]


@dataclass(frozen=True)
class Target:
    """``ios``: major version. ``lengths``: what the inputs may be long, rising; for ``dynamic`` the longest alone."""

    quantisation: CoremlQuantisation
    ios: int
    shapes: Literal["dynamic", "fixed", "enumerated"]
    lengths: tuple[int, ...]


def choose(model: ModelFolder, config: ExportConfig, context: int, types: Mapping[str, str]) -> Target:
    """What ``config`` asks for, or what it needs.

    Raises :class:`Unsupported` for a target that is older than what the weights, the shapes or a KV cache need,
    and for shapes that are not written; :class:`UsageError` for lengths that the model does not take.
    """
    generates = model.task == "text-generation"
    asked = config.shapes
    shapes: Literal["dynamic", "fixed", "enumerated"] = (
        "dynamic" if asked == "dynamic" else "fixed" if isinstance(asked, int) else "enumerated"
    )
    if generates and shapes != "dynamic":
        raise Unsupported(
            f"{config.variant}: a decoder's program takes any length: its cache grows token by token",
            hint='leave shapes out, or set shapes = "dynamic"',
        )
    if shapes == "fixed":  # the converter then folds position embeddings into tables that verification can't map back
        raise Unsupported(
            f"{config.variant}: a single fixed length is not written yet",
            hint=f"give two lengths, such as [{asked}, {context}]",
        )
    lengths = (context,) if asked == "dynamic" else (asked,) if isinstance(asked, int) else tuple(sorted(set(asked)))
    if lengths[-1] > context:
        raise UsageError(
            f"{config.variant}: a length of {lengths[-1]} is more than the {context} tokens that the artifact takes",
            hint=f"shapes of {context} or less",
        )
    quantisation = quantisation_of(config.quantisation)
    each = [quantisation, *(quantisation_of(name) for name in types.values())]
    needs = [(16, "an ML program")]
    needs += [(18, "a KV cache that the program keeps (states)")] if generates else []
    needs += [(18, "a choice of lengths (enumerated shapes of two inputs)")] if shapes == "enumerated" else []
    needs += [(one.ios, f"weights as {one.name}") for one in each]
    least, why = max(needs, key=lambda need: need[0])
    ios = int(config.min_target.removeprefix("iOS")) if config.min_target else least
    if ios < least:
        raise Unsupported(
            f"{config.variant}: {why} needs iOS {least}, the recipe asks for {config.min_target}",
            hint=f'min_target = "iOS{least}", or {_older(each, generates, shapes)}',
        )
    return Target(quantisation, ios, shapes, lengths)


def _older(each: list[CoremlQuantisation], generates: bool, shapes: str) -> str:
    """What an older system could run instead."""
    if generates:
        return "GGUF"
    return (
        'shapes = "dynamic"' if shapes == "enumerated" and max(one.ios for one in each) < 18 else "coreml:int8 or pal4"
    )


def quantisation_of(name: str) -> CoremlQuantisation:
    """What ``name`` means; :class:`RecipeError` for an unknown one."""
    try:
        return parse(name)
    except ValueError as error:
        raise RecipeError(str(error), hint="docs/recipe.md lists what Core ML takes") from None
