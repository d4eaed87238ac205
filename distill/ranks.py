"""Several processes that train one student: which one this is, and the few things that they tell each other.

`torchrun` and `accelerate launch` start them and say so in ``RANK`` and ``WORLD_SIZE``. In a single process everything
here does nothing. The first one (rank 0) alone writes files; the others read them, so that on several machines the
work folder must be a shared one.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "add_counts",
    "add_up",
    "barrier",
    "everyones",
    "first_goes_ahead",
    "from_first",
    "gather_rows",
    "is_first",
    "rank",
    "start",
    "threads_each",
    "world",
]

T = TypeVar("T")
# The others wait while the first one fetches, asks the teacher and writes: that may take hours.
PATIENCE = datetime.timedelta(days=2)


def start() -> None:
    """Join the other processes, if there are any and this has not been done."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return rank() == 0


def threads_each(usable: int) -> int:
    """CPU threads for each of the processes on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1
    return max(1, usable // here)


def barrier() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process runs the block, then the others do: they find its files ready."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def from_first(compute: Callable[[], T]) -> T:
    """What ``compute`` gives in the first process, in all of them; so does the error that it raises."""
    if world() == 1:
        return compute()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = compute()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def everyones(value: T) -> list[T]:
    """``value`` of each process (anything that pickles), in their order, in all of them."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def add_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers by name, added up over all processes."""
    total = add_up(torch.tensor(list(counts.values()), dtype=torch.int64))
    return dict(zip(counts, total.tolist(), strict=True))


def add_up(values: Tensor) -> Tensor:
    """``values`` added up over all processes, without a gradient."""
    if world() > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """The rows ``[n, D]`` of all processes as ``[world * n, D]``, in their order; n must be the same everywhere.

    The gradient goes back to the process that a row came from, added up over all that used it.
    """
    if world() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        begin = rank() * ctx.rows
        return add_up(slope.contiguous())[begin : begin + ctx.rows]
