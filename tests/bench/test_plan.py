from __future__ import annotations

from collections import Counter

import pytest

from edgestill.bench.plan import plan_launches


def test_every_subject_gets_its_launches_and_the_control_twice_as_many() -> None:
    plan = plan_launches(["a", "b", "c"], 3, control="b")
    assert Counter((launch.subject, launch.kind, launch.control) for launch in plan) == {
        ("a", "speed", False): 3, ("b", "speed", False): 3, ("c", "speed", False): 3, ("b", "speed", True): 3,
        **{(name, kind, False): 1 for name in "abc" for kind in ("cold", "memory")},
    }  # fmt: skip


def test_every_second_round_runs_backwards() -> None:
    plan = plan_launches(list("abcd"), 4, kinds=("speed",), seed=3)
    rounds = [[launch.subject for launch in plan if launch.round == index] for index in range(4)]
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]
    assert all(sorted(names) == list("abcd") for names in rounds)


def test_a_linear_drift_cancels_over_two_rounds() -> None:
    plan = plan_launches(list("abcd"), 2, kinds=("speed",))
    place: Counter[str] = Counter()
    for position, launch in enumerate(plan):
        place[launch.subject] += position
    assert len(set(place.values())) == 1


def test_speed_is_over_before_anything_else_starts() -> None:
    kinds = [launch.kind for launch in plan_launches(["a", "b"], 2)]
    assert kinds == ["speed"] * 4 + ["cold"] * 2 + ["memory"] * 2


def test_the_seed_decides() -> None:
    assert plan_launches(list("abcdef"), 2, seed=1) == plan_launches(list("abcdef"), 2, seed=1)
    assert plan_launches(list("abcdef"), 2, seed=1) != plan_launches(list("abcdef"), 2, seed=2)


def test_an_unknown_control_is_an_error() -> None:
    with pytest.raises(ValueError, match="'z'"):
        plan_launches(["a"], 1, control="z")
