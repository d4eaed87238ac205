"""On a Mac: a Core ML package on each compute unit, against our interpreter of the same program.

The interpreter says what the program means; an engine may fuse operations, keep more precision or less, or place a
layer on hardware that rounds on its own. Each unit is asked the same row and judged as *faithful*. This path was tried
with a recorded stand-in for Apple's ``predict``: no Mac was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from ..artifact import TOKEN_TASKS, Task
from ..errors import EdgestillError
from ..runtimes.coreml_session import COMPUTE_UNITS, MIL_BACKEND
from .behaviour import Runner, distance
from .limits import Faithful
from .records import Check

__all__ = ["compare_units"]

Array = npt.NDArray[np.float32]


def compare_units(
    task: Task, ids: npt.NDArray[np.int64], limits: Faithful, open_on: Callable[[str], AbstractContextManager[Runner]]
) -> list[Check]:
    """One check a compute unit: mean KL in nats, or 1 − cosine, between it and the interpreter on the row ``ids [n]``.

    ``open_on`` opens the artifact on a backend. A unit that does not load or run the package is a failed check of its
    own; an interpreter that does not is an error.
    """
    said = _answers(task, ids, open_on, MIL_BACKEND)
    unit = "1 - cosine" if task == "feature-extraction" else "mean KL, nats"
    checks = []
    for backend in COMPUTE_UNITS:
        name = f"compute_unit_{backend.lower()}"
        try:
            found = _answers(task, ids, open_on, backend)
        except EdgestillError as error:
            checks.append(Check(name, "faithful", False, reason=" ".join(error.message.split())))
            continue
        finite = bool(np.isfinite(found).all())
        value = float(np.mean(distance(task, said, found))) if finite else None
        reason = f"{len(ids)} tokens, Core ML on {backend} against the interpreter of the same program"
        passed = value is not None and value <= limits.divergence
        reason += "" if finite else ": not finite"
        checks.append(Check(name, "faithful", passed, value, limits.divergence, unit=unit, reason=reason))
    return checks


def _answers(
    task: Task, ids: npt.NDArray[np.int64], open_on: Callable[[str], AbstractContextManager[Runner]], backend: str
) -> Array:
    """Rows ``[n, V]`` or ``[1, D]``."""
    with open_on(backend) as worker:
        found = worker.forward(ids[None], np.ones((1, len(ids)), np.int64))
    return np.asarray(found[0] if task in TOKEN_TASKS else found, np.float32)
