"""A launch that the link to a device cut is taken again, as if it had not been: a cut launch never yields a number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import LinkLost
from ..runtimes.transports.load import UNKNOWN

__all__ = ["ATTEMPTS", "Undoable", "load_of", "relaunching"]

ATTEMPTS = 4  # launches that are cut one after the other before a subject is given up


class Undoable(Protocol):
    """What has been taken of a subject, see :class:`edgestill.bench.taking.Record`."""

    failure: str | None
    cut: int


def relaunching(records: Sequence[Undoable], take: Callable[[], None]) -> None:
    """Do ``take``, which adds a launch to each of ``records``; when :class:`LinkLost` leaves it, undo that and repeat.

    ``cut`` counts how often. After four the records fail, with the reason.
    """
    for attempt in range(1, ATTEMPTS + 1):
        before = [copy.deepcopy(vars(record)) for record in records]
        try:
            take()
            return
        except LinkLost as error:
            for record, state in zip(records, before, strict=True):
                vars(record).update(state)
                record.cut += 1
                if attempt == ATTEMPTS and record.failure is None:
                    record.failure = error.message


def load_of(worker: Any, here: dict[str, Any]) -> dict[str, Any]:
    """How busy the worker's machine was: a device says it itself, else what was seen ``here``. Beside it stands what
    the device tells of the launch (which worker ran, how long it cooled down)."""
    return {**here, **UNKNOWN, **getattr(worker, "machine_load", here), **getattr(worker, "launch_facts", {})}
