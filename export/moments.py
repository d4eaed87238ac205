"""Second moments of what goes into each matrix product, on calibration text: what an error in its weights does.

A change ``D`` of a weight changes the outputs at token ``t`` by ``D x_t``, and what the model says by about
``½ Σ_t |g_t|² |D x_t|² / outputs``, with ``g_t`` the gradient at these outputs of the log-likelihood of an answer that
is drawn from the model itself (their second moments are the Fisher information, which is the curvature of the KL). So
``H = mean(s_t x_t x_tᵀ)`` with ``s_t = |g_t|²``. The weights ``s_t`` matter: a decoder's first tokens have activations
a thousand times those of others, and next to no influence; without them they would be all that is seen (the same idea:
Kim et al., *GuidedQuant*, 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Task
from ..bench.reference import Inputs
from ..errors import MissingDependency
from ..progress import Progress, silent
from .input_sums import InputSums, matrices

__all__ = ["batches", "input_moments", "linear_names"]

Floats = npt.NDArray[np.float32]


def linear_names(root: Any) -> dict[str, str]:
    """Module -> parameter name of the weight of every linear layer of ``root`` (GPT-2 calls it ``Conv1D``); a head that
    is tied to the embedding goes by the embedding's name, as in a model folder."""
    return {name: parameter for name, (parameter, _) in matrices(root, ("Linear", "Conv1D")).items()}


def batches(inputs: Inputs, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Ids and mask as tensors, each batch cut to its longest row."""
    import torch

    for first in range(0, len(inputs.ids), batch_size):
        mask = inputs.mask[first : first + batch_size]
        longest = int(mask.sum(axis=1).max())
        ids = np.ascontiguousarray(inputs.ids[first : first + batch_size, :longest])
        yield torch.from_numpy(ids), torch.from_numpy(np.ascontiguousarray(mask[:, :longest]))


def input_moments(
    model: Any,
    root: Any,
    task: Task,
    inputs: Inputs,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    seed: int = 0,
) -> dict[str, Floats]:
    """Parameter name -> ``H [columns, columns]`` over the real tokens of ``inputs``.

    ``model`` is what :func:`edgestill.checkpoints.load_torch` gives, ``root`` the Transformers model in it. Products
    with the same input share one array. Takes a forward and a backward pass; memory: one matrix for each different
    input, and the activations of ``batch_size`` rows.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingDependency.package("torch", "distill") from None

    generator = torch.Generator().manual_seed(seed)
    watch = _Watch(root)
    tokens = 0
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)  # only activations need gradients
    try:
        with torch.enable_grad():
            for done, (ids, mask) in enumerate(batches(inputs, batch_size), start=1):
                output = model(input_ids=ids, attention_mask=mask)
                _drawn(output if isinstance(output, torch.Tensor) else output.logits, mask, task, generator).backward()
                watch.add(mask.bool())
                tokens += int(mask.sum())
                progress("what goes into each product", min(1.0, done * batch_size / len(inputs.ids)))
    finally:
        watch.close()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return watch.sums.means(dict.fromkeys(watch.sums.shared, tokens))


def _drawn(said: Any, mask: Any, task: Task, generator: Any) -> Any:
    """A scalar whose squared gradient is, in the mean, the curvature of the distance: the log-likelihood of answers
    drawn from ``said``; for embeddings, their product with a random direction."""
    import torch

    if task == "feature-extraction":
        return (said * torch.randn(said.shape, generator=generator)).sum()
    rows = said[mask.bool()] if task == "text-generation" else said
    logs = torch.log_softmax(rows.float(), dim=-1)
    answers = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    return -logs.gather(1, answers).sum()


class _Watch:
    """Keeps what goes into the products of a pass, and how much each token's outputs matter."""

    def __init__(self, root: Any) -> None:
        self.sums = InputSums()
        self._inputs: dict[str, Any] = {}
        self._influence: dict[str, Any] = {}
        modules = dict(root.named_modules())
        self._hooks = [
            modules[module].register_forward_hook(lambda _, given, out, name=name: self._see(name, given[0], out))
            for module, name in linear_names(root).items()
        ]
        self._hooks.append(root.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_()))

    def _see(self, name: str, given: Any, out: Any) -> None:
        first = self.sums.first(name, given)
        self._inputs[first] = given.detach()
        if out.requires_grad:
            out.register_hook(lambda gradient: self._matters(first, gradient.detach()))

    def _matters(self, first: str, gradient: Any) -> None:
        squared = gradient.square().sum(dim=-1)
        self._influence[first] = self._influence[first] + squared if first in self._influence else squared

    def add(self, mask: Any) -> None:
        """Add the pass that went through; padding does not count."""
        import torch

        with torch.no_grad():
            for name, influence in self._influence.items():
                rows = self._inputs[name].reshape(-1, self._inputs[name].shape[-1])
                weight = influence.reshape(-1)
                if influence.shape == mask.shape:
                    rows, weight = rows[mask.reshape(-1)], weight[mask.reshape(-1)]
                self.sums.add(name, rows, weight)
        self._inputs.clear()
        self._influence.clear()
        self.sums.forget()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
