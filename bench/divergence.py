"""Where does a graph first say something else than the model that its own weights make?

Parts are compared by value, not by name: exporters rename and fuse, but what a block of layers says is some value in
every graph. The student with the artifact's dequantised weights says in torch what each block's output should be; the
first block that no value inside the graph equals is where the defect lies. What is equal is decided by noise: the same
model under last-bit noise (``dequantised.jitter``), so that a graph that rounds more is not blamed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import BadInput
from .limits import half_cache

__all__ = ["Divergence", "first_divergence", "relative_error"]

Floats = npt.NDArray[np.float32]
# As *faithful* allows for whole outputs: the blocks of good graphs of a small Llama were at 0.4 to 1.04 times their
# noise, in every quantisation. The floor is float32 over sums of another order.
_TIMES_NOISE = 3.0
_FLOOR = 1e-5


@dataclass(frozen=True)
class Divergence:
    """``name``: the first module of the student whose output is nowhere in the graph (``model.layers.1.mlp``, or the
    whole block where no part of it can be told apart). ``error`` is the relative error of the nearest value, ``limit``
    what noise explains, ``before`` the last block that agrees."""

    name: str
    error: float
    limit: float
    before: str | None


def first_divergence(artifact: Artifact, student: Path, ids: npt.NDArray[np.int64]) -> Divergence | None:
    """Compare one row ``ids [T]`` inside the ONNX artifact, block by block; ``None`` when everything agrees.

    Memory: the student once in float32, the graph's copy on disk, and its values for ``T`` tokens. Raises
    :class:`BadInput` when the graph can't be looked into or the student has no blocks.
    """
    from ..runtimes.exposed import exposed_values
    from .dequantised import HALF_NOISE, JITTER, dequantised_model, jitter

    model, kinds = dequantised_model(artifact, student)
    root = model.encoder if artifact.manifest.task == "feature-extraction" else model
    prefix, blocks = _blocks(root, artifact)
    said = _listen(root, prefix, blocks, ids)
    half = HALF_NOISE if kinds & {"float16", "float16-in", "float16-maybe"} else JITTER
    jitter(model, inputs=half, attention=HALF_NOISE if half_cache(artifact.manifest) else 0.0)
    noisy = _listen(root, prefix, blocks, ids)
    del model, root
    values = exposed_values(artifact, ids[None], np.ones((1, len(ids)), np.int64), threads=1)
    errors = {name: _nearest(value, values) for name, value in said.items()}
    limits = {name: max(_FLOOR, _TIMES_NOISE * relative_error(noisy[name], value)) for name, value in said.items()}
    names = [f"{prefix}.{index}" for index in range(len(blocks))]
    before = None
    for index, name in enumerate(names):
        if errors[name] > limits[name]:
            worst = _part(name, names[:index], errors, limits)
            return Divergence(worst, errors[worst], limits[worst], before)
        before = name
    return None


def relative_error(found: Floats, expected: Floats) -> float:
    """Mean over tokens of ``|found - expected| / |expected|`` for ``[T, D]``, in float64: a token of huge activations
    counts as any other."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = np.linalg.norm(b, axis=-1)
    away = np.linalg.norm(a - b, axis=-1)
    return float(np.mean(away / np.maximum(size, 1e-30)))


def _part(block: str, healthy: list[str], errors: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The first part of ``block`` that diverges, of those that every healthy block before it shows: a part that is
    fused away is nowhere in any block."""
    for name in errors:
        part = name.removeprefix(f"{block}.")
        if part == name or errors[name] <= limits[name]:
            continue
        peers = [f"{other}.{part}" for other in healthy]
        if peers and all(peer in errors and errors[peer] <= limits[peer] for peer in peers):
            return name
    return block


def _nearest(expected: Floats, values: Mapping[str, npt.NDArray[Any]]) -> float:
    best = float("inf")
    for value in values.values():
        wide = value.ndim >= 2 and value.shape[-1] == expected.shape[-1]
        if value.dtype.kind == "f" and wide and value.size == expected.size:
            error = relative_error(value.reshape(expected.shape), expected)
            best = min(best, error if np.isfinite(error) else float("inf"))
    return best


def _blocks(root: Any, artifact: Artifact) -> tuple[str, list[Any]]:
    """The name and the modules of the student's stack of layers: the longest list of modules of one class."""
    from torch import nn

    stacks = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise BadInput(f"{artifact.path.name}: the student has no list of layers", hint="its parts can't be compared")
    name, stack = max(stacks, key=lambda pair: (len(pair[1]), -len(pair[0])))
    return name, list(stack)


def _listen(root: Any, prefix: str, blocks: list[Any], ids: npt.NDArray[np.int64]) -> dict[str, Floats]:
    """What each block and its direct parts say about ``ids``, ``[T, D]`` by name, in the order of their ends."""
    import torch

    said: dict[str, Floats] = {}

    def listen(name: str, module: Any) -> Any:
        def keep(_: Any, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.shape[:-1].numel() == len(ids):
                said[name] = value.detach().float().reshape(len(ids), -1).numpy().copy()

        return module.register_forward_hook(keep)

    hooks = []
    for index, block in enumerate(blocks):
        hooks += [listen(f"{prefix}.{index}.{name}", part) for name, part in block.named_children()]
        hooks.append(listen(f"{prefix}.{index}", block))
    try:
        with torch.no_grad():
            row = torch.from_numpy(np.array(ids[None]))
            root(input_ids=row, attention_mask=torch.ones_like(row))
    finally:
        for hook in hooks:
            hook.remove()
    return said
