"""Operations of a program that play the same part in every layer: the same kind, fed by and feeding the same kinds."""

from __future__ import annotations

from collections.abc import Collection

from ..runtimes.mil.program import Program

__all__ = ["roles"]

_DEPTH = 3  # operations back: tells the query's rotation from the key's projection, and a norm from the next


def roles(program: Program, names: Collection[str]) -> list[tuple[str, ...]]:
    """``names`` of operations, grouped, in the order of the program.

    A role is the kind of an operation, how it is fed over ``_DEPTH`` operations (as Weisfeiler and Leman colour graphs,
    1968), and the kinds of what takes its results.
    """
    makers = {name: o for o in program.operations for name, _ in o.outputs}
    takers: dict[str, set[str]] = {}
    for operation in program.operations:
        for group in operation.inputs.values():
            for argument in group:
                if isinstance(argument, str):
                    takers.setdefault(argument, set()).add(operation.kind)
    colour = {o.name: o.kind for o in program.operations}
    for _ in range(_DEPTH):
        codes: dict[str, str] = {}
        after = {}
        for operation in program.operations:
            fed = [
                f"{parameter}:{colour[makers[a].name] if isinstance(a, str) and a in makers else '-'}"
                for parameter, group in sorted(operation.inputs.items())
                for a in group
            ]
            text = f"{operation.kind}({','.join(fed)})"
            after[operation.name] = codes.setdefault(text, f"{operation.kind}{len(codes)}")
        colour = after
    found: dict[tuple[str, ...], list[str]] = {}
    for operation in program.operations:
        if operation.name in names:
            after_it = sorted({kind for name, _ in operation.outputs for kind in takers.get(name, ())})
            found.setdefault((colour[operation.name], *after_it), []).append(operation.name)
    return [tuple(group) for group in found.values()]
