from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.distill import cache
from edgestill.distill.cache import VectorCache
from edgestill.errors import BadInput

LENGTHS = np.array([9, 2, 7, 4, 4, 1, 8])
TABLE = np.arange(21, dtype=np.float32).reshape(7, 3)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_ROWS", 3)


def _cache(folder: Path, **key: object) -> VectorCache:
    return VectorCache(folder, {"teacher": "a", **key}, LENGTHS, 3)


def test_rows_come_back_by_example(tmp_path: Path):
    asked: list[int] = []

    def compute(rows: list[int]) -> np.ndarray:
        asked.extend(rows)
        return TABLE[rows]

    one = _cache(tmp_path)
    one.fill(compute, batch_size=2)
    assert asked == [5, 1, 3, 4, 2, 6, 0]  # by length, so that batches hold little padding
    wanted = np.array([6, 0, 5, 3])
    assert np.array_equal(one.rows(wanted), TABLE[wanted])


def test_a_killed_fill_goes_on_with_the_next_shard(tmp_path: Path):
    class Killed(BaseException):
        pass

    def dies(rows: list[int]) -> np.ndarray:
        if 2 in rows:
            raise Killed
        return TABLE[rows]

    with pytest.raises(Killed):
        _cache(tmp_path).fill(dies)
    asked: list[int] = []
    again = _cache(tmp_path)
    again.fill(lambda rows: (asked.extend(rows), TABLE[rows])[1])
    assert asked == [4, 2, 6, 0]
    assert np.array_equal(again.rows(np.arange(7)), TABLE)


def test_another_teacher_has_another_folder(tmp_path: Path):
    assert _cache(tmp_path).store.folder != _cache(tmp_path, teacher="b").store.folder
    assert _cache(tmp_path).store.folder == _cache(tmp_path).store.folder


def test_a_teacher_that_says_nan_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="not finite"):
        _cache(tmp_path).fill(lambda rows: TABLE[rows] * np.nan)
