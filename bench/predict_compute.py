"""How fast a device takes in a prompt: operations a second, from published prompt speeds.

    log(2 x weights x tokens/s) = device and kind of weights + slope x log(weights) + rest

Prompts are bound by arithmetic, which no data sheet states in a way that kernels reach, so a device is only predicted
from prompt speeds of its own (its *compute anchors*). Float and quantised weights run different kernels and are kept
apart. ``slope``, one for all, is how much better a device works on larger models; beyond the sizes that were measured
the interval grows with the doubt in it. Attention is left out, as it is in the anchors: at a few hundred tokens it is
some per cent of the matrices' work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .predict_efficiency import LEVEL, Spread
from .profiles import DeviceProfile, find_profile, profile_names

__all__ = ["ComputeModel", "ComputePoint", "compute_points", "fit_compute", "leave_one_out"]

_FLOAT = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class ComputePoint:
    """One prompt speed: ``operations_per_s`` on a model of ``weights`` whose weights are ``floating`` or not."""

    device: str
    floating: bool
    weights: float
    operations_per_s: float


@dataclass(frozen=True)
class ComputeModel:
    """A fitted model, in logs; see the module. ``groups``: mean log speed and size of each device's anchors."""

    slope: float
    slope_variance: float
    rest_variance: float
    freedom: int
    groups: Mapping[tuple[str, bool], tuple[float, float, int]]

    def predict(self, device: str, *, floating: bool, weights: float, extra_variance: float = 0.0) -> Spread | None:
        """Operations a second on a model of ``weights``; ``None`` without an anchor for that kind of weights."""
        from scipy.stats import t

        group = self.groups.get((device, floating))
        if group is None:
            return None
        mean, size, count = group
        away = math.log(weights) - size
        centre = mean + self.slope * away
        variance = self.rest_variance * (1 + 1 / count) + self.slope_variance * away**2 + extra_variance
        half = float(t.ppf((1 + LEVEL) / 2, self.freedom)) * math.sqrt(variance)
        low, value, high = (math.exp(x) for x in (centre - half, centre, centre + half))
        return Spread(value, low, high, LEVEL, True, count, 1)


def compute_points(profiles: Sequence[DeviceProfile] | None = None) -> list[ComputePoint]:
    """The compute anchors of all ``profiles`` (by default all that come with edgestill), each device once."""
    found = profiles if profiles is not None else [find_profile(name) for name in profile_names()]
    return [
        ComputePoint(
            profile.name, anchor.format in _FLOAT, anchor.parameters, 2 * anchor.parameters * anchor.tokens_per_s
        )
        for profile in found if profile.fitted_as == profile.name
        for anchor in profile.prefill
    ]  # fmt: skip


def fit_compute(points: Sequence[ComputePoint]) -> ComputeModel:
    """Fit the model; ``ValueError`` when no device has two anchors of one kind of weights and different size."""
    keys = sorted({(p.device, p.floating) for p in points})
    rows = {key: [p for p in points if (p.device, p.floating) == key] for key in keys}
    x = {key: np.array([math.log(p.weights) for p in rows[key]]) for key in keys}
    y = {key: np.array([math.log(p.operations_per_s) for p in rows[key]]) for key in keys}
    inside = sum(float(((x[k] - x[k].mean()) ** 2).sum()) for k in keys)
    freedom = len(points) - len(keys) - 1
    if not inside or freedom < 1:
        raise ValueError("needs a device with two prompt speeds on models of different size")
    slope = sum(float(((x[k] - x[k].mean()) * (y[k] - y[k].mean())).sum()) for k in keys) / inside
    rest = 0.0
    for key in keys:
        left = y[key] - slope * x[key]
        rest += float(((left - left.mean()) ** 2).sum())
    rest /= freedom
    groups = {key: (float(y[key].mean()), float(x[key].mean()), len(rows[key])) for key in keys}
    return ComputeModel(slope, rest / inside, rest, freedom, groups)


def leave_one_out(points: Sequence[ComputePoint]) -> list[float]:
    """Signed relative errors of those anchors that their device has another one beside."""
    errors = []
    for point in points:
        others = [p for p in points if p is not point]
        found = fit_compute(others).predict(point.device, floating=point.floating, weights=point.weights)
        if found is not None:
            errors.append(found.value / point.operations_per_s - 1)
    return errors
