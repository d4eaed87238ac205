"""One vector a text, computed once and kept on disk: what a sentence encoder or classifier says of each example.

A folder named by the hash of everything that decides the content (teacher, tokenised texts) holds ``shard-00000.npy``
and so on, each written whole or not at all, so that a killed run goes on with the next one. Texts are taken by length
(little padding); ``order`` in ``cache.json`` says which row is which.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, ResourceExhausted
from ..files import atomic_write, hash_json
from ..progress import Progress, silent

__all__ = ["VectorCache"]

VERSION = 1
SHARD_ROWS = 2048
Floats = npt.NDArray[np.float32]
Compute = Callable[[list[int]], Floats]


class VectorCache:
    """Teacher vectors ``[N, D]`` of N texts, float32, memory-mapped."""

    def __init__(self, folder: Path, key: dict[str, Any], lengths: npt.NDArray[np.int64]) -> None:
        self.key = hash_json({"version": VERSION, "shard_rows": SHARD_ROWS, **key})
        self.folder = folder / f"teacher-{self.key[:16]}"
        self._order = np.argsort(lengths, kind="stable")
        self._place = np.argsort(self._order, kind="stable")
        self._shards: list[npt.NDArray[np.float32]] = []

    def fill(self, compute: Compute, width: int, batch_size: int = 64, progress: Progress = silent) -> None:
        """Compute the missing shards with ``compute(example numbers) -> [n, width]`` and map all of them."""
        total = len(self._order)
        self._check_room(total * width * 4)
        atomic_write(self.folder / "cache.json", json.dumps({"key": self.key, "rows": total, "width": width}) + "\n")
        self._shards = []
        for number, begin in enumerate(range(0, total, SHARD_ROWS)):
            rows = self._order[begin : begin + SHARD_ROWS]
            path = self.folder / f"shard-{number:05d}.npy"
            if not self._is_whole(path, (len(rows), width)):
                parts = []
                for start in range(0, len(rows), batch_size):
                    progress("teacher reads the texts", (begin + start) / total)
                    parts.append(compute(rows[start : start + batch_size].tolist()))
                block = np.concatenate(parts).astype(np.float32, copy=False)
                if not np.isfinite(block).all():
                    raise BadInput("the teacher's output is not finite (NaN or infinity)", hint="check its weights")
                stream = BytesIO()
                np.save(stream, block, allow_pickle=False)
                atomic_write(path, stream.getvalue())
            self._shards.append(np.load(path, mmap_mode="r", allow_pickle=False))

    def rows(self, numbers: npt.NDArray[np.int64]) -> Floats:
        """The vectors ``[n, D]`` of the examples ``numbers``."""
        places = self._place[numbers]
        return np.stack([self._shards[place // SHARD_ROWS][place % SHARD_ROWS] for place in places])

    def _is_whole(self, path: Path, shape: tuple[int, int]) -> bool:
        if not path.is_file():
            return False
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            return False
        return bool(found.shape == shape and found.dtype == np.float32)

    def _check_room(self, size_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in self.folder.glob("shard-*.npy"))
        free = shutil.disk_usage(self.folder).free
        if size_bytes - there > free:
            raise ResourceExhausted(
                f"the teacher's vectors need {size_bytes / 1e6:.0f} MB in {self.folder}, {free / 1e6:.0f} MB are free",
                hint="free some room, or train on fewer texts",
            )
