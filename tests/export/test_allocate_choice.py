"""The knapsack against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from edgestill.errors import UsageError
from edgestill.export import allocate_choice
from edgestill.export.allocate_choice import Option, choose, largest, smallest


def _problem(seed: int, unit: int) -> dict[str, list[Option]]:
    chooser = random.Random(seed)
    return {
        f"t{index}": [
            Option(f"o{number}", unit * chooser.randint(1, 40), chooser.choice((0.0, 0.5, chooser.random(), 1.0)))
            for number in range(chooser.randint(1, 4))
        ]
        for index in range(chooser.randint(1, 6))
    }


def _brute(options: dict[str, list[Option]], budget: int) -> float:
    return min(
        sum(option.loss for option in each)
        for each in itertools.product(*options.values())
        if sum(option.size_bytes for option in each) <= budget
    )


@pytest.mark.parametrize("unit", [1, 18, 6912])
@pytest.mark.parametrize("seed", range(40))
def test_the_least_loss_of_all_that_fit(seed: int, unit: int) -> None:
    options = _problem(seed, unit)
    for budget in {smallest(options), (smallest(options) + largest(options)) // 2 + 1, 200 * unit}:
        if budget < smallest(options):
            continue
        found = choose(options, budget)
        assert found.keys() == options.keys()
        assert sum(option.size_bytes for option in found.values()) <= budget
        assert sum(option.loss for option in found.values()) == pytest.approx(_brute(options, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_table_still_fits_and_is_nearly_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _problem(seed, 997)
    budget = (smallest(options) + largest(options)) // 2 + smallest(options) // 3
    exact = sum(option.loss for option in choose(options, budget).values())
    monkeypatch.setattr(allocate_choice, "_MOST_CELLS", 30)
    coarse = choose(options, budget)
    assert sum(option.size_bytes for option in coarse.values()) <= budget
    assert exact <= sum(option.loss for option in coarse.values()) + 1e-12
    assert sum(option.loss for option in coarse.values()) <= exact + 1.0


def test_too_little_is_refused_and_too_much_takes_the_best() -> None:
    options = {"a": [Option("small", 10, 1.0), Option("large", 20, 0.0)], "b": [Option("only", 7, 0.3)]}
    with pytest.raises(UsageError, match=r"16 bytes are too few: the smallest types take 17"):
        choose(options, 16)
    assert {name: option.type for name, option in choose(options, 10**9).items()} == {"a": "large", "b": "only"}
    with pytest.raises(ValueError, match="not finite"):
        choose({"a": [Option("broken", 1, float("nan"))]}, 10)
