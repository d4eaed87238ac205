"""The teacher's answer for each predicted token, on disk: asked once, read by every student that comes after.

Records (:mod:`~edgestill.distill.token_records`) in a :class:`~edgestill.distill.store.ShardStore`. Examples are taken
by length, those of a shard together; the tokens of an example lie in a row. What decides the content is in the header:
teacher, tokenizer, corpus, k, temperatures, tail samples, hidden layers, format. In a folder that holds several caches
any one serves whose header is the same and whose temperatures are at least those asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BadInput
from ..files import hash_json
from ..progress import Progress, silent
from .signal import Sparse
from .store import HEADER_FILE, Records, ShardStore, StorePlan, header_differences
from .token_records import TokenFormat, capture, decode

__all__ = ["Answer", "TokenCache"]

SHARD_TOKENS = 8192
"""Tokens of a shard, about (examples stay whole): what a kill loses is the teacher's time for so many."""
BATCH_TOKENS = 4096
"""Padded tokens that the teacher reads at once."""
CAPTURE_ROWS = 32
"""Tokens whose logits are reduced to records together: blocks that stay in the processor's caches (twice as fast)."""

Answer = Callable[[list[int]], Iterable[tuple[Tensor, tuple[Tensor, ...]]]]
"""``(example numbers) -> (logits [n, V], hidden states L x [n, D])`` piece by piece, over the places of these examples
in their order."""

_MEANING = {
    "teacher": "another teacher", "tokenizer": "another tokenizer", "corpus": "another corpus",
    "vocab_size": "another vocabulary", "top_k": "another top_k", "temperatures": "other temperatures",
    "tail_samples": "other tail samples", "layers": "other hidden layers", "format": "another version of edgestill",
    "ids": "another version of edgestill", "dtype": "another precision",
}  # fmt: skip


class TokenCache:
    """Top-k records of all predicted tokens of some examples.

    ``key`` names teacher, tokenizer and corpus (hashes); ``lengths`` are the examples' tokens. ``place`` is a folder
    of caches or one cache itself, which then must be the right one: :class:`BadInput` says in what it differs. With
    hidden layers a record is kept for each token, the last one of an example too.
    """

    def __init__(self, place: Path, key: Mapping[str, str], form: TokenFormat, lengths: npt.NDArray[np.int64]) -> None:
        form = dataclasses.replace(form, temperatures=tuple(sorted(set(form.temperatures))))
        self._key = dict(key)
        self._places = np.maximum(lengths - (0 if form.layers else 1), 0)
        self._lengths = lengths
        order = np.argsort(lengths, kind="stable")
        ends = np.cumsum(self._places[order])
        shard = (ends - self._places[order]) // SHARD_TOKENS
        self._shards = [order[shard == number] for number in np.unique(shard)]
        self._first = np.empty(len(lengths), dtype=np.int64)
        self._first[order] = ends - self._places[order]
        self.form, self.store = self._open(place, form)

    def plan(self, progress: Progress = silent) -> StorePlan:
        """Bytes a token, whole size and room on the disk, before anything is computed."""
        return self.store.plan(progress)

    def fill(self, answer: Answer, progress: Progress = silent) -> None:
        """Have the missing shards answered (see :meth:`ShardStore.fill`)."""

        def shard(number: int) -> Records:
            generators = tuple(self._generator(number, temperature) for temperature in self.form.temperatures)
            records = np.zeros(self.store.sizes[number], dtype=self.form.dtype)
            done = 0
            for rows in self._batches(self._shards[number]):
                progress("teacher reads the texts", number / len(self._shards))
                for logits, hidden in answer(rows):
                    for begin in range(0, len(logits), CAPTURE_ROWS):
                        piece = slice(begin, begin + CAPTURE_ROWS)
                        part = capture(logits[piece], self.form, generators, tuple(state[piece] for state in hidden))
                        records[done : done + len(part)] = part
                        done += len(part)
            if done != len(records):
                raise ValueError(f"{done} answers for {len(records)} tokens")
            return records

        self.store.fill(shard, progress)

    def sparse(
        self, examples: npt.NDArray[np.int64], temperature: float, chosen: npt.NDArray[np.bool_] | None = None
    ) -> Sparse:
        """What the teacher says at ``temperature`` of the predicted tokens of ``examples``, one after the other.

        ``chosen`` (a flag for each of them) leaves the others unread.
        """
        rows = self._rows(examples, self._lengths - 1)
        if chosen is not None and len(chosen) != len(rows):
            raise ValueError(f"{len(chosen)} places in the batch, {len(rows)} in the cache: these are other tokens")
        return decode(self.store.take(rows if chosen is None else rows[chosen]), self.form, temperature)

    def hidden(self, examples: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Outputs of the kept blocks ``[n, T, D]`` in fp32, padded on the right with zeros."""
        lengths = self._lengths[examples]
        states = self.store.take(self._rows(examples, self._lengths))["hidden"]
        found = np.zeros((len(examples), int(lengths.max()), *states.shape[1:]), dtype=np.float32)
        found[np.arange(found.shape[1])[None] < lengths[:, None]] = states
        return tuple(torch.from_numpy(np.ascontiguousarray(found[:, :, number])) for number in range(found.shape[2]))

    def _rows(self, examples: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the first ``counts[example]`` records of each example."""
        wanted = np.maximum(counts[examples], 0)
        inside = np.arange(int(wanted.sum())) - np.repeat(np.cumsum(wanted) - wanted, wanted)
        rows: npt.NDArray[np.int64] = np.repeat(self._first[examples], wanted) + inside
        return rows

    def _batches(self, examples: npt.NDArray[np.int64]) -> Iterator[list[int]]:
        """Consecutive examples (by length) of about :data:`BATCH_TOKENS` padded tokens."""
        batch: list[int] = []
        for row in examples.tolist():
            if batch and (len(batch) + 1) * int(self._lengths[row]) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _generator(self, shard: int, temperature: float) -> torch.Generator:
        """Tail tokens depend on what is asked and the shard, not on the other temperatures or on earlier shards."""
        seed = hash_json([self._key, self.form.vocab_size, self.form.kept, self.form.samples, shard, temperature])
        return torch.Generator().manual_seed(int(seed[:15], 16))

    def _store(self, place: Path, form: TokenFormat, folder: Path | None = None) -> ShardStore:
        sizes = [int(self._places[rows].sum()) for rows in self._shards]
        header = {"kind": "tokens", **self._key, **form.facts}
        return ShardStore(place, "tokens", header, form.dtype, sizes, unit="token", folder=folder)

    def _open(self, place: Path, form: TokenFormat) -> tuple[TokenFormat, ShardStore]:
        named = (place / HEADER_FILE).is_file()
        own = self._store(place, form)
        if not named and own.folder.is_dir():
            return form, own
        for folder in [place] if named else sorted(place.glob("tokens-*")):
            wider = _with_temperatures(form, folder)
            if wider is not None:
                store = self._store(place, wider, folder)
                if not header_differences(folder, store.header):
                    return wider, store
        if named:
            different = header_differences(place, own.header)
            reasons = [_MEANING[name] for name in different if name in _MEANING] or ["another content"]
            raise BadInput(
                f"the teacher cache {place} does not fit: it is of {', '.join(reasons)}",
                hint="name the folder above it in [distill.cache] path (the right one is found or made there)",
            )
        return form, own


def _with_temperatures(form: TokenFormat, folder: Path) -> TokenFormat | None:
    """``form`` as the cache in ``folder`` has it: its temperatures (``None`` if one is missing there), its ids."""
    try:
        there: Any = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
        temperatures = tuple(float(value) for value in there["temperatures"])
        plain = "ids" not in there
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wider = dataclasses.replace(form, temperatures=temperatures, plain_ids=plain)
    return wider if set(form.temperatures) <= set(temperatures) else None
