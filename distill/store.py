"""Records of one size in hashed shards on disk: what a teacher said once, for every student that comes after.

A folder named by the hash of its header (everything that decides the content) holds ``cache.json`` (that header),
``shard-00000.bin`` and so on: the records of some examples as they lie in memory, then 32 bytes, their sha256. Each
shard is written whole or not at all, so a killed run goes on with the next one. Two runs that fill one store at once
share the work: a shard belongs to the one that locked it. Reading maps the files; a row that nobody asks for is never
read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, ResourceExhausted
from ..files import atomic_write, hash_json, read_json
from ..progress import Progress, silent

# Not on Windows: two runs at once then do the work twice, and still write whole shards.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None

__all__ = ["HEADER_FILE", "Records", "ShardStore", "StorePlan", "header_differences"]

HEADER_FILE = "cache.json"
LOCK_FILE = "fill.lock"
FORMAT_VERSION = 1
DIGEST_BYTES = 32
OPEN_MAPS = 64
"""Shards that are mapped at the same time; each holds a file handle."""

Records = npt.NDArray[np.void]
Numbers = npt.NDArray[np.int64]
Header = dict[str, Any]


@dataclass(frozen=True)
class StorePlan:
    """What filling a store takes, known before it starts. ``there_bytes`` are already on disk, whole."""

    folder: Path
    unit: str
    rows: int
    row_bytes: int
    size_bytes: int
    there_bytes: int
    free_bytes: int

    @property
    def missing_bytes(self) -> int:
        """Bytes still to write; 0: nobody has to ask the teacher."""
        return self.size_bytes - self.there_bytes

    @property
    def line(self) -> str:
        """One line for people: bytes a row, size, and room."""
        there = f", {self.there_bytes / max(self.size_bytes, 1):.0%} of it there" if self.there_bytes else ""
        return (
            f"teacher cache {self.folder.name}: {self.rows:,} {self.unit}s of {self.row_bytes} bytes, "
            f"{_megabytes(self.size_bytes)}{there}; {_megabytes(self.free_bytes)} free"
        )


class ShardStore:
    """Records of type ``dtype``; ``sizes`` is how many of them each shard holds.

    ``header`` must name all that decides the content; ``prefix`` starts the folder's name below ``root``; ``unit`` is
    what a record is of. With ``folder`` the store is exactly that one (the caller has compared the headers).
    """

    def __init__(
        self,
        root: Path,
        prefix: str,
        header: Mapping[str, Any],
        dtype: npt.DTypeLike,
        sizes: Sequence[int],
        *,
        unit: str,
        folder: Path | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.header: Header = {
            "format": FORMAT_VERSION, "row_bytes": self.dtype.itemsize, "shards": hash_json(list(sizes)), **header,
        }  # fmt: skip
        self.key = hash_json(self.header)
        self.folder = folder or root / f"{prefix}-{self.key[:16]}"
        self.unit = unit
        self.sizes = tuple(sizes)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)
        self._whole: set[int] = set()
        self._maps: OrderedDict[int, Records] = OrderedDict()

    @property
    def rows(self) -> int:
        """Records in the whole store."""
        return int(self._starts[-1])

    def missing(self, progress: Progress = silent) -> list[int]:
        """Shards that are not there; each one that is there is hashed once (about a second a gigabyte)."""
        return [number for number in range(len(self.sizes)) if not self._check(number, progress)]

    def plan(self, progress: Progress = silent) -> StorePlan:
        """Sizes and room, from the store as it is now; creates nothing."""
        missing = set(self.missing(progress))
        there = sum(size for number, size in enumerate(self.sizes) if number not in missing)
        place = self.folder
        while not place.exists():
            place = place.parent
        width = self.dtype.itemsize
        return StorePlan(
            self.folder, self.unit, self.rows, width, self.rows * width, there * width, shutil.disk_usage(place).free
        )  # fmt: skip

    def fill(self, compute: Callable[[int], Records], progress: Progress = silent) -> None:
        """Write the missing shards, each ``compute(number) -> records``; says what it takes before it starts.

        Raises :class:`ResourceExhausted` before the first one when the disk has no room for all of them.
        """
        plan = self.plan(progress)
        progress(plan.line)
        if not plan.missing_bytes:
            return  # nothing is written: a whole cache may lie on a read-only disk
        needed = plan.missing_bytes + DIGEST_BYTES * len(self.sizes)
        if needed > plan.free_bytes:
            raise ResourceExhausted(
                f"the teacher's answers need {_megabytes(needed)} in {self.folder}, "
                f"{_megabytes(plan.free_bytes)} are free",
                hint="free some room, train on fewer texts, or lower top_k in [distill.cache]",
            )
        atomic_write(self.folder / HEADER_FILE, json.dumps(self.header, indent=2, sort_keys=True) + "\n")
        # What another run has locked comes last: most of it is there by then.
        for wait in (False, True):
            for number in [n for n in range(len(self.sizes)) if not self._check(n)]:
                if wait:
                    progress("waits for another run that fills the same teacher cache")
                with self._claim(number, wait) as ours:
                    if ours and not self._check(number):
                        self._write(number, compute(number))

    def take(self, rows: Numbers) -> Records:
        """A copy ``[n]`` of the records ``rows``, in the order asked for."""
        found = np.empty(len(rows), dtype=self.dtype)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shards).tolist():
            chosen = shards == number
            found[chosen] = self._map(number)[rows[chosen] - self._starts[number]]
        return found

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{number:05d}.bin"

    def _write(self, number: int, records: Records) -> None:
        if records.dtype != self.dtype or records.shape != (self.sizes[number],):
            raise ValueError(f"shard {number} is {records.dtype} {records.shape}")
        payload = np.ascontiguousarray(records).tobytes()
        atomic_write(self.path(number), payload + hashlib.sha256(payload).digest())
        self._maps.pop(number, None)
        self._whole.add(number)

    def _check(self, number: int, progress: Progress = silent) -> bool:
        """Whether a shard is on disk and hashes right; looked at once."""
        path = self.path(number)
        if number in self._whole:
            return True
        try:
            whole = _hashes_right(path, self.sizes[number] * self.dtype.itemsize)
        except FileNotFoundError:
            return False
        if not whole:
            progress(f"teacher cache: {path.name} is damaged, it is computed again")
            return False
        self._whole.add(number)
        return True

    def _map(self, number: int) -> Records:
        found = self._maps.pop(number, None)
        if found is None:
            if not self._check(number):
                raise BadInput(
                    f"{self.path(number)} is missing or damaged", hint="run the same command again: it is written anew"
                )
            mapped = np.memmap(self.path(number), dtype=self.dtype, mode="r", shape=(self.sizes[number],))
            found = mapped.view(np.ndarray)
        self._maps[number] = found
        if len(self._maps) > OPEN_MAPS:
            self._maps.popitem(last=False)
        return found

    @contextlib.contextmanager
    def _claim(self, number: int, wait: bool) -> Iterator[bool]:
        """Lock one shard against other processes (a kill frees it); gives whether it is ours."""
        if fcntl is None:
            yield True
            return
        with (self.folder / LOCK_FILE).open("a+b") as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            except (BlockingIOError, PermissionError):
                yield False
                return
            yield True


def header_differences(found: Path, header: Mapping[str, Any]) -> list[str]:
    """Names of the header's fields in which the store in the folder ``found`` is another one."""
    theirs = read_json(found / HEADER_FILE)
    if not isinstance(theirs, dict):
        raise BadInput(f"{found / HEADER_FILE} is not a header", hint="remove the folder; it is filled anew")
    return [name for name, value in header.items() if theirs.get(name) != value]


def _hashes_right(path: Path, payload_bytes: int) -> bool:
    with path.open("rb") as stream:
        if path.stat().st_size != payload_bytes + DIGEST_BYTES:
            return False
        digest, left = hashlib.sha256(), payload_bytes
        while left:
            chunk = stream.read(min(left, 1 << 20))
            if not chunk:
                return False
            digest.update(chunk)
            left -= len(chunk)
        return digest.digest() == stream.read(DIGEST_BYTES)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
