"""Early stopping: keep the weights that were nearest to the teacher on held-out text, stop when none come nearer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput

__all__ = ["EarlyStopping"]

# What decides, the first that was measured, and whether more of it is better.
# A corrected teacher comes first: it is the one that the student follows.
_DECIDING = (("corrected_kl", False), ("kl", False), ("spearman", True), ("cosine", True))


class EarlyStopping:
    """Remembers the best values of ``weights`` (on the CPU) and how many measurements since were no better."""

    def __init__(self, weights: Mapping[str, Tensor], patience: int) -> None:
        self.patience = patience
        self.best_step: int | None = None
        self.best_value = math.nan
        self.waited = 0
        self._weights = dict(weights)
        self._best: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return self.waited >= self.patience

    def saw(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in a measurement of the model as it is now; returns whether it is the best so far."""
        measured = [(metrics[name], more_is_better) for name, more_is_better in _DECIDING if name in metrics]
        if not measured:
            raise BadInput(
                "early stopping has nothing to go by: no KL or Spearman could be measured on the dev split",
                hint="set `dev` in a [[data.text]] to some hundred texts, or leave patience out",
            )
        value, more_is_better = measured[0]
        better = self.best_step is None or (value > self.best_value if more_is_better else value < self.best_value)
        if better:
            self.best_step, self.best_value, self.waited = step, value, 0
            self._best = {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}
        else:
            self.waited += 1
        return better

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best values back into the weights."""
        for name, value in self._best.items():
            self._weights[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"step": self.best_step, "value": self.best_value, "waited": self.waited, "weights": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.best_step, self.best_value, self.waited = state["step"], float(state["value"]), int(state["waited"])
        self._best = dict(state["weights"])
