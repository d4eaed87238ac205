"""One vector a text, computed once and kept on disk: what a sentence encoder or classifier says of each example.

The store is :class:`~edgestill.distill.store.ShardStore`. Texts are taken by length (little padding); which row is
which follows from the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..progress import Progress, silent
from .store import Records, ShardStore

__all__ = ["VectorCache"]

SHARD_ROWS = 2048
Floats = npt.NDArray[np.float32]
Compute = Callable[[list[int]], Floats]


class VectorCache:
    """Teacher vectors ``[N, width]`` of N texts, float32, memory-mapped; ``key`` is all that decides them."""

    def __init__(self, folder: Path, key: dict[str, Any], lengths: npt.NDArray[np.int64], width: int) -> None:
        self._order = np.argsort(lengths, kind="stable")
        self._place = np.argsort(self._order, kind="stable")
        total = len(lengths)
        sizes = [min(SHARD_ROWS, total - begin) for begin in range(0, total, SHARD_ROWS)]
        self.store = ShardStore(
            folder, "teacher", {"kind": "vectors", **key}, [("vector", "<f4", (width,))], sizes, unit="text"
        )

    def fill(self, compute: Compute, batch_size: int = 64, progress: Progress = silent) -> None:
        """Compute the missing shards with ``compute(example numbers) -> [n, width]``."""
        total = len(self._order)

        def shard(number: int) -> Records:
            begin = number * SHARD_ROWS
            rows = self._order[begin : begin + SHARD_ROWS]
            records = np.empty(len(rows), dtype=self.store.dtype)
            for start in range(0, len(rows), batch_size):
                progress("teacher reads the texts", (begin + start) / total)
                block = compute(rows[start : start + batch_size].tolist())
                if not np.isfinite(block).all():
                    raise BadInput("the teacher's output is not finite (NaN or infinity)", hint="check its weights")
                records["vector"][start : start + batch_size] = block
            return records

        self.store.fill(shard, progress)

    def rows(self, numbers: npt.NDArray[np.int64]) -> Floats:
        """The vectors ``[n, width]`` of the examples ``numbers``."""
        found: Floats = np.ascontiguousarray(self.store.take(self._place[numbers])["vector"])
        return found
