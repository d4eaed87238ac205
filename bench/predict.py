"""How fast an artifact will be on a device that is not here, and whether it fits, each with its interval and error.

Decoding reads every weight for every token, so its speed is the bandwidth that a device reaches over the bytes that a
token costs (:mod:`~edgestill.bench.predict_work`). What share of the documented bandwidth that is, is learnt from
published speeds (:mod:`~edgestill.bench.predict_efficiency`); prompts and encoders go by published prompt speeds
(:mod:`~edgestill.bench.predict_compute`); memory by the artifact's bytes and measurements of the runtime
(:mod:`~edgestill.bench.predict_memory`). What nothing is published or measured of is not predicted; the reason says
what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from . import predict_compute, predict_efficiency, predict_memory
from .points import load_points
from .predict_calibration import Calibration
from .predict_compute import compute_points, fit_compute
from .predict_efficiency import Spread, fit_efficiency, leave_one_device_out
from .predict_memory import fit_memory, load_memory_points
from .predict_work import Work
from .profiles import DeviceProfile

__all__ = ["MethodError", "Prediction", "method_errors", "predict", "predicted_metrics", "stretch"]

_PUBLISHED = "llama.cpp"  # the runtime that most published speeds were taken with
_GENERATION = ("decode_tokens_per_s", "prefill_tokens_per_s", "time_to_first_token_ms")
_ENCODER = ("latency_ms",)
_MEMORY = ("peak_anonymous_bytes", "peak_file_backed_bytes", "peak_memory_bytes", "memory_share")
_FLOAT_BITS = 15.0  # from here on weights are floating-point numbers


@dataclass(frozen=True)
class Prediction:
    """One metric: ``value`` with the interval ``low``–``high`` that a measurement falls into with probability
    ``level``, or ``None`` with a ``reason``. ``n``: the points that it stands on. ``method`` says how, and what error
    the method has on points that it did not see."""

    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = predict_efficiency.LEVEL
    n: int = 0
    reason: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodError:
    """Mean absolute relative error of a method on points that it did not see, and on how many."""

    leave_one_out: float
    points: int
    leave_one_device_out: Mapping[str, float] = field(default_factory=dict)


def predicted_metrics(task: str) -> tuple[str, ...]:
    """The metrics that :func:`predict` has a value or a reason for."""
    return (*(_GENERATION if task == "text-generation" else _ENCODER), *_MEMORY)


@cache
def method_errors() -> Mapping[str, MethodError]:
    """The error of each method, computed from the points that it is fitted on."""
    points = load_points()
    decode = predict_efficiency.leave_one_out(points)
    unseen: dict[str, list[float]] = {}
    for found in leave_one_device_out(points):
        unseen.setdefault(found.point.processor, []).append(abs(found.error))
    prefill = predict_compute.leave_one_out(compute_points())
    memory = predict_memory.leave_one_out(load_memory_points())
    return {
        "decode": MethodError(_mean(decode), len(decode), {kind: _mean(e) for kind, e in sorted(unseen.items())}),
        "prefill": MethodError(_mean(prefill), len(prefill)),
        "memory": MethodError(_mean(memory), len(memory)),
    }


def predict(
    work: Work,
    profile: DeviceProfile,
    *,
    length: int,
    new_tokens: int,
    calibration: Calibration | None = None,
) -> list[Prediction]:
    """Predict what `edgestill bench` measures: a forward pass of ``length`` tokens, or, of a decoder, a prompt of
    ``length`` and ``new_tokens`` after it; memory. ``calibration`` relates another runtime to llama.cpp."""
    found = []
    if profile.processor == "npu":
        reason = f"{work.engine} does not run on an NPU; its runtime has a format of its own"
        return [Prediction(name, reason=reason) for name in predicted_metrics(work.task)]
    if work.task == "text-generation":
        found.append(_decode(work, profile, length, new_tokens, calibration))
        found += _prefill(work, profile, length, calibration)
    else:
        found.append(_latency(work, profile, length, calibration))
    return found + _memory(work, profile, length + new_tokens if work.task == "text-generation" else 0)


def _decode(
    work: Work, profile: DeviceProfile, length: int, new_tokens: int, calibration: Calibration | None
) -> Prediction:
    name = "decode_tokens_per_s"
    if profile.bandwidth is None:
        return Prediction(name, reason=f"no documented memory bandwidth in the profile {profile.name}")
    shift = _shift(work.engine, "decode", profile, calibration)
    if isinstance(shift, str):
        return Prediction(name, reason=shift)
    ratio, variance = shift
    model = fit_efficiency(load_points())
    depth = length + new_tokens / 2  # the cache in the middle of the run
    per_token = work.bytes_per_token(depth)
    spread = model.predict(profile.fitted_as, profile.processor, work.bits, extra_variance=variance)
    if spread is None:
        return Prediction(name, reason=f"no published decode speed of any {profile.processor}")
    speed = stretch(_times(spread, profile.bandwidth.value * ratio / per_token), model.kinds[profile.processor].fastest)
    errors = method_errors()["decode"]
    error = errors.leave_one_out if spread.fitted else errors.leave_one_device_out[profile.processor]
    method = {
        "how": "documented bandwidth x efficiency / bytes a token",
        "bandwidth_bytes_per_s": profile.bandwidth.value,
        "bandwidth_source": profile.bandwidth.source,
        "efficiency": spread.value * ratio,
        "bytes_per_token": round(per_token),
        "bits_per_weight": round(work.bits, 3),
        "fastest_published": model.kinds[profile.processor].fastest,
        "extrapolated": spread.ends < speed.ends * 0.999,
        "device_fitted": spread.fitted,
        "devices_of_its_kind": spread.devices,
        "mean_error": round(error, 4),
        "mean_error_of": "leave one point out" if spread.fitted else "leave one device out",
        "calibration": calibration.machine if calibration and work.engine != _PUBLISHED else None,
    }
    return _scaled(name, speed, 1.0, method)


def stretch(speed: Spread, fastest: float) -> Spread:
    """A decode speed beyond the ``fastest`` published one of its kind of processor.

    Each token also costs time that its bytes do not explain (starting kernels, choosing the token). At published
    speeds it hides in the efficiency; a small model is faster than all of them only as far as it stays small. Nothing
    published says how small, so the interval reaches down as if nothing were faster than what was published, and the
    value lies in the middle, in logs.

    >>> found = stretch(Spread(400.0, 380.0, 420.0, 0.9, True, 3, 1), 100.0)
    >>> round(found.value), round(found.low), round(found.high)
    (200, 95, 420)
    """
    beyond = max(1.0, speed.value / fastest)
    return replace(speed, value=speed.value / beyond**0.5, low=speed.low / beyond)


def _prefill(work: Work, profile: DeviceProfile, length: int, calibration: Calibration | None) -> list[Prediction]:
    rate, first = "prefill_tokens_per_s", "time_to_first_token_ms"
    spread = _compute(work, profile, calibration)
    if isinstance(spread, str):
        return [Prediction(rate, reason=spread), Prediction(first, reason=spread)]
    method = _compute_method(profile, spread)
    operations = 2 * work.weights
    return [
        _scaled(rate, spread, 1 / operations, method),
        _inverse(first, spread, operations * length * 1e3, method),
    ]


def _latency(work: Work, profile: DeviceProfile, length: int, calibration: Calibration | None) -> Prediction:
    spread = _compute(work, profile, calibration)
    if isinstance(spread, str):
        return Prediction("latency_ms", reason=spread)
    return _inverse("latency_ms", spread, 2 * work.weights * length * 1e3, _compute_method(profile, spread))


def _compute(work: Work, profile: DeviceProfile, calibration: Calibration | None) -> Spread | str:
    """Operations a second, or why they are not known."""
    shift = _shift(work.engine, "prefill", profile, calibration)
    if isinstance(shift, str):
        return shift
    ratio, variance = shift
    floating = work.bits >= _FLOAT_BITS
    model = fit_compute(compute_points())
    spread = model.predict(
        profile.fitted_as, floating=floating, weights=float(work.weights), extra_variance=variance
    )  # fmt: skip
    if spread is None and profile.prefill:
        own = compute_points([*_as_fitted(profile)])
        model = fit_compute([*compute_points(), *own])
        spread = model.predict(profile.name, floating=floating, weights=float(work.weights), extra_variance=variance)
    if spread is None:
        kind = "floating-point" if floating else "quantised"
        return f"no published prompt speed with {kind} weights for {profile.name}"
    return Spread(
        spread.value * ratio, spread.low * ratio, spread.high * ratio, spread.level, True, spread.points, 1
    )  # fmt: skip


def _as_fitted(profile: DeviceProfile) -> list[DeviceProfile]:
    """A profile of the user's own, as if it came with edgestill."""
    return [replace(profile, fitted_as=profile.name)]


def _memory(work: Work, profile: DeviceProfile, tokens: int) -> list[Prediction]:
    names = _MEMORY
    model = fit_memory(load_memory_points()).get(work.engine)
    if model is None:
        return [Prediction(name, reason=f"no measured memory of {work.engine}") for name in names]
    cache_bytes = float(tokens * (work.kv_bytes_per_token or 0))
    anonymous, mapped = model.anonymous(work, cache_bytes), model.file_backed(work)
    error = method_errors()["memory"]
    method = {
        "how": "artifact bytes + KV cache + what the runtime added in measurements",
        "kv_cache_bytes": round(cache_bytes),
        "mean_error": round(error.leave_one_out, 4),
        "mean_error_of": "leave one point out",
    }
    total = Spread(
        anonymous.value + mapped, anonymous.low + mapped, anonymous.high + mapped, anonymous.level, True,
        anonymous.points, 1,
    )  # fmt: skip
    found = [
        _scaled(names[0], anonymous, 1.0, method),
        Prediction(names[1], mapped, mapped, mapped, n=anonymous.points, method=method),
        _scaled(names[2], total, 1.0, method),
    ]
    limit = profile.process_memory or profile.memory
    if limit is None:
        return [*found, Prediction(names[3], reason=f"no documented memory in the profile {profile.name}")]
    method = {**method, "memory_bytes": limit.value, "memory_source": limit.source,
              "verdict": _verdict(anonymous, total, limit.value)}  # fmt: skip
    return [*found, _scaled(names[3], total, 1 / limit.value, method)]


def _verdict(anonymous: Spread, total: Spread, limit: float) -> str:
    """Will it be killed? What can't be given back decides; mapped weights that do not fit are read again and again."""
    if anonymous.low > limit:
        return "killed: what it can't give back is more than there is"
    if anonymous.high > limit:
        return "may be killed: the interval of what it can't give back reaches beyond what there is"
    if total.high > limit:
        return "not killed, but its weights may not stay in memory: reading them again makes it slow"
    return f"fits: {(limit - total.high) / 1e9:.1f} GB are left for the system and other apps"


def _shift(
    engine: str, what: str, profile: DeviceProfile, calibration: Calibration | None
) -> tuple[float, float] | str:
    """The factor and its log variance between this runtime and those of the published speeds, or what is missing."""
    if engine == _PUBLISHED:
        return 1.0, 0.0
    if profile.processor != "cpu":
        return f"{engine} is compared with {_PUBLISHED} on CPUs only, and this is a {profile.processor}"
    ratio = calibration.ratio(engine, what) if calibration else None
    if ratio is None:
        return f"no published speed with {engine}, and none measured here: edgestill devices calibrate"
    return ratio


def _compute_method(profile: DeviceProfile, spread: Spread) -> dict[str, Any]:
    error = method_errors()["prefill"]
    return {
        "how": "published prompt speeds of this device, in operations a second",
        "operations_per_s": spread.value,
        "sources": sorted({anchor.source for anchor in profile.prefill}),
        "mean_error": round(error.leave_one_out, 4),
        "mean_error_of": "leave one point out",
    }


def _times(spread: Spread, factor: float) -> Spread:
    return replace(spread, value=spread.value * factor, low=spread.low * factor, high=spread.high * factor)


def _scaled(name: str, spread: Spread, scale: float, method: Mapping[str, Any]) -> Prediction:
    return Prediction(
        name, spread.value * scale, spread.low * scale, spread.high * scale, spread.level, spread.points, None, method
    )  # fmt: skip


def _inverse(name: str, spread: Spread, amount: float, method: Mapping[str, Any]) -> Prediction:
    return Prediction(
        name, amount / spread.value, amount / spread.high, amount / spread.low, spread.level, spread.points, None,
        method,
    )  # fmt: skip


def _mean(errors: list[float]) -> float:
    return float(np.mean(np.abs(errors)))
