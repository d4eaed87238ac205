"""Coded sets come back as they were, in the bytes that were promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.sorted_ids import coded_bytes, decode_sets, encode_sets


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_set_comes_back(data: st.DataObject) -> None:
    universe = data.draw(st.integers(1, 300_000))
    count = data.draw(st.integers(1, min(universe, 70)))
    numbers = st.lists(st.integers(0, universe - 1), min_size=count, max_size=count, unique=True).map(sorted)
    rows = np.array(data.draw(st.lists(numbers, min_size=1, max_size=3)))
    coded = encode_sets(rows, universe)
    assert coded.shape == (len(rows), coded_bytes(count, universe))
    assert np.array_equal(decode_sets(coded, count, universe), rows)


@pytest.mark.parametrize("universe", [1, 5, 1 << 16, 151_665, 262_144, 1 << 24])
def test_edges_come_back(universe: int) -> None:
    for count in {1, min(64, universe)}:
        rows = np.stack([np.arange(count), np.arange(universe - count, universe)])
        coded = encode_sets(rows, universe)
        assert np.array_equal(decode_sets(coded, count, universe), rows)


def test_bits_lie_where_the_docstring_says() -> None:
    """Read bit by bit from the definition."""
    chosen = np.sort(np.random.default_rng(0).choice(151_665, 64, replace=False))
    row = encode_sets(chosen[None], 151_665)[0]
    bits = [int(byte) >> place & 1 for byte in row for place in range(8)]
    width = 11
    high = [place for place, bit in enumerate(bits[64 * width :]) if bit]
    for place, number in enumerate(chosen.tolist()):
        low = sum(bits[width * place + bit] << bit for bit in range(width))
        assert low + (high[place] - place << width) == number


def test_within_two_bits_a_number_of_the_width() -> None:
    for universe in (70_000, 128_256, 151_665, 262_144):
        assert 8 * coded_bytes(64, universe) <= 64 * (np.log2(universe / 64) + 2) + 16


def test_what_is_no_set_is_refused() -> None:
    for bad in ([[1, 1]], [[2, 1]], [[-1, 1]], [[1, 10]]):
        with pytest.raises(ValueError, match="not 2 ascending numbers below 10"):
            encode_sets(np.array(bad), 10)
    with pytest.raises(ValueError, match="not coded sets"):
        decode_sets(np.zeros((1, coded_bytes(2, 10)), np.uint8), 2, 10)
    with pytest.raises(ValueError, match="bytes"):
        decode_sets(np.zeros((1, 9), np.uint8), 2, 10)
