"""Which cache updates may write into the state itself instead of a copy of it.

A stateful decoder reads its whole cache, replaces a slice and writes the whole cache back, once a layer. Executed to
the letter that copies the cache for every layer; written in place it costs what the slice costs. The result is the
same when nobody looks at the old content afterwards, and that can be read off the program.
"""

from __future__ import annotations

from collections.abc import Sequence

from .program import Operation, names_in
from .registry import EXACT

__all__ = ["in_place_updates", "last_uses"]

_WRITES = ("write_state", "coreml_update_state")


def last_uses(operations: Sequence[Operation], outputs: Sequence[str]) -> dict[str, int]:
    """Index of the operation that uses each value last; ``len(operations)`` for outputs of the program."""
    uses = {name: index for index, operation in enumerate(operations) for name in names_in(operation)}
    return uses | dict.fromkeys(outputs, len(operations))


def in_place_updates(operations: Sequence[Operation], states: Sequence[str], outputs: Sequence[str]) -> set[int]:
    """Indices of ``slice_update`` operations that may write into the state that they were read from.

    An update qualifies when its source is what ``read_state`` gave, its result is what is written to that state next,
    and no value that may share memory with the state (views included) is used after it. None does in a program with
    control flow: what a block returns may be anything around it.
    """
    if any(operation.blocks for operation in operations):
        return set()
    uses = last_uses(operations, outputs)
    names = frozenset(states)
    state_of: dict[str, str] = {}  # value -> the state whose memory it may share
    read_directly: set[str] = set()
    found: set[int] = set()
    for index, operation in enumerate(operations):
        arguments = [a for group in operation.inputs.values() for a in group if isinstance(a, str)]
        results = [name for name, _ in operation.outputs]
        if operation.kind == "read_state":
            state = arguments[0]
            state_of |= dict.fromkeys(results, state)
            read_directly |= set(results)
            continue
        shared = {state_of[a] for a in arguments if a in state_of}
        if operation.kind == "slice_update":
            source = operation.inputs["x"][0]
            state = state_of.get(source, "") if isinstance(source, str) else ""
            alive = any(uses[v] > index for v, owner in state_of.items() if owner == state and v in uses)
            update = operation.inputs["update"][0]
            overlaps = isinstance(update, str) and state_of.get(update) == state
            if source in read_directly and not alive and not overlaps and _written_next(operations, index, state):
                found.add(index)
                state_of |= dict.fromkeys(results, state)
            continue
        if operation.kind in EXACT and shared:
            state_of |= dict.fromkeys(results, min(shared))
        if operation.kind in _WRITES:
            target = next(a for a in arguments if a in names)
            # Until it is overwritten, the value that was written *is* the state.
            state_of |= {a: target for a in arguments if a not in names}
            state_of |= dict.fromkeys(results, target)
            read_directly |= set(results)
    return found


def _written_next(operations: Sequence[Operation], index: int, state: str) -> bool:
    """Is the result of operation ``index`` what the next operation on ``state`` writes to it?"""
    result = operations[index].outputs[0][0]
    for operation in operations[index + 1 :]:
        arguments = [a for group in operation.inputs.values() for a in group]
        if state in arguments:
            return operation.kind in _WRITES and result in arguments
    return False
