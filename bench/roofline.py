"""How near a run comes to what its machine can do: the roofline model (Williams, Waterman & Patterson, 2009).

A pass that moves ``bytes`` and computes ``flops`` can't be faster than ``max(bytes / bandwidth, flops / peak)``.
Bytes and operations come from the artifact (:mod:`edgestill.bench.traffic`), bandwidth and peak are measured on the
machine (:mod:`edgestill.bench.peaks`), the time is that of passes without profiling.

>>> found = attain("decode", seconds=0.02, size=100e6, flops=200e6, bandwidth=10e9, peak=100e9)
>>> found.bound, found.intensity, found.bytes_per_s, round(found.fraction, 3)
('memory', 2.0, 5000000000.0, 0.5)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..runtimes.profiling import Phase
from .traffic import Traffic

__all__ = ["Attained", "attain", "pass_cost"]


@dataclass(frozen=True)
class Attained:
    """One phase, a mean pass of it. ``size`` in bytes, ``flops`` operations, ``seconds`` the median pass;
    ``intensity`` operations a byte; ``bound`` what limits it by the model, ``bound_seconds`` how fast a pass could be,
    ``fraction`` how much of that the run reaches (1: all of it; above it, a cache helped or the peak is too low)."""

    phase: str
    seconds: float
    size: float
    flops: float
    intensity: float
    bytes_per_s: float
    flops_per_s: float
    bandwidth: float
    peak: float
    bound: Literal["memory", "compute"]
    bound_seconds: float
    fraction: float
    bandwidth_fraction: float
    peak_fraction: float


def attain(phase: str, *, seconds: float, size: float, flops: float, bandwidth: float, peak: float) -> Attained:
    """Put one pass to its roof: ``bandwidth`` in bytes/s, ``peak`` in operations/s."""
    memory, compute = size / bandwidth, flops / peak
    bound = max(memory, compute)
    return Attained(
        phase, seconds, size, flops, flops / size, size / seconds, flops / seconds, bandwidth, peak,
        "memory" if memory >= compute else "compute", bound, bound / seconds, memory / seconds, compute / seconds,
    )  # fmt: skip


def pass_cost(traffic: Traffic, phase: Phase, *, last_only: bool) -> tuple[float, float]:
    """(bytes, operations) of a mean pass of a phase. ``last_only``: the runtime makes logits of a prompt's last token
    only."""
    answers = 1 if last_only else None
    depths: Sequence[int] = range(phase.past, phase.past + phase.passes_a_run)
    sizes = [traffic.bytes_of(phase.tokens, past=past, batch=phase.batch) for past in depths]
    flops = [traffic.flops_of(phase.tokens, past=past, answers=answers, batch=phase.batch) for past in depths]
    return statistics.fmean(sizes), statistics.fmean(flops)
