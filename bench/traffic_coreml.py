"""What a Core ML program reads and computes for a token, for :func:`edgestill.bench.traffic.count_traffic`."""

from __future__ import annotations

import math

from ..artifact import Artifact
from ..runtimes.mil.program import Constant, Operation, ValueType, walk
from ..runtimes.milproto import load_program
from ..runtimes.payload_coreml import stored_bytes, stored_weights
from .traffic import Traffic

__all__ = ["coreml_traffic"]

_LOOKUPS = ("gather", "slice_by_index")  # by token, and (rotary tables) by position
_FORMS = ("transpose", "reshape", "expand_dims", "squeeze", "cast", "identity")


def coreml_traffic(artifact: Artifact) -> Traffic:
    """Weights that products, norms and sums read, as they are stored (codes, not what they stand for)."""
    program = load_program(artifact.entry)
    weights = dict(stored_weights(program))
    sizes = {name: stored_bytes(stored, program) for name, stored in weights.items()}
    shapes = {name: _shape(stored) for name, stored in weights.items()}
    types = {**program.inputs, **program.states}
    types |= {name: kind for operation in walk(program.operations) for name, kind in operation.outputs}
    origin = {o.outputs[0][0]: _first(o, "x") for o in walk(program.operations) if o.kind in _FORMS and o.outputs}

    def source(name: str) -> str:
        while name in origin and name not in weights:
            name = origin[name]
        return name

    body = head = pairs = rows = read = 0
    counted: set[str] = set()
    for operation in walk(program.operations):
        if operation.kind in _FORMS or operation.kind.startswith("constexpr_"):
            continue
        names = [source(a) for group in operation.inputs.values() for a in group if isinstance(a, str)]
        stored = [name for name in names if name in weights and sizes[name]]
        looked_up = source(_first(operation, "x")) if operation.kind in _LOOKUPS else ""
        if looked_up in weights and len(shapes[looked_up]) > 1:
            rows += sizes[looked_up] // shapes[looked_up][0]
            continue
        read += sum(sizes[name] for name in stored if name not in counted)
        counted.update(stored)
        if operation.kind in ("linear", "matmul", "conv"):
            matrices = [name for name in stored if len(shapes[name]) > 1]
            if matrices:
                flops = 2 * math.prod(shapes[matrices[0]])
                is_head = artifact.manifest.vocab_size in shapes[matrices[0]] and _generates(artifact)
                head, body = (head + flops, body) if is_head else (head, body + flops)
            else:
                pairs += _pair_flops(operation, types)
        elif operation.kind == "scaled_dot_product_attention":
            pairs += 2 * _pair_flops(operation, types)
    kept = artifact.manifest.kv_cache_bytes_per_token or 0
    return Traffic(read, rows, kept, body, head, pairs, "float")


def _generates(artifact: Artifact) -> bool:
    return artifact.manifest.task == "text-generation"


def _pair_flops(operation: Operation, types: dict[str, ValueType]) -> int:
    """Of a product of two results, for a pair of tokens: twice the values of a token in all heads, known from the
    operand or result in which the number of tokens alone is free."""
    names = [name for group in operation.inputs.values() for name in group if isinstance(name, str)]
    kinds = [types[name] for name in names if name in types] + [kind for _, kind in operation.outputs]
    known = [kind.shape for kind in kinds if kind.dtype.startswith("float") and kind.shape.count(None) == 1]
    return 2 * max((math.prod(size or 1 for size in shape) for shape in known), default=0)


def _first(operation: Operation, parameter: str) -> str:
    found = operation.inputs.get(parameter, ("",))[0]
    return found if isinstance(found, str) else ""


def _shape(stored: Constant | Operation) -> tuple[int, ...]:
    kind = stored.outputs[0][1] if isinstance(stored, Operation) else stored.type
    return tuple(int(size or 0) for size in kind.shape)
