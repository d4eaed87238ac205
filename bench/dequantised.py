"""The student with the weights that an artifact really stores, run by torch: what *faithful* is measured against.

Weights are decoded by :mod:`edgestill.grids` from the payload. What the runtime does to activations is simulated at
the input of each matrix product, so that the comparison is left with rounding noise and can be tight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import TOKEN_TASKS, Artifact, StoredTensor
from ..errors import BadInput, MissingDependency
from ..grids import InputGrid
from ..runtimes.scoring import open_reference
from .behaviour import distance
from .limits import Activation, Noise, activation_of
from .reference import Forward

__all__ = [
    "HALF_NOISE",
    "JITTER",
    "dequantised_model",
    "head_of_tied",
    "jitter",
    "noise_of",
    "quantise_activation",
    "simulate_activations",
]

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v", "c_attn")
# Relative size of the noise: what another order of summation does to a sum of some hundred float32 products.
JITTER = 3e-7
HALF_NOISE = 2**-12  # rounding to float16: the root mean square of the relative error is about that


def dequantised_model(artifact: Artifact, student: Path) -> tuple[Any, frozenset[Activation]]:
    """The torch module of ``student`` with the artifact's weights, and the kinds of activations that it meets.

    Parameters that the weight map does not name keep the student's value. Memory: the model once, and the largest
    tensor. Raises :class:`BadInput` when the map names a parameter that the model does not have.
    """
    from ..checkpoints import load_torch
    from ..runtimes.payload import open_payload

    try:
        import torch
    except ModuleNotFoundError:
        raise MissingDependency.package("torch", "distill") from None

    model = load_torch(student)
    root = model.encoder if artifact.manifest.task == "feature-extraction" else model
    tensors = artifact.tensors()
    tied = head_of_tied(tensors)
    parameters = dict(root.named_parameters(remove_duplicate=False))
    parameters |= dict(root.named_buffers())
    if tied is not None:  # the head is stored apart from the embedding that it was tied to
        head = root.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    payload = open_payload(artifact)
    kinds: dict[str, Activation] = {}
    fixed: dict[str, InputGrid] = {}
    with torch.no_grad():
        for tensor in tensors:
            is_head = tensor == tied
            target = root.get_output_embeddings().weight if is_head else parameters.get(tensor.name)
            if target is None:
                raise BadInput(f"the student has no parameter {tensor.name!r}", hint="tensors.json is of another model")
            values = payload.decode(tensor)
            if tuple(values.shape) != tuple(target.shape):
                raise BadInput(
                    f"{tensor.name} decodes to {list(values.shape)}, the student has {list(target.shape)}",
                    hint="export it again",
                )
            target.copy_(torch.from_numpy(np.array(values)))
            label = "\0head" if is_head else tensor.name
            kinds[label] = activation_of(artifact.manifest.format, tensor)
            if kinds[label] == "uint8-static":
                fixed[label] = payload.input_grid(tensor)
    if tied is None and getattr(root, "get_output_embeddings", None) and root.get_output_embeddings() is not None:
        shared = root.get_input_embeddings().weight is root.get_output_embeddings().weight
        names = [name for name, value in parameters.items() if value is root.get_output_embeddings().weight]
        if shared:
            kinds["\0head"] = next((kinds[name] for name in names if name in kinds), "none")
    used = simulate_activations(root, kinds, fixed)
    return model, used


def head_of_tied(tensors: Iterable[StoredTensor]) -> StoredTensor | None:
    """Where the output head lies when tied embeddings are stored twice: the one stored for a matrix product."""
    seen: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name in seen:
            pair = (seen[tensor.name], tensor)
            products = [t for t in pair if t.grid == "int8" or (t.layout and t.layout[0][0] == "transpose")]
            return products[0] if products else tensor
        seen[tensor.name] = tensor
    return None


def simulate_activations(
    root: Any, kinds: Mapping[str, Activation], fixed: Mapping[str, InputGrid] | None = None
) -> frozenset[Activation]:
    """Hook every linear layer of ``root`` whose weight has a kind in ``kinds`` (by parameter name; ``"\\0head"`` is
    the output head); returns the kinds that were met. ``fixed`` has the grids of those of kind ``uint8-static``."""
    used: set[Activation] = set()
    get_head: Callable[[], Any] = getattr(root, "get_output_embeddings", lambda: None)
    head = get_head()
    for name, module in root.named_modules():
        if not _is_linear(module):
            continue
        label = "\0head" if module is head and "\0head" in kinds else f"{name}.weight"
        kind = kinds.get(label, "none")
        if kind != "none":
            used.add(kind)
        if kind in ("none", "float16-maybe"):
            continue
        grid = (fixed or {}).get(label)
        module.register_forward_pre_hook(
            lambda _, inputs, kind=kind, grid=grid: (quantise_activation(inputs[0], kind, grid),)
        )
        if kind == "float16":
            module.register_forward_hook(lambda _, __, output: output.half().float())
    return frozenset(used)


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))  # GPT-2's is one, turned over


def jitter(model: Any, *, inputs: float = JITTER, attention: float = 0.0, seed: int = 0) -> None:
    """Hook every linear layer of ``model`` to multiply its input by ``1 + inputs * normal``, before it is quantised.

    ``attention`` is the relative size of further noise on keys and values, for a runtime that keeps them in float16.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Any, size: float) -> Any:
        return x * (1 + size * torch.randn(x.shape, generator=generator))

    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        module.register_forward_pre_hook(lambda _, given: (noisy(given[0], inputs), *given[1:]), prepend=True)
        if attention and name.rpartition(".")[2] in _KEYS_AND_VALUES:
            module.register_forward_hook(lambda _, __, output: noisy(output, attention))


def noise_of(forward: Forward, reference: Path, batch_size: int) -> Noise:
    """How far ``forward`` (of a model under :func:`jitter`) is from the ``reference`` that it wrote without."""
    opened = open_reference(reference)
    found, changed = [], []
    for first in range(0, len(opened.ids), batch_size):
        mask = np.asarray(opened.mask[first : first + batch_size])
        longest = int(mask.sum(axis=1).max())
        mask = mask[:, :longest]
        got = forward(np.array(opened.ids[first : first + batch_size, :longest]), np.array(mask))
        said = np.asarray(opened.said[first : first + batch_size])
        if opened.task in TOKEN_TASKS:
            got, said = got[mask == 1], said[:, :longest][mask == 1]
        found.append(distance(opened.task, said, got))  # type: ignore[arg-type]
        changed.append(said.argmax(axis=-1) != got.argmax(axis=-1))
    values = np.concatenate(found)
    if opened.task == "feature-extraction":
        return Noise(float(values.max()), float(values.max()))
    return Noise(float(values.mean()), float(values.max()), float(np.concatenate(changed).mean()))


def quantise_activation(x: Any, kind: Activation, fixed: InputGrid | None = None) -> Any:
    """``x [..., K]`` float32 through the activation grid of a runtime and back.

    ``uint8-tensor``: ONNX DynamicQuantizeLinear, one asymmetric range that holds 0 for the whole tensor.
    ``uint8-static``: the grid ``fixed``.
    ``q8_0``, ``int8-bN``: symmetric blocks of 32 or N, ``scale = max|x| / 127`` (q8_0 keeps it as fp16).
    ``q8_k``: symmetric blocks of 256, ``scale = extreme / -127`` kept as fp32 (ggml-quants.c).
    """
    import torch

    if kind == "none":
        return x
    if fixed is not None:
        return torch.from_numpy(fixed.rounded(x.detach().numpy()))
    if kind in ("float16", "float16-in"):
        return x.half().float()
    if kind == "bfloat16-in":
        return x.bfloat16().float()
    if kind == "uint8-tensor":
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        if scale == 0:
            return x
        zero = (-low / scale).round().clamp(0, 255)
        return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    width = {"q8_0": 32, "q8_k": 256}.get(kind) or int(kind.removeprefix("int8-b"))
    columns = x.shape[-1]
    tiles = torch.nn.functional.pad(x, (0, -columns % width)).unflatten(-1, (-1, width))
    if kind == "q8_k":
        extreme = tiles.gather(-1, tiles.abs().argmax(-1, keepdim=True))
        inverse = torch.where(extreme == 0, torch.zeros_like(extreme), -127 / extreme)
        codes = (tiles * inverse).round().clamp(max=127)
        scale = torch.where(inverse == 0, torch.zeros_like(inverse), 1 / inverse)
    else:
        step = tiles.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step == 0, torch.zeros_like(tiles), tiles / step).round()
        scale = step.half().float() if kind == "q8_0" else step
    return (codes * scale).flatten(-2)[..., :columns]
