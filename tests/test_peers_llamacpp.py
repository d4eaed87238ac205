"""The figure of our tokens/s beside llama-bench: its limit, its test of equivalence, for real on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.bench.statistics import Interval
from tests.peers import registry
from tests.peers.__main__ import measure
from tests.peers.context import Context
from tests.peers.groups import measure_llamacpp
from tests.peers.registry import Subject, Taken, judge, select


@pytest.fixture(scope="module", autouse=True)
def _groups() -> None:
    registry.load_groups()


def test_the_figure_that_was_asked_for_is_there() -> None:
    one = registry.FIGURES["llama_bench_ratio"]
    assert (one.group, one.sense, one.limit) == ("measure", "at_most", 0.02)
    assert {variant.split()[1] for variant in one.variants} == {"prefill", "decode"}


@pytest.mark.parametrize(
    ("ratio", "holds"),
    [
        (Interval(1.001, 0.985, 1.015), True),
        (Interval(0.990, 0.981, 0.999), True),  # a difference, but within the limit
        (Interval(1.010, 0.990, 1.030), None),  # too wide to say
        (Interval(1.000, 0.900, 1.100), None),  # equal by its value, which proves nothing
        (Interval(0.950, 0.940, 0.960), False),
        (Interval(1.050, 1.030, 1.070), False),
    ],
)
def test_equivalence_is_decided_by_the_whole_interval(ratio: Interval, holds: bool | None) -> None:
    value, low, high = measure_llamacpp.distance(ratio)
    subject = Subject(registry.FIGURES["llama_bench_ratio"], "gguf:q8_0 decode")
    assert judge(subject, Taken(value, "made up", (low, high))).holds is holds


def test_a_busy_machine_does_not_refute_it() -> None:
    value, low, high = measure_llamacpp.distance(Interval(0.95, 0.94, 0.96))
    subject = Subject(registry.FIGURES["llama_bench_ratio"], "gguf:q8_0 decode")
    row = judge(subject, Taken(value, "made up", (low, high), doubt="others used 60% of it"))
    assert (row.holds, row.status) == (None, "undecided")


@pytest.mark.slow  # builds llama-bench
def test_on_a_tiny_model(tmp_path: Path) -> None:
    context = Context(tmp_path, tiny=True, repeats=2, threads=1)
    for subject in select(["llama_bench_ratio[gguf:q8_0 prefill]", "llama_bench_ratio[gguf:q8_0 decode]"]):
        row = measure(subject, context)
        if row.status == "unavailable":
            pytest.skip(row.how)
        assert (row.status, row.holds) == ("measured", None), row.how
        assert row.value is not None
        assert row.value < 5
