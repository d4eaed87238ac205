"""The roofline against its definition, and on a real product whose cost is known in closed form."""

from __future__ import annotations

import pytest

from edgestill.bench.roofline import attain, pass_cost
from edgestill.bench.traffic import Traffic
from edgestill.runtimes.profiling import Phase


@pytest.mark.parametrize(
    ("size", "flops", "bound", "bound_seconds"),
    [(1e9, 1e9, "memory", 0.1), (1e6, 1e11, "compute", 1.0), (1e10, 1e11, "memory", 1.0)],
)
def test_the_roof_is_the_lower_of_both(size, flops, bound, bound_seconds):
    found = attain("forward", seconds=2.0, size=size, flops=flops, bandwidth=1e10, peak=1e11)
    assert (found.bound, found.bound_seconds) == (bound, bound_seconds)
    assert found.fraction == bound_seconds / 2 == max(found.bandwidth_fraction, found.peak_fraction)
    # the same from Williams' form: attainable = min(peak, intensity * bandwidth)
    assert found.flops_per_s / min(1e11, found.intensity * 1e10) == pytest.approx(found.fraction)


def test_a_mean_pass_of_decoding_lies_in_the_middle():
    traffic = Traffic(1000, 10, 4, 100, 50, 8)
    phase = Phase("decode", 1, past=6, passes_a_run=3)  # after 6, 7 and 8 tokens
    assert pass_cost(traffic, phase, last_only=False) == (traffic.bytes_of(1, past=7), traffic.flops_of(1, past=7))
    prefill = Phase("prefill", 6)
    assert pass_cost(traffic, prefill, last_only=True)[1] == 6 * 100 + 50 + 36 * 8
    assert pass_cost(traffic, prefill, last_only=False)[1] == 6 * 150 + 36 * 8
