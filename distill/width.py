"""FFN width: the neurons of each layer that stay, and slicing them out of its matrices.

A neuron is one row of the first matrix (of both, in a gated FFN) and one column of the last. Its removal is exact: the
student computes what the teacher would with that neuron's activation held at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..checkpoints import ARCHITECTURES
from .anatomy import SLICES, Slice, base_model, blocks, set_everywhere

__all__ = ["cut_ffn", "cut_linear"]


def cut_ffn(model: nn.Module, neurons: Sequence[Sequence[int]]) -> None:
    """Keep only ``neurons[i]`` of layer i, in place; every layer keeps the same number, which the config then says."""
    base = base_model(model)
    table = SLICES[base.config.model_type]
    for layer, kept in zip(blocks(model), neurons, strict=True):
        for name, found in table.items():
            if found.what == "ffn":
                cut_linear(layer.get_submodule(name), torch.tensor(kept), found)
    set_everywhere(model, **{ARCHITECTURES[base.config.model_type].ffn_key: len(neurons[0])})


def cut_linear(linear: nn.Module, index: torch.Tensor, part: Slice) -> None:
    """Keep the rows (``part.axis`` 0, with their biases) or columns (1) ``index`` of a linear layer, in place."""
    weight: torch.Tensor = linear.get_parameter("weight")
    linear.weight = nn.Parameter(weight.detach().index_select(part.stored_axis, index).clone())
    if part.axis == 0 and getattr(linear, "bias", None) is not None:
        linear.bias = nn.Parameter(linear.get_parameter("bias").detach().index_select(0, index).clone())
    if part.turned:
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape
