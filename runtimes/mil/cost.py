"""What each operation of a Core ML program costs: operations and bytes, from the shapes that it has in a run.

Counted, not measured: a multiply-add is two operations, an elementwise result one. Bytes are those of arguments and
results in the program's own types; weights count as they are stored (codes, not what they stand for). What an engine
fuses, it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..profiling import Row, RowTable
from .program import Operation, Program, walk

__all__ = ["CostRecorder", "operation_flops"]

_ITEM_BYTES = {"float16": 2, "float32": 4, "int32": 4, "bool": 1, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}
# No value is moved or made.
_FREE = ("reshape", "expand_dims", "squeeze", "identity", "shape", "read_state", "const", "cond", "while_loop")
# Values are moved, nothing is computed.
_MOVES = (
    "transpose", "concat", "split", "slice_by_index", "slice_by_size", "slice_update", "gather", "gather_nd", "tile",
    "stack", "cast", "select", "pad", "fill", "range_1d", "write_state", "coreml_update_state", "band_part",
)  # fmt: skip
_REDUCTIONS = ("reduce_", "softmax", "layer_norm", "instance_norm", "l2_norm", "cumsum")


def operation_flops(kind: str, arguments: Mapping[str, Any], result: Any) -> int:
    """Additions, multiplications and other arithmetic of one operation with these arguments.

    >>> x, w = np.zeros((1, 5, 8)), np.zeros((3, 8))
    >>> operation_flops("linear", {"x": x, "weight": w}, np.zeros((1, 5, 3)))
    240
    """
    if kind in _FREE or kind in _MOVES:
        return 0
    size = int(np.size(result))
    match kind:
        case "linear":
            return 2 * size * int(arguments["weight"].shape[1]) + (size if "bias" in arguments else 0)
        case "matmul":
            x = arguments["x"]
            return 2 * size * int(x.shape[-2 if arguments.get("transpose_x", False) and x.ndim > 1 else -1])
        case "conv":
            return 2 * size * math.prod(arguments["weight"].shape[1:])
        case "scaled_dot_product_attention":
            query, key = arguments["query"], arguments["key"]
            pairs = math.prod(query.shape[:-1]) * key.shape[-2]
            return int(2 * pairs * (query.shape[-1] + arguments["value"].shape[-1]) + 5 * pairs)
        case "einsum":
            letters: dict[str, int] = {}
            terms = arguments["equation"].replace(" ", "").partition("->")[0].split(",")
            for term, value in zip(terms, arguments["values"], strict=True):
                letters.update(zip(term, value.shape, strict=True))
            return 2 * math.prod(letters.values())
    if kind.startswith(_REDUCTIONS):
        return int(np.size(arguments["x"])) * (5 if kind in ("softmax", "layer_norm", "instance_norm") else 1)
    return size


class CostRecorder:
    """A :class:`edgestill.runtimes.profiling.Recorder` that is told of each operation of the interpreter."""

    source = "predicted"
    note = (
        "counted from the program and the shapes of this run, not measured: multiply-adds as two operations, bytes of "
        "arguments and results, weights as stored"
    )

    def __init__(self, program: Program, stored: Mapping[str, int]) -> None:
        self._table = RowTable()
        self._phase = ""
        self._stored = stored
        self._types = {name: kind.dtype for name, kind in {**program.inputs, **program.states}.items()}
        self._types |= {name: kind.dtype for operation in walk(program.operations) for name, kind in operation.outputs}

    def watch(self, operation: Operation, arguments: Mapping[str, Any], result: Any) -> None:
        """One operation was executed."""
        flops = operation_flops(operation.kind, arguments, result)
        size = 0
        if operation.kind not in _FREE:
            parts = result if isinstance(result, tuple) else (result,)
            size += sum(self._bytes(n, v) for (n, _), v in zip(operation.outputs, parts, strict=False))
            for parameter, names in operation.inputs.items():
                values = arguments.get(parameter)
                for index, name in enumerate(names):
                    if isinstance(name, str):
                        size += self._bytes(name, values[index] if isinstance(values, list) else values)
        self._table.add(self._phase, operation.name, operation.kind, "program", flops=flops, size=size)

    def _bytes(self, name: str, value: Any) -> int:
        if name in self._stored:
            return self._stored[name]
        return int(np.size(value)) * _ITEM_BYTES.get(self._types.get(name, ""), 0)

    def begin(self, phase: str) -> None:
        """See :class:`Recorder`."""
        self._phase = phase

    def end(self) -> None:
        """See :class:`Recorder`."""

    def rows(self) -> dict[str, list[Row]]:
        """See :class:`Recorder`."""
        return self._table.rows()

    def engine(self) -> dict[str, Any]:
        """Nothing ran on an engine."""
        return {}
