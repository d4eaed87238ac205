"""Execute a Core ML program operation by operation, as it is written, and report the range of every float value.

Values of type float16 are held as float32 numbers that float16 can represent: each operation computes in float32 and
rounds its result (so sums are accumulated in float32, as Apple's engines at least do). That checks what the program
says: its semantics and whether float16 holds its values. What an engine fuses or keeps in float32 is not modelled.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BadInput, Unsupported
from .half import round_half
from .inplace import in_place_updates, last_uses
from .ops_indexing import slices
from .program import Block, Constant, Operation, Program, ValueType, names_in, walk
from .registry import EXACT, OPERATIONS, Handler

__all__ = ["Interpreter", "RangeRow"]

Array = npt.NDArray[Any]
State = dict[str, Array]

for _module in ("constexpr", "elementwise", "indexing", "linear", "reductions", "shapes"):
    importlib.import_module(f"{__package__}.ops_{_module}")

# What numpy and the handlers raise for a program whose parts do not fit together.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, StopIteration, OverflowError, ZeroDivisionError,
           NotImplementedError)  # fmt: skip
_WRITES = ("write_state", "coreml_update_state")
_CONTROL = ("cond", "while_loop")
_LISTS = ("values", "loop_vars")  # parameters that take several arguments
_MOST_TURNS = 1_000_000  # of a loop: a damaged program must not run for ever


@dataclass
class RangeRow:
    """What an operation's result reached over all runs: largest magnitude (of finite runs), runs with infinities or
    NaN, and runs in which it made them itself, from finite arguments."""

    name: str
    kind: str
    dtype: str
    peak: float = 0.0
    non_finite: int = 0
    overflowed: int = 0


@dataclass(slots=True)
class _Step:
    operation: Operation
    handler: Handler
    result: ValueType
    fixed: dict[str, Any]  # arguments that are constants
    single: tuple[tuple[str, str], ...]  # parameter, value
    lists: tuple[tuple[str, tuple[Any, ...]], ...]
    free: tuple[str, ...]  # values that nobody needs afterwards
    row: RangeRow | None
    rounds: bool
    in_place: bool
    blocks: tuple[_Steps, ...]


@dataclass(slots=True)
class _Steps:
    """A compiled block."""

    inputs: tuple[str, ...]
    steps: list[_Step]
    outputs: tuple[str, ...]


def _working(value: Constant) -> Any:
    """A constant as the handlers want it: float32 for floats, strings and booleans as they are."""
    if isinstance(value.value, (str, list)):
        return value.value
    array = np.asarray(value.value)
    if array.dtype.kind == "f" and array.dtype != np.float32:
        return array.astype(np.float32)
    return np.asarray(array)


class Interpreter:
    """Runs one :class:`Program`. Constants, and operations on constants alone, are evaluated once, when it is made.

    Raises :class:`Unsupported` for an operation that it does not know, naming it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        # Told of each operation as it is executed: the operation, its arguments, its result.
        self.watch: Callable[[Operation, Mapping[str, Any], Any], None] | None = None
        self.ranges: list[RangeRow] = []
        try:
            self._prepare(program)
        except _DAMAGE as error:
            raise BadInput(f"the program contradicts itself: {_why(error)}", hint="export it again") from error

    def _prepare(self, program: Program) -> None:
        self._constants: dict[str, Any] = {name: _working(value) for name, value in program.constants.items()}
        self._non_finite_constants: set[str] = set()
        self._steps = self._compile()
        for name, value in self._constants.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and not np.isfinite(value).all():
                self._non_finite_constants.add(name)

    def new_state(self) -> State:
        """All states, zeroed."""
        return {name: np.zeros([size or 0 for size in t.shape], np.float32) for name, t in self.program.states.items()}

    @property
    def first_overflow(self) -> RangeRow | None:
        """The first operation, in program order, that turned finite arguments into an infinity or a NaN."""
        return next((row for row in self.ranges if row.overflowed), None)

    def run(self, inputs: Mapping[str, npt.ArrayLike], state: State | None = None) -> dict[str, Array]:
        """Run once. ``inputs`` by name, in the program's shapes (free dimensions: any). ``state`` is changed in place.

        Returns the outputs by name; float16 comes as float32. Raises :class:`BadInput` for a missing input or a wrong
        shape.
        """
        values = self._bind(inputs)
        state = {} if state is None else state
        tainted = set(self._non_finite_constants)
        tainted |= {n for n, v in values.items() if v.dtype.kind == "f" and not np.isfinite(v).all()}
        with np.errstate(all="ignore"):
            for step in self._steps:
                try:
                    self._execute(step, values, state, tainted)
                except _DAMAGE as error:
                    where = f"operation {step.operation.kind} {step.operation.name!r}"
                    raise BadInput(
                        f"{where} failed: {_why(error)}", hint="check the lengths and ids that were passed"
                    ) from error
        return {name: np.asarray(self._value(name, values)) for name in self.program.outputs}

    def _bind(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        values = {}
        for name, kind in self.program.inputs.items():
            if name not in inputs:
                raise BadInput(f"input {name!r} is missing", hint=f"the program takes {', '.join(self.program.inputs)}")
            array = np.asarray(inputs[name])
            fits = len(array.shape) == len(kind.shape) and all(
                want in (None, got) for want, got in zip(kind.shape, array.shape, strict=True)
            )
            if not fits:
                want = "x".join("?" if size is None else str(size) for size in kind.shape)
                got = "x".join(str(size) for size in array.shape)
                raise BadInput(f"input {name!r} has shape {got}, the program takes {want}", hint="use batch size 1")
            array = np.array(array, np.float32 if kind.dtype.startswith("float") else kind.dtype)
            if kind.dtype == "float16":
                round_half(array)
            values[name] = array
        return values

    def _execute(self, step: _Step, values: dict[str, Any], state: State, tainted: set[str]) -> None:
        operation = step.operation
        arguments = step.fixed.copy()
        for parameter, name in step.single:
            arguments[parameter] = self._value(name, values)
        for parameter, items in step.lists:
            arguments[parameter] = [self._value(i, values) if isinstance(i, str) else _working(i) for i in items]
        if operation.kind == "read_state":
            result: Any = state[str(operation.inputs["input"][0])]
        elif operation.kind in _WRITES:
            target = operation.inputs["input" if operation.kind == "write_state" else "state"][0]
            result = arguments["data" if operation.kind == "write_state" else "value"]
            # A copy, unless it is the state itself: later updates may write into it.
            state[str(target)] = result if result is state[str(target)] else np.array(result, np.float32)
            result = state[str(target)]
        elif step.blocks:
            result = self._control(step, arguments, values, state, tainted)
        elif step.in_place:
            result = arguments["x"]
            result[slices(arguments)] = arguments["update"]
        else:
            result = self._call(step, arguments)
        if self.watch is not None:
            self.watch(operation, arguments, result)
        if isinstance(result, tuple):
            values |= {name: part for (name, _), part in zip(operation.outputs, result, strict=True)}
        elif operation.outputs:
            values[operation.outputs[0][0]] = result
        if step.row is not None:
            self._track(step, result, tainted)
        elif step.blocks:
            pass  # its blocks have said which results are not finite
        elif tainted and not tainted.isdisjoint(self._names(step)):
            tainted |= {name for name, _ in operation.outputs}
        for name in step.free:
            del values[name]

    def _control(
        self, step: _Step, arguments: Mapping[str, Any], values: Mapping[str, Any], state: State, tainted: set[str]
    ) -> tuple[Any, ...]:
        """The results of a ``cond`` or a ``while_loop``."""
        if step.operation.kind == "cond":
            chosen = step.blocks[0 if bool(np.asarray(arguments["pred"]).item()) else 1]
            results, bad = self._block(chosen, (), (), values, state, tainted)
        else:
            condition, body = step.blocks
            results = tuple(arguments["loop_vars"])
            bad = tuple(isinstance(a, str) and a in tainted for a in step.operation.inputs["loop_vars"])
            for _ in range(_MOST_TURNS):
                (again,), _bad = self._block(condition, results, bad, values, state, tainted)
                if not bool(np.asarray(again).item()):
                    break
                results, bad = self._block(body, results, bad, values, state, tainted)
            else:
                raise ValueError(f"more than {_MOST_TURNS:,} turns")
        tainted |= {name for (name, _), one in zip(step.operation.outputs, bad, strict=True) if one}
        return results

    def _block(
        self, block: _Steps, given: tuple[Any, ...], bad: tuple[bool, ...], values: Mapping[str, Any], state: State,
        tainted: set[str],
    ) -> tuple[tuple[Any, ...], tuple[bool, ...]]:  # fmt: skip
        """The results of a block that is given ``given``, and which of them are not finite."""
        inside = {**values, **dict(zip(block.inputs, given, strict=True))}
        known = tainted | {name for name, one in zip(block.inputs, bad, strict=True) if one}
        for step in block.steps:
            self._execute(step, inside, state, known)
        results = tuple(self._value(name, inside) for name in block.outputs)
        return results, tuple(name in known for name in block.outputs)

    def _call(self, step: _Step, arguments: dict[str, Any]) -> Any:
        result = step.handler(arguments, step.result)
        if not isinstance(result, tuple):
            return np.asarray(result)
        if step.operation.kind not in EXACT:
            for part, (_, output) in zip(result, step.operation.outputs, strict=True):
                if output.dtype == "float16":
                    round_half(part)
        return result

    def _track(self, step: _Step, result: Array, tainted: set[str]) -> None:
        """Round to float16 where the program says so, and note the range."""
        row = step.row
        assert row is not None
        peak = round_half(result) if step.rounds else float(np.abs(result).max()) if result.size else 0.0
        if np.isfinite(peak):
            row.peak = max(row.peak, peak)
            return
        row.non_finite += 1
        if tainted.isdisjoint(self._names(step)):
            row.overflowed += 1
        tainted |= {name for name, _ in step.operation.outputs}

    def _names(self, step: _Step) -> list[str]:
        return [a for group in step.operation.inputs.values() for a in group if isinstance(a, str)]

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        found = values.get(name)
        return self._constants[name] if found is None else found

    def _compile(self) -> list[_Step]:
        """Turn operations into steps, folding those whose arguments are all constants."""
        program = self.program
        kept = self._folded(program.operations)
        still = {name for operation in kept for name in names_in(operation)}
        self._constants = {n: v for n, v in self._constants.items() if n in still or n in program.outputs}
        return self._steps_of(kept, program.outputs, in_place_updates(kept, list(program.states), program.outputs))

    def _folded(self, operations: Sequence[Operation]) -> list[Operation]:
        """What is left of ``operations``, in their blocks too, when those on constants alone are evaluated."""
        kept: list[Operation] = []
        for operation in operations:
            if operation.kind not in OPERATIONS and operation.kind not in ("read_state", *_WRITES, *_CONTROL):
                raise Unsupported(
                    f"operation {operation.kind} ({operation.name}) is not known to the interpreter",
                    hint="run this artifact on a Mac",
                )
            if bool(operation.blocks) != (operation.kind in _CONTROL):
                raise ValueError(f"{operation.kind} {operation.name!r} has {len(operation.blocks)} blocks")
            names = [a for group in operation.inputs.values() for a in group if isinstance(a, str)]
            if operation.kind in OPERATIONS and all(name in self._constants for name in names):
                self._fold(operation)
                continue
            blocks = tuple(
                dataclasses.replace(block, operations=tuple(self._folded(block.operations)))
                for block in operation.blocks
            )
            kept.append(dataclasses.replace(operation, blocks=blocks) if blocks else operation)
        return kept

    def _steps_of(
        self, operations: Sequence[Operation], outputs: tuple[str, ...], in_place: Collection[int]
    ) -> list[_Step]:
        uses = last_uses(operations, outputs)
        return [self._step(index, one, uses, index in in_place) for index, one in enumerate(operations)]

    def _steps_of_block(self, block: Block) -> _Steps:
        inputs = tuple(name for name, _ in block.inputs)
        return _Steps(inputs, self._steps_of(block.operations, block.outputs, ()), block.outputs)

    def _fold(self, operation: Operation) -> None:
        step = self._step(-1, operation, {}, False)
        with np.errstate(all="ignore"):
            result = self._call(step, self._arguments(operation))
        if step.rounds:
            round_half(result)
        parts = result if isinstance(result, tuple) else (result,)
        self._constants |= {name: part for (name, _), part in zip(operation.outputs, parts, strict=True)}

    def _arguments(self, operation: Operation) -> dict[str, Any]:
        """The arguments of an operation on constants alone."""
        resolved = {
            parameter: [self._constants[a] if isinstance(a, str) else _working(a) for a in group]
            for parameter, group in operation.inputs.items()
        }
        return {p: items if p in _LISTS else items[0] for p, items in resolved.items()}

    def _step(self, index: int, operation: Operation, uses: Mapping[str, int], in_place: bool) -> _Step:
        fixed: dict[str, Any] = {}
        single, lists = [], []
        touched: set[str] = {name for name, _ in operation.outputs if name not in uses}
        for parameter, group in operation.inputs.items():
            if parameter in _LISTS:
                lists.append((parameter, group))
            elif isinstance(group[0], Constant):
                fixed[parameter] = _working(group[0])
            elif group[0] in self._constants:
                fixed[parameter] = self._constants[group[0]]
            elif group[0] not in self.program.states:
                single.append((parameter, group[0]))
        # What blocks make themselves is theirs.
        own = {name for one in walk((operation,)) for block in one.blocks for name, _ in block.inputs}
        own |= {name for block in operation.blocks for one in walk(block.operations) for name, _ in one.outputs}
        touched |= {n for n in names_in(operation) if n not in own | self._constants.keys() and uses.get(n) == index}
        result = operation.outputs[0][1] if operation.outputs else ValueType("float32")
        row = None
        if operation.kind not in EXACT and operation.kind in OPERATIONS and result.dtype in ("float16", "float32"):
            row = RangeRow(operation.name, operation.kind, result.dtype)
            if index >= 0:
                self.ranges.append(row)
        return _Step(
            operation, OPERATIONS.get(operation.kind, _no_handler), result, fixed, tuple(single), tuple(lists),
            tuple(touched - set(self.program.states)) if index >= 0 else (), row,
            row is not None and result.dtype == "float16", in_place,
            tuple(self._steps_of_block(block) for block in operation.blocks),
        )  # fmt: skip


def _why(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _no_handler(_: Mapping[str, Any], __: ValueType) -> Any:
    raise NotImplementedError("states are handled by the interpreter")
