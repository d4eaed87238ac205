"""What each tensor costs in each type: how far the model's answers move when only this tensor is rounded.

Measured on calibration text in torch, as KL(float ‖ rounded) in nats a token (1 − cosine for embeddings). How closely
depends on the size of the work, and each number says how it came about:

* ``measured``: this tensor in this type. All of them where the model is small, and always those of a tensor that holds
  a tenth of the weights.
* ``derived``: one type of this tensor is measured, the others follow by the ratio of their output errors (a divergence
  is of second order in the error).
* ``shared``: a layer's tensors are rounded together and measured once; each takes its share of the output errors.

Output errors are ``tr(D H Dᵀ)`` with the moments of :mod:`.moments`. What comes before a rounded layer is computed once
and replayed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..artifact import Task
from ..bench.reference import Inputs
from ..errors import BadInput, MissingDependency
from ..files import atomic_write, hash_json, read_json
from ..progress import Progress, silent
from .allocate_space import Space, Tensor
from .compensate import output_error
from .moments import batches

if TYPE_CHECKING:
    from .source import Source

__all__ = ["Cost", "Ruler", "Sensitivities", "measure", "ruler_of", "sensitivities"]

Floats = npt.NDArray[np.float32]

SCHEMA_VERSION = 1
# Floating-point operations above which less is measured: seconds, and minutes, on one core.
_ALL, _EACH = 1e12, 4e12
_LARGE = 0.1


@dataclass(frozen=True)
class Cost:
    """A tensor in one type: bytes, divergence (nats, or 1 − cosine), its output error, and how the divergence is
    known: ``measured``, ``derived`` or ``shared``."""

    size_bytes: int
    loss: float
    error: float
    how: str


Sensitivities = dict[str, dict[str, Cost]]
"""Parameter -> type -> cost."""


class Ruler:
    """The float model with what it says about ``inputs``, and how far it moves when parameters are changed.

    Matrices come and go as ``[out, in]``; ``turned`` names those that the model keeps the other way round.
    """

    def __init__(
        self, model: Any, root: Any, layers: str, task: Task, inputs: Inputs, batch_size: int = 4, *,
        turned: Collection[str] = (),
    ) -> None:  # fmt: skip
        try:
            import torch
        except ModuleNotFoundError:
            raise MissingDependency.package("torch", "distill") from None
        self._torch, self._model, self._task, self._turned = torch, model, task, turned
        self._layers, self._path = list(root.get_submodule(layers)), f"{layers}."
        self._batches = list(batches(inputs, batch_size))
        self.parameters: dict[str, Any] = dict(root.named_parameters(remove_duplicate=False))
        self.tokens = int(inputs.mask.sum())
        self._outputs: list[list[Any]] = []
        self._said = [self._run(index, keep=True) for index in range(len(self._batches))]

    def weight(self, name: str) -> Floats:
        """A parameter; a view of the model's own."""
        values: Floats = self.parameters[name].detach().numpy()
        return values.T if name in self._turned else values

    def layer_of(self, name: str) -> int:
        """The layer that a parameter is in; 0 for one outside: everything is computed again then."""
        if not name.startswith(self._path):
            return 0
        return int(name.removeprefix(self._path).partition(".")[0])

    def distance(self, changed: Mapping[str, Floats]) -> float:
        """Mean divergence with these parameters in place of the float ones, which come back afterwards."""
        first = min((self.layer_of(name) for name in changed), default=0)
        with self._replaced(changed), self._replayed(first) as begin:
            total, count = 0.0, 0
            for index, said in enumerate(self._said):
                begin(index)
                found = self._divergence(said, self._run(index))
                total, count = total + float(found.sum()), count + len(found)
        return max(total / count, 0.0)

    def _run(self, index: int, *, keep: bool = False) -> Any:
        """Log-probabilities of the real tokens, or embeddings, of one batch."""
        torch, (ids, mask) = self._torch, self._batches[index]
        hooks, outputs = [], list[Any]()
        if keep:
            hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in self._layers]
        try:
            with torch.inference_mode():
                output = self._model(input_ids=ids, attention_mask=mask)
                output = output if isinstance(output, torch.Tensor) else output.logits
                if self._task == "text-generation":
                    output = output[mask.bool()]
                if self._task != "feature-extraction":
                    output = torch.log_softmax(output.float(), dim=-1)
        finally:
            for hook in hooks:
                hook.remove()
        if keep:
            self._outputs.append(outputs)
        return output

    def _divergence(self, said: Any, now: Any) -> Any:
        torch = self._torch
        if self._task == "feature-extraction":
            return 1 - torch.nn.functional.cosine_similarity(said.double(), now.double(), dim=-1)
        # In float64 a few rows at a time: what small errors cost is below float32's noise.
        parts = zip(said.split(64), now.split(64), strict=True)
        return torch.cat([(a.double().exp() * (a.double() - b.double())).sum(dim=-1) for a, b in parts])

    @contextlib.contextmanager
    def _replaced(self, changed: Mapping[str, Floats]) -> Iterator[None]:
        torch = self._torch
        before = {name: self.parameters[name].detach().clone() for name in changed}
        try:
            with torch.no_grad():
                for name, values in changed.items():
                    stored = torch.from_numpy(values)
                    self.parameters[name].copy_(stored.T if name in self._turned else stored)
            yield
        finally:
            with torch.no_grad():
                for name, values in before.items():
                    self.parameters[name].copy_(values)

    @contextlib.contextmanager
    def _replayed(self, first: int) -> Iterator[Callable[[int], None]]:
        """Layers before ``first`` give what they gave the float model."""
        at = 0

        def begin(index: int) -> None:
            nonlocal at
            at = index

        def replay(number: int) -> Callable[..., Any]:
            return lambda *_, **__: self._outputs[at][number]

        try:
            for number in range(first):
                self._layers[number].forward = replay(number)
            yield begin
        finally:
            for number in range(first):
                del self._layers[number].forward


def ruler_of(source: Source, texts: Sequence[str], tokens: int, count: int) -> Ruler:
    """The float model and what it says about :meth:`.source.Source.inputs`."""
    (model, root), folder = source.torch(), source.folder
    inputs = source.inputs(texts, tokens, count)
    return Ruler(model, root, folder.layers_path, folder.task, inputs, turned=folder.turned)


def sensitivities(
    path: Path | None,
    key: Mapping[str, Any],
    space: Space,
    ruler: Callable[[], Ruler],
    moments: Mapping[str, Floats],
    progress: Progress = silent,
) -> Sensitivities:
    """Those in the folder ``path`` for the same question ``key``, or measured now and kept there as JSON."""
    question = {
        **key, "schema_version": SCHEMA_VERSION, "recipe": space.recipe,
        "types": {tensor.name: tensor.types for tensor in space.tensors},
    }  # fmt: skip
    file = None if path is None else path / f"sensitivities-{hash_json(question)[:16]}.json"
    if file is not None and file.is_file():
        with contextlib.suppress(BadInput, KeyError, TypeError):
            kept = read_json(file)["tensors"]
            return {name: {type_: Cost(**cost) for type_, cost in each.items()} for name, each in kept.items()}
    found = measure(space, ruler(), moments, progress)
    if file is not None:
        rows = {name: {type_: vars(cost) for type_, cost in each.items()} for name, each in found.items()}
        atomic_write(file, json.dumps({**key, "schema_version": SCHEMA_VERSION, "tensors": rows}, indent=1) + "\n")
    return found


def measure(space: Space, ruler: Ruler, moments: Mapping[str, Floats], progress: Progress = silent) -> Sensitivities:
    """The cost of each tensor of ``space`` in each of its types."""
    weights = sum(prod(tensor.shape) for tensor in space.tensors)
    work = 2.0 * weights * ruler.tokens
    tensors = list(space.tensors)
    types = max(len(tensor.types) for tensor in tensors)
    large = [tensor for tensor in tensors if prod(tensor.shape) > _LARGE * weights]
    rest = [tensor for tensor in tensors if tensor not in large]
    found: Sensitivities = {}
    done = 0

    def tell(tensor: Tensor) -> None:
        nonlocal done
        done += 1
        progress(f"what rounding costs: {tensor.name}", done / len(tensors))

    if work * types * len(tensors) <= _ALL:
        large, rest = tensors, []
    for tensor in large:
        tell(tensor)
        found[tensor.name] = _one(space, ruler, moments, tensor, every=True)
    if work * len(rest) <= _EACH:
        for tensor in rest:
            tell(tensor)
            found[tensor.name] = _one(space, ruler, moments, tensor, every=False)
        return found
    groups: dict[str, list[Tensor]] = {}
    for tensor in rest:
        head = (
            str(ruler.layer_of(tensor.name)) if any(part.isdigit() for part in tensor.name.split(".")) else tensor.name
        )
        groups.setdefault(head, []).append(tensor)
    for group in groups.values():
        found |= _together(space, ruler, moments, group, tell)
    return found


def _rounded(
    space: Space, ruler: Ruler, moments: Mapping[str, Floats], tensor: Tensor, type_: str
) -> tuple[Floats, float]:
    """The tensor in a type, and its output error."""
    weight = ruler.weight(tensor.name)
    now = space.decoded(tensor, type_, weight)
    moment = moments.get(tensor.name)
    change = now - weight
    error = np.square(change, dtype=np.float64).sum() if moment is None else output_error(change, moment).sum()
    return now, float(error)


def _one(space: Space, ruler: Ruler, moments: Mapping[str, Floats], tensor: Tensor, *, every: bool) -> dict[str, Cost]:
    costs = {}
    rate = None
    for type_ in tensor.types:  # the first is the coarsest: its divergence stands out most
        now, error = _rounded(space, ruler, moments, tensor, type_)
        how = "measured" if every or rate is None else "derived"
        loss = ruler.distance({tensor.name: now}) if how == "measured" else (rate or 0.0) * error
        if rate is None:
            rate = loss / error if error > 0 else 0.0
        costs[type_] = Cost(space.size_bytes(tensor, type_), loss, error, how)
    return costs


def _together(
    space: Space, ruler: Ruler, moments: Mapping[str, Floats], group: Sequence[Tensor], tell: Callable[[Tensor], None]
) -> Sensitivities:
    changed, errors = {}, dict[str, dict[str, float]]()
    for tensor in group:
        tell(tensor)
        errors[tensor.name] = {}
        for type_ in tensor.types:
            now, errors[tensor.name][type_] = _rounded(space, ruler, moments, tensor, type_)
            if type_ == tensor.types[0]:
                changed[tensor.name] = now
    total = sum(errors[tensor.name][tensor.types[0]] for tensor in group)
    rate = ruler.distance(changed) / total if total > 0 else 0.0
    return {
        tensor.name: {
            type_: Cost(space.size_bytes(tensor, type_), rate * error, error, "shared")
            for type_, error in errors[tensor.name].items()
        }
        for tensor in group
    }
