"""Which operations of a Core ML program stay in float32, found by running the program on text.

Four questions, asked of the program in the middle of its conversion, while all of it is still float32:

1. *Range*: does an operation take or give a number that float16 does not hold, or make one (a NaN, an infinity) once
   its arguments are rounded? Text is a sample, so what comes within a factor of ``HEADROOM`` of the largest float16
   counts, too; products with weights only when they do leave it, since in float32 they store twice the bytes.
2. *Damage*: is a result, made of rounded arguments, off by more than ``DAMAGE`` of itself? That is what flushing to
   zero and cancellation look like.
3. *Rounding*: what do all other roundings cost what the model says (KL in nats a token; the dot product of an
   embedding with itself), beside the products with weights, which are float16 whatever happens? Operations that play
   the same part in every layer are rounded together, and those that add more than ``SHARE`` of the products' own cost
   stay in float32, unless nobody would notice.
4. *Between*: moves (reshape, slice …) round what they move, so between two islands they stay in float32; and so does
   what islands alone take, since its float16 would be a cast there and one back.

Same program and texts, same islands.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..artifact import Task
from ..runtimes.mil.half import FLOAT16_MAX, round_half
from ..runtimes.mil.interpreter import Interpreter
from ..runtimes.mil.mixed import LARGE_VALUES, leaves_half, mixed
from ..runtimes.mil.program import Operation, Program, ValueType
from ..runtimes.mil.registry import EXACT, OPERATIONS
from ..runtimes.scoring import kl_divergence
from .coreml_roles import roles

__all__ = ["DAMAGE", "HEADROOM", "SHARE", "Feed", "Island", "Islands", "as_json", "choose", "describe"]

Floats = npt.NDArray[np.float32]
Feed = Mapping[str, npt.NDArray[Any]]
Reason = Literal["range", "damage", "rounding", "between"]

HEADROOM = 4.0
DAMAGE = 2.0**-6  # 32 times what rounding to float16 is off by at most
SHARE = 0.1

# What coremltools' cast pass leaves alone.
_NEVER = ("cast", "while_loop", "cond", "make_list", "list_gather", "list_scatter", "list_read", "list_write",
          "list_length", "read_state", "coreml_update_state", "const")  # fmt: skip
_PRODUCTS = ("linear", "matmul", "conv", "conv_transpose", "einsum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Island:
    """Operations of one kind in float32, and why: ``value`` is the largest magnitude that they met (``range``), their
    largest error beside their result (``damage``), what their rounding costs (``rounding``), or 0 (``between``)."""

    kind: str
    reason: Reason
    value: float
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Islands:
    """What was chosen, and on what: divergence of the program with all other operations in float16 (``rest``) and with
    nothing but the products in float16 (``products``), over ``tokens`` of text."""

    found: tuple[Island, ...]
    metric: str
    products: float
    everything: float
    rest: float
    tokens: int

    @property
    def names(self) -> frozenset[str]:
        """The operations that stay in float32."""
        return frozenset(name for island in self.found for name in island.operations)


def choose(program: Program, task: Task, feeds: Sequence[Feed], longest: Sequence[Feed] = ()) -> Islands:
    """The islands of a float32 ``program``, measured on ``feeds`` (inputs by name, batch 1); ``longest`` are looked at
    for their range alone. Takes two runs more than there are feeds, and one for each role when rounding costs.

    Raises :class:`edgestill.errors.Unsupported` for an operation that the interpreter does not know."""
    choice = _Choice(program, task, feeds)
    choice.look(longest)
    return choice.islands()


class _Choice:
    def __init__(self, program: Program, task: Task, feeds: Sequence[Feed]) -> None:
        self.program, self.task, self.feeds = program, task, feeds
        self.types = {**program.inputs, **{name: c.type for name, c in program.constants.items()}}
        self.types |= {name: kind for o in program.operations for name, kind in o.outputs}
        self.open = {o.name: o for o in program.operations if self._can_be_half(o)}
        # Held by the program, so no other array has such an id.
        self.weights = {id(c.value) for c in program.constants.values() if np.size(c.value) > LARGE_VALUES}
        self.heavy = {name for name, o in self.open.items() if self._is_heavy(o)}
        self.peaks: dict[str, float] = {}
        self.damages: dict[str, float] = {}
        self.said: list[Floats] = []
        self.tokens = 0

    def _can_be_half(self, operation: Operation) -> bool:
        floats = any(kind.dtype == "float32" for _, kind in operation.outputs)
        too_large = any(
            leaves_half(np.asarray(self.program.constants[name].value))
            for name in _names(operation)
            if name in self.program.constants
        )
        return floats and operation.kind not in _NEVER and not too_large

    def _is_heavy(self, operation: Operation) -> bool:
        return operation.kind in _PRODUCTS or any(
            np.size(self.program.constants[name].value) > LARGE_VALUES
            for name in _names(operation)
            if name in self.program.constants
        )

    def _has_weights(self, operation: Operation) -> bool:
        constants = (self.program.constants.get(name) for name in _names(operation))
        vectors = any(c is not None and c.type.dtype == "float32" and np.size(c.value) > 1 for c in constants)
        return vectors or operation.kind in _PRODUCTS

    def look(self, longest: Sequence[Feed]) -> None:
        """Run in float32: what each operation meets, and what it would make of rounded arguments."""
        interpreter = Interpreter(self.program)
        interpreter.watch = self._watch
        for feed in longest:
            self._run(interpreter, feed)
        self.said = [self._run(interpreter, feed) for feed in self.feeds]
        self.tokens = sum(int(np.size(feed["input_ids"])) for feed in self.feeds)

    def _run(self, interpreter: Interpreter, feed: Feed) -> Floats:
        found = interpreter.run(feed, interpreter.new_state())
        return np.asarray(found[self.program.outputs[0]], np.float32)

    def _watch(self, operation: Operation, arguments: Mapping[str, Any], result: Any) -> None:
        name = operation.name
        if name not in self.open or isinstance(result, tuple):
            return
        peak = _peak(arguments["update"] if operation.kind == "slice_update" else result)
        if operation.kind in EXACT:  # what it moves was made by others
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            return
        rounded: dict[str, Any] = {}
        for parameter, value in arguments.items():
            if isinstance(value, list):
                pairs = [self._rounded(item) for item in value]
                rounded[parameter] = [item for item, _ in pairs]
                peak = max([peak, *(met for _, met in pairs)])
            else:
                rounded[parameter], met = self._rounded(value)
                peak = max(peak, met)
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
        if peak > FLOAT16_MAX:
            return
        again = np.array(OPERATIONS[operation.kind](rounded, ValueType("float16", operation.outputs[0][1].shape)))
        round_half(again)
        size = float(np.linalg.norm(np.where(np.isfinite(result), result, 0)))
        off = float(np.linalg.norm(np.where(np.isfinite(result), again - result, 0)))
        damage = off / size if size else 0.0
        self.damages[name] = max(self.damages.get(name, 0.0), damage if np.isfinite(damage) else np.inf)

    def _rounded(self, value: Any) -> tuple[Any, float]:
        """An argument as float16 has it, and the largest finite magnitude in it. Weights are left as they are."""
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            return value, 0.0
        peak = _peak(value)
        if id(value) in self.weights:
            return value, peak
        copy = np.array(value)
        round_half(copy)
        return copy, peak

    def islands(self) -> Islands:
        """The four questions."""
        why: dict[str, tuple[Reason, float]] = {}
        for name in self.open:
            peak, damage = self.peaks.get(name, 0.0), self.damages.get(name, 0.0)
            if peak > FLOAT16_MAX / (1 if name in self.heavy else HEADROOM):
                why[name] = ("range", peak)
            elif damage > DAMAGE:
                why[name] = ("damage", damage)
        light = {n for n, o in self.open.items() if n not in self.heavy and o.kind not in EXACT and n not in why}
        metric = _metric(self.task)

        def cost(half: set[str]) -> float:
            kept = self._with_moves(set(self.open) - half)
            interpreter = Interpreter(mixed(self.program, set(self.open) - kept))
            pairs = zip(self.feeds, self.said, strict=True)
            return float(
                np.mean(np.concatenate([metric.of(said, self._run(interpreter, feed)) for feed, said in pairs]))
            )

        moves = {name for name, operation in self.open.items() if operation.kind in EXACT}
        always = (self.heavy | moves) - set(why)
        products, everything = cost(always), cost(always | light)
        rest, least = everything, max(SHARE * products, metric.negligible)
        if not everything <= products + least:  # NaN is too much, too
            for group in roles(self.program, light):
                added = cost(always | set(group)) - products
                if not added <= least:
                    why |= dict.fromkeys(group, ("rounding", added))
        for name in self._with_moves(self._with_feeders(set(why))) - set(why):
            why[name] = ("between", 0.0)
        if why:
            rest = cost((always | light) - set(why))
        return Islands(self._grouped(why), metric.name, products, everything, rest, self.tokens)

    def _with_feeders(self, islands: set[str]) -> set[str]:
        """With what is taken by islands alone, back to the next operation with weights (they would be stored in float32
        for nothing): float16 would be a cast there and one back."""
        takers: dict[str, list[str]] = {name: ["output"] for name in self.program.outputs}
        for operation in self.program.operations:
            for name in _names(operation):
                takers.setdefault(name, []).append(operation.name)
        kept = set(islands)
        for operation in reversed(self.program.operations):
            if operation.name in self.open and not self._has_weights(operation):
                taken = [taker for name, _ in operation.outputs for taker in takers.get(name, ())]
                if taken and kept.issuperset(taken):
                    kept.add(operation.name)
        return kept

    def _with_moves(self, islands: set[str]) -> set[str]:
        """With the moves from one float32 operation to another."""
        makers = {name: o for o in self.program.operations for name, _ in o.outputs}
        wanted: set[str] = set()  # values that a float32 operation takes
        candidates: list[Operation] = []
        for operation in reversed(self.program.operations):
            if operation.kind in EXACT and operation.name in self.open and operation.name not in self.heavy:
                if operation.name not in islands and wanted.isdisjoint({n for n, _ in operation.outputs}):
                    continue
                candidates.append(operation)
                wanted |= set(_names(operation))
            elif operation.name in islands:
                wanted |= set(_names(operation))
        kept = set(islands)
        for operation in reversed(candidates):
            sources = [makers[n] for n in _names(operation) if n in makers and self.types[n].dtype == "float32"]
            if sources and all(source.name in kept or source.name not in self.open for source in sources):
                kept.add(operation.name)
        return kept

    def _grouped(self, why: Mapping[str, tuple[Reason, float]]) -> tuple[Island, ...]:
        """One row for each kind and reason (and cost of a role), the worst value standing for all."""
        rows: dict[tuple[Any, ...], list[str]] = {}
        for operation in self.program.operations:
            if operation.name in why:
                reason, value = why[operation.name]
                key = (operation.kind, reason, value if reason == "rounding" else None)
                rows.setdefault(key, []).append(operation.name)
        return tuple(
            Island(kind, reason, max(why[name][1] for name in names), tuple(names))
            for (kind, reason, _), names in rows.items()
        )


def _names(operation: Operation) -> list[str]:
    return [a for group in operation.inputs.values() for a in group if isinstance(a, str)]


def _peak(value: Any) -> float:
    """The largest finite magnitude: an infinity in a mask is one in float16, too."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or not value.size:
        return 0.0
    peak = float(np.abs(value).max())
    return peak if np.isfinite(peak) else float(np.abs(value[np.isfinite(value)]).max(initial=0))


@dataclass(frozen=True)
class _Metric:
    """How far the answer moved, row by row; below ``negligible`` nobody would notice."""

    name: str
    of: Callable[[Floats, Floats], npt.NDArray[np.float64]]
    negligible: float


def _metric(task: Task) -> _Metric:
    if task == "feature-extraction":
        return _Metric("error of the dot product with the float32 embedding, beside its square", _similarity, 5e-7)
    return _Metric("KL to float32, nats a prediction", lambda said, now: kl_divergence(said, now).reshape(-1), 1e-6)


def _similarity(said: Floats, now: Floats) -> npt.NDArray[np.float64]:
    """Apps multiply embeddings: a length that is off counts, which a cosine does not see."""
    exact, rounded = (v.astype(np.float64).reshape(-1, v.shape[-1]) for v in (said, now))
    return np.asarray(np.abs((exact * (exact - rounded)).sum(-1)) / np.square(exact).sum(-1))


def describe(islands: Islands | None) -> str:
    """For ``contents``: ``"; in float32: 9 add, 2 real_div"``, or nothing."""
    if islands is None or not islands.found:
        return ""
    kinds: Counter[str] = Counter()
    for island in islands.found:
        kinds[island.kind] += len(island.operations)
    return f"; in float32: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"


def as_json(islands: Islands) -> dict[str, Any]:
    """For ``islands.json``: numbers to two digits, so that the last bits of a sum do not make another file."""
    rows = [dataclasses.asdict(island) | {"value": _two(island.value)} for island in islands.found]
    numbers = {name: _two(getattr(islands, name)) for name in ("products", "everything", "rest")}
    return {"metric": islands.metric, **numbers, "tokens": islands.tokens, "islands": rows}


def _two(value: float) -> float | None:
    return float(f"{value:.2g}") if np.isfinite(value) else None
