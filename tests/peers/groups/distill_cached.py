"""What a step with a cached teacher costs, what the cache takes on disk, and what reading it takes of a step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edgestill.bench.statistics import bootstrap_interval, ratio_interval
from edgestill.distill.token_cache import TokenCache
from edgestill.distill.token_records import TokenFormat

from ..context import Context
from ..registry import Taken, figure
from .distill_steps import PLAIN, TOP_K, rounds, taken

CACHED = ("cached", "own", "plain")
CACHED_TURNS = [(name, "step") for name in CACHED]
TEXTS, LENGTH, BATCH = 256, 128, 4
LARGE_VOCABULARY = 151_665
_MOST_BYTES = 300.0
_SHARE = 0.1  # what a cached step may take beyond a plain one


@figure(
    "step_cached", group="distill", title="step with a cached teacher over the plain fine-tuning step", unit="ratio",
    limit=1.10, peer=PLAIN,
)  # fmt: skip
def step_cached(context: Context, variant: str) -> Taken:
    samples, _, busy = rounds(context, CACHED, CACHED_TURNS)
    found = ratio_interval(samples["cached", "step"], samples["plain", "step"])
    return taken(context, found, f"forward KL over top {TOP_K} + tail, other rows in every step", samples, busy)


@figure(
    "step_cached_own", group="distill", title="step with a cached teacher over our own cross-entropy step",
    unit="ratio", peer="ours, with cross-entropy alone",
)  # fmt: skip
def step_cached_own(context: Context, variant: str) -> Taken:
    samples, _, busy = rounds(context, CACHED, CACHED_TURNS)
    found = ratio_interval(samples["cached", "step"], samples["own", "step"])
    return taken(context, found, f"forward KL over top {TOP_K} + tail", samples, busy)


@figure(
    "cache_bytes", group="distill", title=f"bytes a token of a cached teacher, k = {TOP_K}", unit="bytes",
    limit=_MOST_BYTES, peer="none: an absolute promise",
)  # fmt: skip
def cache_bytes(context: Context, variant: str) -> Taken:
    cache, vocab_size, tokens = _filled(context)
    size = sum(path.stat().st_size for path in cache.store.folder.rglob("*") if path.is_file())
    how = (
        f"all files of a cache of {tokens:,} tokens over it: checksums and header included; vocabulary {vocab_size:,}, "
        "one temperature"
    )
    return Taken(size / tokens, how)


@figure(
    "cache_bytes_large", group="distill", title=f"the same over a vocabulary of 151,665 tokens, k = {TOP_K}",
    unit="bytes", limit=_MOST_BYTES, peer="none: an absolute promise",
)  # fmt: skip
def cache_bytes_large(context: Context, variant: str) -> Taken:
    """Few tokens: each holds as much as any, and the checksums count for more here than in a real cache."""
    cache, vocab_size, tokens = _filled(context, LARGE_VOCABULARY, texts=16)
    size = sum(path.stat().st_size for path in cache.store.folder.rglob("*") if path.is_file())
    begin = time.perf_counter()
    cache.sparse(np.arange(BATCH), 1.0)
    took = time.perf_counter() - begin
    how = (
        f"all files of a cache of {tokens:,} tokens over it: checksums and header included; vocabulary {vocab_size:,}, "
        f"one temperature; {BATCH * (LENGTH - 1)} tokens read and decoded in {took * 1e3:.1f} ms"
    )
    return Taken(size / tokens, how)


@figure(
    "cache_reading", group="distill", title="share of a plain fine-tuning step that reading a cached teacher takes",
    unit="ratio", limit=_SHARE, peer=PLAIN,
)  # fmt: skip
def cache_reading(context: Context, variant: str) -> Taken:
    """Rows in random order, the first time from disk as far as the system lets go of its page cache."""
    cache, _, _ = _filled(context)
    order = np.random.default_rng(0).permutation(TEXTS).reshape(-1, BATCH)
    _forget(cache.store.folder)
    seconds = []
    for rows in order:
        begin = time.perf_counter()
        cache.sparse(rows, 1.0)
        seconds.append(time.perf_counter() - begin)
    samples, _, busy = rounds(context, CACHED, CACHED_TURNS)
    step = float(np.median(np.concatenate(samples["plain", "step"])))
    found = float(np.median(seconds)) / step
    low, high = (bound / step for bound in bootstrap_interval(seconds, "median"))
    how = (
        f"median {np.median(seconds) * 1e3:.2f} ms for the {BATCH} rows of {LENGTH} tokens of a step of {step:.3g} s, "
        f"{len(seconds)} steps in random order, from disk"
    )
    return Taken(found, f"{how}; {busy}" if busy else how, (low, high), void=context.void)


def _filled(context: Context, vocabulary: int = 49_152, texts: int = TEXTS) -> tuple[TokenCache, int, int]:
    """A cache of random answers: what is stored does not depend on what the teacher says."""
    vocab_size = 512 if context.tiny and vocabulary == 49_152 else vocabulary

    def take() -> TokenCache:
        context.progress("filling a cache")
        key = {"teacher": "random", "tokenizer": "random", "corpus": "random"}
        lengths = np.full(texts, LENGTH, dtype=np.int64)
        cache = TokenCache(context.scratch / f"random-cache-{vocab_size}", key, TokenFormat(vocab_size, TOP_K), lengths)
        generator = torch.Generator().manual_seed(0)

        def answer(rows: list[int]) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
            for _ in rows:
                yield torch.randn(LENGTH - 1, vocab_size, generator=generator) * 3, ()

        cache.fill(answer)
        return cache

    return context.once(f"random-cache-{vocab_size}", take), vocab_size, texts * (LENGTH - 1)


def _forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in folder.rglob("*.bin"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
