"""What goes into the matrix products of a model on text, and the fixed grid that loses least of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bench.reference import Inputs
from ..errors import BadInput
from ..grids import InputGrid, input_grid
from ..progress import Progress, silent
from .input_sums import SharedInputs, matrices
from .moments import batches

__all__ = ["Seen", "fit_grid", "products_of", "watch_inputs"]

Floats = npt.NDArray[np.float32]

_ROWS = 384  # kept of each input, evenly over the text: what a range costs is seen on them
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # of the range that was seen
_BATCH = 8


@dataclass
class Seen:
    """The input that the matrices ``parameters`` share: its extremes over all tokens, and some ``rows [n, K]``."""

    parameters: list[str]
    low: float = 0.0
    high: float = 0.0
    pieces: list[Floats] = field(default_factory=list)

    @property
    def rows(self) -> Floats:
        """``[n, K]``."""
        return np.concatenate(self.pieces)


def products_of(root: Any) -> tuple[dict[str, Any], list[str]]:
    """Parameter -> module of every matrix product of the Transformers model ``root``, and the names of embeddings
    that are the output head too (which is not among the former)."""
    table = root.get_input_embeddings().weight
    products = matrices(root, ("Linear", "Conv1D")).values()
    tied = [name for name, part in products if part.weight is table]
    return {name: part for name, part in products if part.weight is not table}, tied


def watch_inputs(
    model: Any, parts: Mapping[str, Any], inputs: Inputs, progress: Progress = silent, *, batch_size: int = _BATCH
) -> list[Seen]:
    """What goes into ``parts`` (parameter -> module) over the real tokens of ``inputs``, in the order of the model;
    products with the same input are one. Raises :class:`BadInput` when nothing is a token."""
    import torch

    found: dict[str, Seen] = {}
    inputs_of = SharedInputs()
    stride = max(1, int(inputs.mask.sum()) // _ROWS)
    mask: Any = None

    def see(name: str, given: Any) -> None:
        before = inputs_of.shared.get(name)
        owner = inputs_of.first(name, given)
        if before not in (None, owner):
            raise BadInput(f"{name} has not the same input each time", hint="export another quantisation")
        if owner != name:
            if name not in found[owner].parameters:
                found[owner].parameters.append(name)
            return
        whole = given.ndim == 3 and given.shape[:2] == mask.shape
        rows = (given[mask] if whole else given.reshape(-1, given.shape[-1])).float()
        seen = found.setdefault(name, Seen([name]))
        seen.low, seen.high = min(seen.low, float(rows.min())), max(seen.high, float(rows.max()))
        seen.pieces.append(rows[:: stride if whole else 1].numpy().copy())

    hooks = [
        part.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0])) for name, part in parts.items()
    ]
    try:
        with torch.inference_mode():
            for done, (ids, real) in enumerate(batches(inputs, batch_size), start=1):
                mask = real.bool()
                inputs_of.forget()
                model(input_ids=ids, attention_mask=real)
                progress("what goes into each product", min(1.0, done * batch_size / len(inputs.ids)))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def fit_grid(rows: Floats, low: float, high: float, weigh: npt.NDArray[np.floating]) -> InputGrid:
    """The grid within ``low … high`` with the least squared error of ``rows [n, K]``, columns weighed by ``weigh [K]``
    (the squared norms of the columns of what they are multiplied with: then it is the error of the outputs).

    An outlier is cut where the finer steps gain more than it loses. Both ends are tried together, then one by one.
    """

    def error(grid: InputGrid) -> float:
        return float((np.square(grid.rounded(rows) - rows) @ weigh).sum(dtype=np.float64))

    ends = min((error(input_grid(low * share, high * share)), share, share) for share in _SHARES)
    for side in (0, 1):
        tries = [(share, ends[2]) if side == 0 else (ends[1], share) for share in _SHARES]
        ends = min(ends, min((error(input_grid(low * a, high * b)), a, b) for a, b in tries))
    return input_grid(low * ends[1], high * ends[2])
