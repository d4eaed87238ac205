"""How much of its documented bandwidth a device reads weights with: a small model with two levels, in logs.

    log(tok/s x bytes a token / bandwidth) = kind + slope x log2(bits / 8) + device + rest

``kind`` is that of the processor (CPU, GPU, NPU); ``slope``, one for all, is what dequantising costs; ``device`` is
how much one differs from others of its kind, with a variance of its own for each kind, since CPUs differ far more
than GPUs; ``rest`` is how much the models on one device differ. Everything is estimated in closed form:

* ``slope`` and the variance of ``rest`` from differences inside devices, which no documented bandwidth enters;
* the variance of ``device`` by moments (DerSimonian & Laird, 1986), a kind's own moderated by that of all kinds as
  if the latter came from :data:`PRIOR_DEVICES` more devices (Smyth, *Linear models and empirical Bayes methods*,
  2004, section 3): a kind of which one device is known gets an honest interval instead of none;
* a device with points of its own is drawn towards its kind by how few they are (best linear unbiased prediction).

Intervals are Student's t with the moderated degrees of freedom. They are of points like those published; a speed beyond
all published ones of its kind is another matter, see :func:`edgestill.bench.predict.stretch`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .points import DecodePoint

__all__ = [
    "PRIOR_DEVICES",
    "EfficiencyModel",
    "Spread",
    "Unseen",
    "fit_efficiency",
    "leave_one_device_out",
    "leave_one_out",
]

PRIOR_DEVICES = 3
LEVEL = 0.90


@dataclass(frozen=True)
class Spread:
    """A value with the interval that a new measurement falls into with probability ``level``; ``fitted`` says
    whether the device had points of its own, ``points`` and ``devices`` what the estimate of its kind stands on."""

    value: float
    low: float
    high: float
    level: float
    fitted: bool
    points: int
    devices: int

    @property
    def ends(self) -> float:
        """The high end over the low end."""
        return self.high / self.low


@dataclass(frozen=True)
class _Kind:
    mean: float
    mean_variance: float
    device_variance: float
    freedom: float
    points: int
    devices: int
    fastest: float  # the highest published speed, in tokens a second


@dataclass(frozen=True)
class EfficiencyModel:
    """A fitted model. Log values throughout; see the module."""

    slope: float
    rest_variance: float
    freedom: int
    kinds: Mapping[str, _Kind]
    devices: Mapping[str, tuple[float, int]]  # mean log efficiency at 8 bits, number of points

    def predict(self, device: str, processor: str, bits: float, *, extra_variance: float = 0.0) -> Spread | None:
        """The efficiency of a device at ``bits`` a weight, as a share of its bandwidth; ``None`` for a kind of
        processor that no point is known of. ``extra_variance`` (of the log) widens the interval."""
        from scipy.stats import t

        kind = self.kinds.get(processor)
        if kind is None:
            return None
        mean, count = self.devices.get(device, (0.0, 0))
        if count:
            noise = self.rest_variance / count
            weight = kind.device_variance / (kind.device_variance + noise) if kind.device_variance else 0.0
            centre = kind.mean + weight * (mean - kind.mean)
            variance = self.rest_variance + weight * noise + (1 - weight) ** 2 * kind.mean_variance
            freedom: float = self.freedom
        else:
            centre = kind.mean
            variance = kind.device_variance + self.rest_variance + kind.mean_variance
            freedom = kind.freedom
        centre += self.slope * math.log2(bits / 8)
        half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance + extra_variance)
        low, value, high = (math.exp(x) for x in (centre - half, centre, centre + half))
        return Spread(value, low, high, LEVEL, bool(count), kind.points, kind.devices)


def fit_efficiency(points: Sequence[DecodePoint]) -> EfficiencyModel:
    """Fit the model. ``ValueError`` for fewer than two devices, or for no device with two points."""
    names = sorted({point.device for point in points})
    kind_of = {point.device: point.processor for point in points}
    rows = {name: [p for p in points if p.device == name] for name in names}
    x = {name: np.array([math.log2(p.bits / 8) for p in rows[name]]) for name in names}
    y = {name: np.array([p.log_efficiency for p in rows[name]]) for name in names}
    inside = sum(float(((x[n] - x[n].mean()) ** 2).sum()) for n in names)
    slope = sum(float(((x[n] - x[n].mean()) * (y[n] - y[n].mean())).sum()) for n in names) / inside if inside else 0.0
    residuals = {n: y[n] - slope * x[n] for n in names}
    freedom = len(points) - len(names) - (1 if inside else 0)
    if len(names) < 2 or freedom < 1:
        raise ValueError("needs at least two devices, and one with two points")
    rest = sum(float(((r - r.mean()) ** 2).sum()) for r in residuals.values()) / freedom
    means = {n: float(residuals[n].mean()) for n in names}
    own = {}
    for kind in sorted(set(kind_of.values())):
        members = [n for n in names if kind_of[n] == kind]
        spread = float(np.var([means[n] for n in members], ddof=1)) if len(members) > 1 else 0.0
        noise = float(np.mean([rest / len(rows[n]) for n in members]))
        own[kind] = (members, max(0.0, spread - noise), len(members) - 1)
    total = sum(freedom for _, _, freedom in own.values())
    pooled = sum(freedom * variance for _, variance, freedom in own.values()) / total if total else rest
    kinds = {}
    for kind, (members, variance, degrees) in own.items():
        moderated = (PRIOR_DEVICES * pooled + degrees * variance) / (PRIOR_DEVICES + degrees)
        weights = np.array([1 / (moderated + rest / len(rows[n])) for n in members])
        mean = float((weights * np.array([means[n] for n in members])).sum() / weights.sum())
        count = sum(len(rows[n]) for n in members)
        fastest = max(p.tokens_per_s for n in members for p in rows[n])
        kinds[kind] = _Kind(
            mean, float(1 / weights.sum()), moderated, PRIOR_DEVICES + degrees, count, len(members), fastest
        )  # fmt: skip
    return EfficiencyModel(slope, rest, freedom, kinds, {n: (means[n], len(rows[n])) for n in names})


def leave_one_out(points: Sequence[DecodePoint], *, judged: Sequence[DecodePoint] | None = None) -> list[float]:
    """Signed relative errors (``0.1``: predicted 10 % too fast) of each of the ``judged`` points (by default all),
    predicted by a model of all ``points`` but that one."""
    errors = []
    for point in points if judged is None else judged:
        found = fit_efficiency([p for p in points if p is not point]).predict(
            point.device, point.processor, point.bits
        )  # fmt: skip
        assert found is not None, point
        errors.append(found.value / math.exp(point.log_efficiency) - 1)
    return errors


@dataclass(frozen=True)
class Unseen:
    """A point of a device that the model never saw: was it inside the interval, how wide, how far off."""

    point: DecodePoint
    covered: bool
    ends: float
    error: float


def leave_one_device_out(points: Sequence[DecodePoint]) -> list[Unseen]:
    """Predict all points of each device by a model of the devices with another chip."""
    found = []
    for soc in sorted({point.soc for point in points}):
        model = fit_efficiency([p for p in points if p.soc != soc])
        for point in (p for p in points if p.soc == soc):
            spread = model.predict(point.device, point.processor, point.bits)
            assert spread is not None, point
            true = math.exp(point.log_efficiency)
            found.append(Unseen(point, spread.low <= true <= spread.high, spread.ends, spread.value / true - 1))
    return found
