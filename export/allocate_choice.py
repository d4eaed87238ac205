"""One type for each tensor, so that the sum of losses is least and the sum of sizes fits: a multiple-choice knapsack.

Solved by dynamic programming over bytes (Kellerer, Pferschy & Pisinger, *Knapsack Problems*, 2004, ch. 11). Tensor
sizes are multiples of a few thousand bytes, so the table is small and the answer exact; where it would be large, sizes
are rounded up to a unit, and what that leaves unused is given to the tensor that gains most by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

__all__ = ["Option", "choose", "largest", "smallest"]

# Cells of the table; beyond, sizes are rounded up.
_MOST_CELLS = 40_000


@dataclass(frozen=True)
class Option:
    """A tensor in one type: its bytes, and what it is expected to cost (any unit that adds up, such as nats)."""

    type: str
    size_bytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]
Choice = dict[str, Option]


def smallest(options: Options) -> int:
    """Bytes when every tensor takes its smallest type."""
    return sum(min(option.size_bytes for option in each) for each in options.values())


def largest(options: Options) -> int:
    """Bytes when every tensor takes its best type; nothing is gained by more."""
    return sum(_best(each).size_bytes for each in options.values())


def choose(options: Options, budget_bytes: int) -> Choice:
    """The option of each tensor with the least total loss among those that fit into ``budget_bytes``.

    Raises :class:`UsageError` when nothing fits; ``ValueError`` for a loss that is not finite.
    """
    if not all(math.isfinite(option.loss) for each in options.values() for option in each):
        raise ValueError("a loss is not finite")
    least = smallest(options)
    if least > budget_bytes:
        raise UsageError(f"{budget_bytes:,} bytes are too few: the smallest types take {least:,}", hint="allow more")
    if largest(options) <= budget_bytes:
        return {name: _best(each) for name, each in options.items()}
    names = list(options)
    useful = [_undominated(options[name]) for name in names]
    floor = [each[0].size_bytes for each in useful]
    steps = [[option.size_bytes - low for option in each] for each, low in zip(useful, floor, strict=True)]
    unit = math.gcd(*(step for each in steps for step in each)) or 1
    room = budget_bytes - sum(floor)
    while room // unit > _MOST_CELLS:
        unit *= max(2, room // unit // _MOST_CELLS)
    found = _table([[-(-step // unit) for step in each] for each in steps], useful, room // unit)
    choice = {name: each[index] for name, each, index in zip(names, useful, found, strict=True)}
    return _fill(choice, dict(zip(names, useful, strict=True)), budget_bytes)


def _best(each: Sequence[Option]) -> Option:
    return min(each, key=lambda option: (option.loss, option.size_bytes))


def _undominated(each: Sequence[Option]) -> list[Option]:
    """Rising in size, falling in loss."""
    kept: list[Option] = []
    for option in sorted(each, key=lambda option: (option.size_bytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _table(costs: list[list[int]], options: list[list[Option]], room: int) -> list[int]:
    """The index of each tensor's option; ``costs`` in units above its smallest, which fits."""
    best = np.zeros(room + 1)
    taken = np.zeros((len(costs), room + 1), np.uint8)
    for row, (each, cost) in enumerate(zip(options, costs, strict=True)):
        after = np.full(room + 1, np.inf)
        for index, (option, units) in enumerate(zip(each, cost, strict=True)):
            if units > room:
                continue
            total = np.full(room + 1, np.inf)
            total[units:] = best[: room + 1 - units] + option.loss
            better = total < after
            after[better] = total[better]
            taken[row, better] = index
        best = after
    found, left = [0] * len(costs), room
    for row in range(len(costs) - 1, -1, -1):
        found[row] = int(taken[row, left])
        left -= costs[row][found[row]]
    return found


def _fill(choice: Choice, options: Mapping[str, list[Option]], budget_bytes: int) -> Choice:
    """Give what rounding left over to whoever gains most by it."""
    left = budget_bytes - sum(option.size_bytes for option in choice.values())
    while True:
        gains = [
            (chosen.loss - option.loss, name, option)
            for name, chosen in choice.items()
            for option in options[name]
            if option.loss < chosen.loss and option.size_bytes - chosen.size_bytes <= left
        ]
        if not gains:
            return choice
        _, name, option = max(gains, key=lambda gain: (gain[0], gain[1]))
        left -= option.size_bytes - choice[name].size_bytes
        choice[name] = option
