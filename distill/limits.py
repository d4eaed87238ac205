"""How much of the machine a training may use, and what it says when there was too little."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..errors import ResourceExhausted
from . import ranks

__all__ = ["limited_threads", "memory_errors"]


@contextlib.contextmanager
def limited_threads(wanted: int | None) -> Iterator[None]:
    """torch on ``wanted`` CPU threads, by default all that this process may use (its share, of several processes)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or ranks.threads_each(usable))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn "out of memory" of torch into :class:`ResourceExhausted` that says which knob to turn."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
            raise ResourceExhausted(
                "not enough memory for one forward and backward pass",
                hint="halve [distill] batch_size and double gradient_accumulation (same result), set "
                "gradient_checkpointing = true (same result), or lower max_length",
            ) from error
        raise
