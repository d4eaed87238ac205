"""What an ONNX quantisation means for each matrix of a model: the kind by its role, or by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..artifact import Task
from ..errors import UsageError
from ..quantisation_onnx import OnnxQuantisation, parse

__all__ = ["Fit", "Kind", "Role", "Scheme", "scheme_of"]

Role = Literal["attention", "mlp", "down", "head", "embedding"]
Fit = Literal["nearest", "search", "gptq"]


@dataclass(frozen=True)
class Kind:
    """How one weight matrix is stored.

    ``float``: in the compute type. ``blocks``: codes of ``bits`` with a scale for each ``block`` of a row (32 where
    ``block`` does not divide it), activations in float (MatMulNBits, GatherBlockQuantized). ``dynamic``: int8 codes
    with a scale a tensor or a row, activations quantised to uint8 as they come (MatMulInteger). ``static``: such codes,
    activations quantised to uint8 on a grid that calibration fixed (:class:`edgestill.grids.InputGrid`; QuantizeLinear
    and DequantizeLinear, which runtimes fuse with the product).

    ``fit`` is how codes in blocks are found: round to ``nearest`` in the block's range; ``search`` for the range with
    the least squared error; ``gptq``, which makes up for errors besides. ``half_scales`` keeps scales as float16 in the
    file; ONNX Runtime widens them once, when it loads.
    """

    way: Literal["float", "blocks", "dynamic", "static"] = "float"
    bits: int = 8
    symmetric: bool = True
    per_row: bool = False
    block: int = 32
    fit: Fit = "nearest"
    half_scales: bool = False

    def block_of(self, width: int) -> int:
        """The block that rows of ``width`` are cut into."""
        return 32 if width % self.block else self.block


@dataclass(frozen=True)
class Scheme:
    """What a quantisation means: the compute type, and the kind of each role (``default`` where not named).

    ``types`` are kinds of single parameters, which stand above their role's.
    """

    default: Kind
    roles: tuple[tuple[Role, Kind], ...] = ()
    half: bool = False
    types: Mapping[str, Kind] = field(default_factory=dict)

    def kind(self, role: Role, name: str = "") -> Kind:
        """How the matrix ``name`` of this role is stored."""
        return self.types.get(name) or dict(self.roles).get(role, self.default)

    def kinds(self) -> tuple[Kind, ...]:
        """All kinds that may occur."""
        return (self.default, *(kind for _, kind in self.roles), *self.types.values())


_INT8 = Kind("blocks", 8)
_INT4 = Kind("blocks", 4, symmetric=False)
_SENSITIVE: tuple[Role, ...] = ("head", "embedding", "down")

# What int4 and dynamic int8 keep in 8-bit blocks was measured: the inputs of down_proj have outliers (SmolLM2's reach
# 2,824). Keeping it takes SmolLM2's KL from 0.34 to 0.20 nats with int4, from 0.78 to 0.07 with dynamic int8.
#
# 7 bits (ONNX Runtime's reduce_range): u8 x s8 products are added in pairs in 16 bits on x86 without VNNI, and
# 255 * 64 * 2 is the most that fits. The per-channel variant without it is what ONNX Runtime's documentation warns of;
# it is here so that verification can be seen to catch it.
# Plain int4 and int8 round to nearest with scales of their own precision: what a student can be trained through.
_PLAIN: dict[str, Scheme] = {
    "fp32": Scheme(Kind()),
    "fp16": Scheme(Kind(), half=True),
    "int8": Scheme(_INT8),
    "int4": Scheme(_INT4, tuple((role, _INT8) for role in _SENSITIVE)),
    "int8-dynamic": Scheme(Kind("dynamic", 7, per_row=True), tuple((role, _INT8) for role in _SENSITIVE)),
    # Which matrices stay in 8-bit blocks is measured for each model (onnx_static.py), not said here.
    "int8-static": Scheme(Kind("static", 7, per_row=True), (("embedding", _INT8),)),
    "int8-dynamic-per-channel": Scheme(Kind("dynamic", 8, per_row=True), (("embedding", _INT8),)),
}


def scheme_of(quantisation: OnnxQuantisation, task: Task, types: Mapping[str, str] | None = None) -> Scheme:
    """The scheme of ``quantisation`` for models of ``task``.

    ``types`` maps parameter names to names of this format's language (float or in blocks). Raises
    :class:`UsageError` for a type that can't stand beside the others.
    """
    scheme = _scheme(quantisation, task)
    if not types:
        return scheme
    chosen: dict[str, Kind] = {}
    for name, text in types.items():
        try:
            parsed = parse(text)
        except ValueError as error:
            raise UsageError(f"{name}: {error}", hint="types are names that may follow onnx:") from None
        kind = _kind(parsed, task)
        if kind.way == "float" and (parsed.base == "fp16") != scheme.half:
            raise UsageError(f"{name}: {text} beside {quantisation.name}", hint="a graph computes in one float type")
        chosen[name] = kind
    return dataclasses.replace(scheme, types=chosen)


def _scheme(quantisation: OnnxQuantisation, task: Task) -> Scheme:
    plain = _PLAIN[quantisation.base]
    if quantisation.base == "int8":
        return Scheme(_kind(quantisation, task))
    if quantisation.base != "int4" or quantisation.plain:
        return plain
    kind = _kind(quantisation, task)
    if quantisation.pure:
        return Scheme(kind)
    kept = dataclasses.replace(_INT8, fit="gptq" if quantisation.gptq else "nearest", half_scales=True)
    return Scheme(kind, tuple((role, kept) for role in _SENSITIVE))


def _kind(quantisation: OnnxQuantisation, task: Task) -> Kind:
    """What a single matrix is in this quantisation."""
    plain = _PLAIN[quantisation.base].default
    if quantisation.base == "int8" and task != "text-generation":
        # An encoder works on whole sentences, where larger blocks are a quarter faster (MiniLM: cosine 0.99943, not
        # 0.99965).
        plain = dataclasses.replace(plain, block=64)
    if quantisation.plain:
        return plain
    fit: Fit = "gptq" if quantisation.gptq else "search" if plain.bits == 4 else "nearest"
    return dataclasses.replace(
        plain, block=quantisation.block or plain.block, fit=fit, half_scales=True,
        symmetric=plain.symmetric if quantisation.symmetric is None else quantisation.symmetric,
    )  # fmt: skip


def names_with(scheme: Scheme, names: Sequence[str], role: Role) -> list[list[str]]:
    """``names`` in runs that are stored alike, in order."""
    runs: list[list[str]] = []
    for name in names:
        if runs and scheme.kind(role, runs[-1][0]) == scheme.kind(role, name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs
