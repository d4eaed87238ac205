"""Timings with a clock that we hold."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from edgestill.errors import BadInput
from edgestill.runtimes.session import DecodedToken
from edgestill.runtimes.timing import time_decode, time_forward

IDS = np.ones((1, 4), np.int64)


class Clock:
    """Nanoseconds that pass only when a session works."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Worker:
    def __init__(self, clock: Clock, durations) -> None:
        self.clock, self.durations, self.calls = clock, iter(durations), 0
        self.collecting: list[bool] = []

    def _work(self) -> None:
        self.calls += 1
        self.collecting.append(gc.isenabled())
        self.clock.now += round(next(self.durations) * 1e9)

    def forward(self, ids, attention_mask):
        self._work()
        return ids

    def decode(self, prompt_ids, max_new_tokens, *, logits=False):
        for token in range(max_new_tokens):
            self._work()
            yield DecodedToken(token, 0.0)


def forward(durations, **bounds):
    clock = Clock()
    worker = Worker(clock, durations)
    return time_forward(worker, IDS, IDS, clock=clock, **bounds), worker


def test_samples_are_raw_and_come_after_a_stable_warm_up():
    durations = [9, 5, 3, 1, 1, 1, 1, 1, *[2, 3, 4]]
    timed, worker = forward(durations, repeats=3, warmup=3, max_seconds=1000)
    assert timed.warmup == (9, 5, 3, 1, 1, 1, 1, 1)
    assert timed.stable
    assert timed.samples == (2, 3, 4)
    assert worker.calls == 11


def test_an_unsteady_machine_ends_the_warm_up_by_its_bound_and_is_told():
    timed, _ = forward([1.0, 2.0] * 50, repeats=2, warmup=2, max_seconds=1000)
    assert len(timed.warmup) == 2 * 5 + 5
    assert not timed.stable
    assert len(timed.samples) == 2


def test_slow_models_are_bounded_by_seconds_but_timed_once():
    timed, worker = forward([30.0] * 9, repeats=10, warmup=3, max_seconds=10)
    assert timed.warmup == (30,)
    assert timed.samples == (30,)
    assert worker.calls == 2
    timed, _ = forward([4.0] * 99, repeats=10, warmup=0, max_seconds=10)
    assert timed.samples == (4, 4, 4)  # the third ends after 10 s
    assert timed.warmup == ()


def test_the_garbage_collector_rests_while_timing_and_then_works_again():
    _, worker = forward([1.0] * 99, repeats=2, warmup=1, max_seconds=99)
    assert worker.collecting[-2:] == [False, False]
    assert worker.collecting[0]
    assert gc.isenabled()


def test_decoding_splits_the_first_token_from_the_others():
    clock = Clock()
    worker = Worker(clock, [8, 1, 2] + [5, 3, 4] * 2)
    timed = time_decode(worker, [1, 2], 3, repeats=2, warmup=1, max_seconds=11, clock=clock)
    assert timed.warmup == (11,)
    assert timed.samples == ({"first_s": 5, "tokens_s": [3, 4]},)
    clock = Clock()
    timed = time_decode(Worker(clock, [1] * 99), [1], 1, repeats=2, warmup=0, max_seconds=9, clock=clock)
    assert timed.samples == ({"first_s": 1, "tokens_s": []},) * 2


def test_a_session_that_stops_early_is_not_timed():
    class Short(Worker):
        def decode(self, prompt_ids, max_new_tokens, *, logits=False):
            yield DecodedToken(1, 0.0)

    clock = Clock()
    with pytest.raises(BadInput, match="1 tokens instead of 3"):
        time_decode(Short(clock, []), [1], 3, repeats=1, warmup=0, clock=clock)


@pytest.mark.parametrize("bounds", [{"repeats": 0}, {"repeats": 1, "warmup": -1}, {"repeats": 1, "max_seconds": 0}])
def test_impossible_bounds_are_refused(bounds):
    with pytest.raises(BadInput, match="can't time"):
        forward([1.0] * 9, **bounds)
