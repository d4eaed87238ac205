"""Reads the profile that ONNX Runtime writes: time by node, with its provider, and its cost from the shapes it had.

The file is a list of trace events (microseconds). Each run of the model is a ``model_run`` event of category
``Session``; the ``Node`` events named ``…_kernel_time`` before it belong to it. The bytes that it states are not taken:
it leaves out weights that a kernel has packed. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import WorkerError
from .profiling import Row, RowTable

__all__ = ["OrtRecorder", "node_flops"]

_KERNEL = "_kernel_time"
# Operators whose first input is multiplied with a matrix: 2 x results x values of the first input for each.
_PRODUCTS = (
    "MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "QLinearMatMul",
)  # fmt: skip


class OrtRecorder:
    """A :class:`edgestill.runtimes.profiling.Recorder`; :meth:`read` is called with the file when profiling has
    ended."""

    source = "measured"
    note = "onnxruntime's own profiler; a node's time is that of its kernel"

    def __init__(self) -> None:
        self._passes: list[str] = []
        self._table = RowTable()
        self._runs: dict[str, list[float]] = {}

    def begin(self, phase: str) -> None:
        """See :class:`Recorder`."""
        self._passes.append(phase)

    def end(self) -> None:
        """See :class:`Recorder`."""

    def rows(self) -> dict[str, list[Row]]:
        """See :class:`Recorder`."""
        return self._table.rows()

    def engine(self) -> dict[str, Any]:
        """``model_run_s``: by phase, the seconds of each pass by onnxruntime's own clock."""
        return {"model_run_s": {phase: runs for phase, runs in self._runs.items() if phase}}

    def read(self, path: Path) -> None:
        """Take a finished profile apart. :class:`WorkerError` when it is not whole or has another number of runs."""
        try:
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, json.JSONDecodeError) as error:
            raise WorkerError(f"onnxruntime's profile is not whole: {error}", hint="is the disk full?") from None
        nodes: list[Mapping[str, Any]] = []
        done = 0
        for event in events:
            if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_KERNEL):
                nodes.append(event)
            elif event.get("cat") == "Session" and event.get("name") == "model_run":
                if done < len(self._passes):
                    self._run(self._passes[done], nodes, float(event["dur"]) / 1e6)
                nodes = []
                done += 1
        if done != len(self._passes):
            raise WorkerError(
                f"onnxruntime's profile holds {done} runs instead of {len(self._passes)}",
                hint="it keeps a million events: profile fewer tokens",
            )

    def _run(self, phase: str, nodes: Sequence[Mapping[str, Any]], seconds: float) -> None:
        self._runs.setdefault(phase, []).append(seconds)
        for event in nodes:
            facts = event.get("args", {})
            op = str(facts.get("op_name", ""))
            name = str(event["name"]).removesuffix(_KERNEL) or f"{op} {facts.get('node_index', '')}".strip()
            self._table.add(
                phase, name, op, str(facts.get("provider", "")), seconds=float(event["dur"]) / 1e6,
                flops=node_flops(op, _shapes(facts.get("input_type_shape")), _shapes(facts.get("output_type_shape"))),
            )  # fmt: skip


def node_flops(op: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int | None:
    """Additions and multiplications of a product with a matrix, from the shapes that it had; 2 for a multiply-add.

    ``None`` for every other operator (attention kernels among them: their shapes alone don't say how far they look).

    >>> node_flops("MatMul", [(1, 5, 8), (8, 3)], [(1, 5, 3)])
    240
    """
    if op not in _PRODUCTS or not inputs or not outputs or not outputs[0]:
        return None
    results, columns = math.prod(outputs[0]), outputs[0][-1]
    if columns == 0 or results == 0:
        return 0
    rows = results // columns
    return 2 * results * (math.prod(inputs[0]) // rows)


def _shapes(raw: Any) -> list[tuple[int, ...]]:
    """``[{"float": [1, 128, 384]}, …]`` without the types."""
    found: list[tuple[int, ...]] = []
    for item in raw if isinstance(raw, list) else ():
        if isinstance(item, dict):
            found += [tuple(int(size) for size in shape) for shape in item.values() if isinstance(shape, list)]
    return found
