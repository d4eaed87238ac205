"""The operations that the interpreter knows, by MIL name; the ``ops_*`` modules fill the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .program import ValueType

__all__ = ["EXACT", "OPERATIONS", "Arguments", "Handler", "operation"]

# Arrays by parameter name. Values of MIL type float16 come as float32 arrays that hold float16 numbers exactly.
Arguments = Mapping[str, Any]
Handler = Callable[[Arguments, ValueType], Any]

OPERATIONS: dict[str, Handler] = {}
# Operations that only move values: their results need no rounding, and may be views of their arguments.
EXACT: set[str] = set()


def operation(*kinds: str, exact: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler for the MIL operations ``kinds``.

    A handler gets the arguments and the type of the first result, and returns an array (or a tuple of arrays, where
    the operation has several results). It computes in float32; the interpreter rounds the result to float16 where the
    program says so. Unless ``exact``, the result must be memory of its own, since it is rounded in place.
    """

    def register(handler: Handler) -> Handler:
        for kind in kinds:
            if kind in OPERATIONS:
                raise ValueError(f"operation {kind} is registered twice")
            OPERATIONS[kind] = handler
            if exact:
                EXACT.add(kind)
        return handler

    return register
