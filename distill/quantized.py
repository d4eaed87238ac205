"""Quantisation-aware distillation: the student is trained through the very grid that ships.

Between two optimiser steps the model holds what an artifact would hold: every weight on its grid. Forward passes,
measurements, the student's own texts and what is saved therefore all are of the student that ships. Behind each such
weight stands a float master, which the gradient of the quantised one moves (straight through the rounding, arXiv
1308.3432); only while the optimiser steps does the model hold the masters. A weight beyond the last code of its block
gets no gradient that drives it further out.

Which weight has which grid is not foretold but read: the untrained student is exported once, and the weight map of the
artifact says it. What is on the grid is then exported again: an exporter that would not find the very same weights is
noticed before the training, and once more after it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact, StoredTensor
from ..errors import EdgestillError, Unsupported
from ..runtimes.payload import open_payload
from .fake_quantise import FakeGrid, fake_grid

__all__ = ["QuantisedWeights", "Ship", "check_shipped", "shipped_grids"]

Ship = Callable[[Path, Path], Artifact]
"""Exports a model folder as an artifact folder: ``(model, out) -> artifact``. Handed down, for this room knows no
exporter."""


class QuantisedWeights:
    """The weights of ``model`` that have a grid, held on it, with their float masters.

    ``grids`` by parameter name. Parameters without one, and those whose grid is float32, stay as they are.
    """

    def __init__(self, model: nn.Module, grids: Mapping[str, FakeGrid]) -> None:
        self._model = model
        self._grids = {name: grid for name, grid in grids.items() if grid.name not in ("float32", "f32")}
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in self._grids}
        self.masters = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._on_grid: dict[str, Tensor] = {}
        self._beyond = {
            name: torch.zeros_like(weight, dtype=torch.bool)
            for name, weight in self._weights.items()
            if self._grids[name].cuts
        }
        self.refresh()

    @property
    def trained(self) -> dict[str, Tensor]:
        """What the optimiser moves, by parameter name: masters where there are some, else the weights themselves."""
        found = {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}
        return {name: self.masters.get(name, weight) for name, weight in found.items()}

    @property
    def counts(self) -> dict[str, int]:
        """How many parameters have which grid."""
        names = sorted(grid.name for grid in self._grids.values())
        return {name: names.count(name) for name in names}

    @torch.no_grad()
    def refresh(self) -> None:
        """Put the masters' values on the grid into the model."""
        for name, grid in self._grids.items():
            grid.quantise(self.masters[name], self._weights[name].data, self._beyond.get(name))

    @torch.no_grad()
    def limit_gradients(self) -> None:
        """Take away the gradients that would drive a weight further beyond its last code.

        Descent moves against the gradient. Nearer to the grid, or along it, every weight may go.
        """
        for name, beyond in self._beyond.items():
            weight = self._weights[name]
            if weight.grad is not None:
                outward = (self.masters[name] - weight).mul_(weight.grad) < 0
                weight.grad.masked_fill_(outward.logical_and_(beyond), 0.0)

    @torch.no_grad()
    def before_step(self) -> None:
        """Put the masters into the model: the optimiser moves them."""
        for name, weight in self._weights.items():
            self._on_grid[name], weight.data = weight.data, self.masters[name]

    def after_step(self) -> None:
        """Take the moved masters out of the model, and put their values on the grid there."""
        for name, weight in self._weights.items():
            weight.data = self._on_grid.pop(name)
        self.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return self.masters

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.refresh()


def shipped_grids(model: nn.Module, folder: Path, work: Path, ship: Ship) -> dict[str, FakeGrid]:
    """The grid of each parameter of ``model`` (by its name there), as an export of its ``folder`` stores it.

    Raises :class:`Unsupported` for a grid that can't be trained through, for tied weights that ship in two different
    ones, and what the exporter raises.
    """
    with _shipped(folder, work, ship) as artifact:
        prefix, known = prefix_of(model), {name for name, _ in model.named_parameters()}
        form, found = artifact.manifest.format, dict[str, FakeGrid]()
        for tensor in artifact.tensors():
            name = prefix + tensor.name
            if name not in known:
                continue  # a buffer
            grid = fake_grid(form, tensor)
            other = found.setdefault(name, grid)
            if (other.name, other.block) != (grid.name, grid.block):
                raise Unsupported(
                    f"[distill.quantized] {tensor.name} ships twice, as {other.name} and as {grid.name}",
                    hint="train through a quantisation that stores tied embeddings once",
                )
        if all(grid.name in ("float32", "f32") for grid in found.values()):
            raise Unsupported(
                f"[distill.quantized] {form}:{artifact.manifest.quantisation} stores float32: there is no grid",
                hint="leave [distill.quantized] out",
            )
        if form == "coreml":
            # Which operations stay in float32, and their weights with them, is measured anew when the trained student
            # is exported: what float16 holds is exact either way.
            half = fake_grid(form, StoredTensor("", "", "float16"))
            found = {name: half if grid.name == "float32" else grid for name, grid in found.items()}
        return found


def check_shipped(model: nn.Module, folder: Path, work: Path, ship: Ship) -> None:
    """Whether an export of ``folder`` holds exactly the weights of ``model``, which are on the grid.

    Equal as numbers: the sign of a zero is not compared. Raises :class:`EdgestillError` naming the first that differs.
    """
    with _shipped(folder, work, ship) as artifact:
        payload, parameters = open_payload(artifact), dict(model.named_parameters())
        prefix = prefix_of(model)
        for tensor in artifact.tensors():
            weight = parameters.get(prefix + tensor.name)
            if weight is None:
                continue
            decoded = torch.from_numpy(payload.decode(tensor))
            ours = weight.detach().cpu()
            if not torch.equal(decoded, ours):
                count = int((decoded != ours).sum())
                raise EdgestillError(
                    f"{artifact.manifest.format}:{artifact.manifest.quantisation} would store {tensor.name} "
                    f"({tensor.grid}) with {count} of {ours.numel()} weights other than the trained ones",
                    hint="this exporter chooses scales of its own: leave [distill.quantized] out, or train through "
                    "a quantisation that rounds to nearest",
                )


@contextlib.contextmanager
def _shipped(folder: Path, work: Path, ship: Ship) -> Iterator[Artifact]:
    """An artifact of ``folder`` that is gone again afterwards."""
    out = work / "shipped"
    try:
        yield ship(folder, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def prefix_of(model: Any) -> str:
    """What stands before a folder's parameter names in ``model``: a sentence encoder wraps the Transformers model."""
    from ..torch_models import SentenceEncoder

    return "encoder." if isinstance(model, SentenceEncoder) else ""
