"""Low-rank training (LoRA, arXiv 2106.09685): the weights stay, small matrices beside them learn and are added in.

Cheap in memory, but students lose quality by it: their weights must move far. So it is never the default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import MissingDependency, RecipeError, nearest
from ..recipe_training import LoraConfig
from .anatomy import blocks

__all__ = ["add_lora", "merge_lora"]


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze ``model`` and put trainable matrices beside its linear layers, in place; its outputs don't change yet.

    Raises :class:`RecipeError` for a target that names no linear layer, :class:`MissingDependency` without peft.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise MissingDependency.package("peft", "distill") from None
    layers = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = [f"{prefix}.{name}" for name, module in layers.named_modules() if _is_linear(module)]
    chosen = linear
    if config.targets:
        chosen = []
        for target in config.targets:
            found = [name for name in linear if name == target or name.endswith(f".{target}")]
            if not found:
                known = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise RecipeError(
                    f"[distill] lora.targets: no linear layer is called {target!r}", hint=nearest(target, known)
                )
            chosen += found
    model.requires_grad_(False)
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=sorted(set(chosen)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the matrices' start
        peft.inject_adapter_in_model(settings, model)


def merge_lora(model: nn.Module) -> None:
    """Add the matrices to the weights and take them out: a plain model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            inner: Any = module
            inner.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner.get_base_layer())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, a linear layer turned over
