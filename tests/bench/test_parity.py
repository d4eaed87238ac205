"""Differences of outputs against a double loop."""

from __future__ import annotations

import numpy as np
import pytest

from edgestill.bench.parity import default_limit, difference


def test_against_a_double_loop() -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(2, 3, 5)).astype(np.float32) for _ in range(2))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    square = reference = 0.0
    largest = count = changed = 0
    for row in range(2):
        for place in range(3):
            if not mask[row, place]:
                continue
            changed += int(a[row, place].argmax() != b[row, place].argmax())
            for column in range(5):
                apart = float(a[row, place, column]) - float(b[row, place, column])
                square, largest = square + apart**2, max(largest, abs(apart))
                reference, count = reference + float(b[row, place, column]) ** 2, count + 1
    found = difference(a, b, mask, "text-generation")
    assert found.rms == pytest.approx((square / reference) ** 0.5)
    assert found.largest == pytest.approx(largest / (reference / count) ** 0.5)
    assert (found.argmax_changes, found.positions, found.equal) == (changed, 3, False)
    assert changed > 0


def test_padding_does_not_count_and_equal_is_bit_for_bit() -> None:
    a = np.ones((1, 2, 3), np.float32)
    b = a.copy()
    b[0, 1] = 7
    assert difference(a, b, np.array([[1, 0]]), "text-generation").equal
    assert not difference(a, b, np.array([[1, 1]]), "text-generation").equal
    embeddings = difference(a[:, 0], a[:, 0] * np.float32(1 + 1e-7), np.ones((1, 2), int), "feature-extraction")
    assert embeddings.argmax_changes is None


def test_not_a_number_on_one_side_is_infinitely_far() -> None:
    a, b = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    a[0, 0] = np.nan
    assert difference(a, b, np.ones((2, 1), int), "text-classification").rms == np.inf
    b[0, 0] = np.nan
    assert difference(a, b, np.ones((2, 1), int), "text-classification").rms == 0
    with pytest.raises(ValueError, match="shapes"):
        difference(a, b[:1], np.ones((2, 1), int), "text-classification")


def test_float_artifacts_must_agree_closer() -> None:
    assert default_limit("fp32-portable") == default_limit("fp16") < default_limit("int8") == default_limit("int4-b32")
