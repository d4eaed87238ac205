"""Builds an ONNX graph in the way that ONNX Runtime executes fastest, and quantises its weights while doing so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..artifact import StoredTensor
from ..errors import Unsupported
from ..grids import Affine, InputGrid, quantise_affine
from .onnx_compensation import fit
from .onnx_file import Spool
from .onnx_schemes import Kind, Role, Scheme, names_with
from .writer import PIECE_VALUES, Weights

__all__ = ["MICROSOFT", "Graph", "InputMoments", "Kind", "Scheme", "pack_bits"]

MICROSOFT = "com.microsoft"

Floats = npt.NDArray[np.float32]


def pack_bits(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack the last axis, the first code in the low bits; an odd rest is filled with 0.

    >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)


class InputMoments(Protocol):
    """Second moments of what goes into the matrices of a model (:class:`.onnx_moments.Moments`)."""

    def of(self, name: str) -> Floats | None:
        """``[K, K]`` of the matrix of parameter ``name``; ``None`` where there is none."""


class Graph:
    """Nodes, weights and the weight map of one model in the making.

    ``weights`` are read one at a time; ``scheme`` says how they are stored, ``moments`` what goes into each matrix
    (needed where the scheme says ``gptq``), ``input_grids`` on which grid it is rounded, by parameter (where the scheme
    says ``static``). Values are named by strings. Activations
    are float32 between the methods; where the scheme computes in half precision, :meth:`linear` casts.
    """

    def __init__(
        self, weights: Weights, scheme: Scheme, spool: Spool, moments: InputMoments | None = None,
        input_grids: Mapping[str, InputGrid] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.weights = weights
        self._input_grids = input_grids
        self._moments = moments
        self.scheme = scheme
        self.nodes: list[Any] = []
        self.tensors: list[StoredTensor] = []
        self.fallen: list[tuple[int, int, bool, int]] = []
        """Of matrices whose rows the wished block does not divide: that block, the one taken, whether the last of a
        row is filled up, and the bytes of the codes."""
        self._spool = spool
        self._names: dict[str, int] = {}
        self._cache: dict[tuple[str, ...], str] = {}

    # -- nodes ---------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output; an omitted input is ``""``."""
        return self.ops(kind, inputs, 1, name=name, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], outputs: int | Sequence[str], *, name: str = "", domain: str = "",
        **attributes: Any,
    ) -> list[str]:  # fmt: skip
        """Add a node with several outputs: a number of them, or their names (``""`` for one that is not wanted)."""
        from onnx import helper

        name = self._unique(name or kind)
        if isinstance(outputs, int):
            outputs = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return list(outputs)

    def rename(self, value: str, output: str) -> None:
        """Give a value the name of a graph output."""
        self.ops("Identity", [value], [output], name=f"{output}.out")

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant."""
        return self._spool.constant(np.asarray(value, dtype))

    def cast(self, value: str, dtype: str) -> str:
        """Convert to ``float32``, ``float16``, ``int32`` …; the same cast of the same value is made once."""
        from onnx import TensorProto

        key = ("cast", value, dtype)
        if key not in self._cache:
            self._cache[key] = self.op("Cast", value, to=getattr(TensorProto, _PROTO[dtype]))
        return self._cache[key]

    # -- weights -------------------------------------------------------------------------------------------------

    def parameter(self, name: str) -> str:
        """A vector or table that stays float: norms, biases, positions."""
        if name not in self._spool:
            array = self.weights[name]
            self._spool.add(name, array)
            self.tensors.append(StoredTensor(name, name, "float32"))
        return name

    def bias(self, names: Sequence[str], dtype: str = "float32") -> str:
        """Biases of merged matrices, one after the other."""
        stored = names[0] if len(names) == 1 else f"{names[0]}+{len(names) - 1}"
        if stored not in self._spool:
            parts = [self.weights[name] for name in names]
            self._spool.add(stored, _as(dtype, np.concatenate(parts), names[0]))
            self._record(names, [len(part) for part in parts], stored, dtype, ())
        return stored

    def linear(
        self, x: str, names: Sequence[str], biases: Sequence[str] = (), *, role: Role, half: bool = False
    ) -> str:
        """``x [..., K] @ W.T + b`` for one matrix ``[N, K]``, or several that share their input, stored as one.

        The result is float32, unless ``half`` asks for what half precision computes (then fp16 comes out).
        """
        runs = names_with(self.scheme, names, role)
        if len(runs) > 1:  # stored apart, put together again for the operator that takes them as one
            shared = dict(zip(names, biases, strict=True)) if biases else {}
            parts = [self.linear(x, run, [shared[n] for n in run if shared], role=role, half=half) for run in runs]
            return self.op("Concat", *parts, name=f"{names[0].removesuffix('.weight')}.joined", axis=-1)
        kind = self.scheme.kind(role, names[0])
        label = "lm_head" if role == "head" and "embed" in names[0] else names[0].removesuffix(".weight")
        match kind.way:
            case "float":
                y = self._linear_float(x, names, biases, label)
            case "blocks":
                y = self._linear_blocks(x, names, biases, label, kind)
            case "dynamic":
                y = self._linear_dynamic(x, names, biases, label, kind)
            case "static":
                y = self._linear_static(x, names, biases, label, kind)
        return self.cast(y, "float32") if self.scheme.half and not half else y

    def _linear_float(self, x: str, names: Sequence[str], biases: Sequence[str], label: str) -> str:
        dtype = "float16" if self.scheme.half else "float32"
        stored = self._merged_name(names)
        x = self.cast(x, dtype) if self.scheme.half else x
        if names[0] in self._spool:  # tied to the embedding, which is stored as [N, K]
            y = self.op("FusedMatMul", x, names[0], name=f"{label}.matmul", domain=MICROSOFT, transB=1)
        else:
            merged, rows = self._merge(names)
            step = max(1, PIECE_VALUES // len(merged))
            columns = (merged[:, at : at + step].T for at in range(0, merged.shape[1], step))
            self._spool.stream(stored, dtype, merged.shape[::-1], (_as(dtype, part, names[0]) for part in columns))
            self._record(names, rows, stored, dtype, (("transpose",),))
            y = self.op("MatMul", x, stored, name=f"{label}.matmul")
        return self.op("Add", y, self.bias(biases, dtype), name=f"{label}.add") if biases else y

    def _linear_blocks(self, x: str, names: Sequence[str], biases: Sequence[str], label: str, kind: Kind) -> str:
        codes, scales, zeros, (n, k, block) = self._store_blocks(names, kind)
        bias = self.bias(biases) if biases else ""
        inputs = [x, codes, scales, zeros, "", bias]
        while not inputs[-1]:
            inputs.pop()
        return self.op(
            "MatMulNBits", *inputs, name=f"{label}.matmul", domain=MICROSOFT, N=n, K=k, bits=kind.bits,
            block_size=block, accuracy_level=4,
        )  # fmt: skip

    def _linear_dynamic(self, x: str, names: Sequence[str], biases: Sequence[str], label: str, kind: Kind) -> str:
        codes, scale = self._store_whole(names, kind, "int8")
        if (key := ("dynamic", x)) not in self._cache:
            quantised = self.ops("DynamicQuantizeLinear", [x], 3, name=f"{label}.quantize")
            self._cache[key] = "\0".join(quantised)
        levels, step, zero = self._cache[key].split("\0")
        whole = self.op("MatMulInteger", levels, codes, zero, self.constant(0, np.int8), name=f"{label}.matmul")
        factor = self.op("Mul", step, scale, name=f"{label}.scale")
        y = self.op("Mul", self.cast(whole, "float32"), factor, name=f"{label}.rescale")
        return self.op("Add", y, self.bias(biases), name=f"{label}.add") if biases else y

    def _linear_static(self, x: str, names: Sequence[str], biases: Sequence[str], label: str, kind: Kind) -> str:
        """QDQ: the input on the grid that calibration gave the first of ``names``, an int8 weight, a float product."""
        if names[0] not in self._input_grids:
            raise Unsupported(f"{names[0]}: calibration saw no input of it", hint="export it to onnx:int8")
        grid = self._input_grids[names[0]]
        codes, scales = self._store_whole(names, kind, "int8-static")
        if (key := ("static", x)) not in self._cache:
            given = [self.constant(grid.scale, np.float32), self.constant(grid.zero_point, np.uint8)]
            levels = self.op("QuantizeLinear", x, *given, name=f"{label}.quantize")
            self._cache[key] = self.op("DequantizeLinear", levels, *given, name=f"{label}.dequantize")
        zeros = self.constant(np.zeros(sum(self.weights.shape(name)[0] for name in names)), np.int8)
        weight = self.op("DequantizeLinear", codes, scales, zeros, name=f"{label}.weight", axis=1)
        y = self.op("MatMul", self._cache[key], weight, name=f"{label}.matmul")
        return self.op("Add", y, self.bias(biases), name=f"{label}.add") if biases else y

    def _store_whole(self, names: Sequence[str], kind: Kind, grid_name: str) -> tuple[str, str]:
        """Signed codes ``[K, N]`` of merged matrices with a scale for each of the N columns."""
        stored = self._merged_name(names)
        parts, scales = [], []
        for name in names:
            weight = self.weights[name]
            grid = quantise_affine(weight if kind.per_row else weight.reshape(1, -1), bits=kind.bits)
            signed = grid.codes.astype(np.int16) - (1 << kind.bits - 1)
            parts.append(signed.astype(np.int8).reshape(weight.shape))
            scales.append(np.broadcast_to(grid.scales[:, 0], (weight.shape[0],)))
        codes = self._spool.add(f"{stored}.int8", np.concatenate(parts).T)
        scale = self._spool.add(f"{stored}.scales", np.concatenate(scales))
        self._record(names, [len(part) for part in parts], codes, grid_name, (("transpose",),), scale)
        return codes, scale

    def embed(self, ids: str, name: str, *, role: Role = "embedding") -> str:
        """Rows ``ids`` of the table ``name``, float32."""
        kind = self.scheme.kind(role, name)
        if kind.way == "blocks" and (kind.bits, kind.symmetric) != (8, True):
            return self._embed_rows(ids, name, kind)
        if kind.way == "blocks":
            codes, scales, _, (_, width, block) = self._store_blocks([name], kind)
            blocks = -(-width // block)
            companions = [self.op("Reshape", scales, self.constant([0, blocks, 1]), name=f"{scales}.blocks")]
            tiles = self.op(
                "GatherBlockQuantized", codes, ids, *companions, name=f"{name}.gather", domain=MICROSOFT,
                bits=kind.bits, block_size=block, gather_axis=0, quantize_axis=2,
            )  # fmt: skip
            rows = self.op("Reshape", tiles, self.constant([0, 0, blocks * block]), name=f"{name}.rows")
            if blocks * block == width:
                return rows
            return self.op("Slice", rows, *(self.constant([v]) for v in (0, width, 2)), name=f"{name}.cut")
        if name not in self._spool:
            dtype = "float16" if self.scheme.half else "float32"
            parts = (_as(dtype, part, name) for part in self.weights.pieces(name))
            self._spool.stream(name, dtype, self.weights.shape(name), parts)
            self.tensors.append(StoredTensor(name, name, dtype))
        rows = self.op("Gather", name, ids, name=f"{name}.gather")
        return self.cast(rows, "float32") if self.scheme.half else rows

    def _embed_rows(self, ids: str, name: str, kind: Kind) -> str:
        """A table whose zero points are packed a row: codes are looked at as ``[N, bytes of a row]``."""
        codes, scales, zeros, (n, width, block) = self._store_blocks([name], kind)
        padded = -(-width // block) * block
        flat = self.op("Reshape", codes, self.constant([n, padded * kind.bits // 8]), name=f"{codes}.rows")
        rows = self.op(
            "GatherBlockQuantized", flat, ids, scales, *([zeros] if zeros else []), name=f"{name}.gather",
            domain=MICROSOFT, bits=kind.bits, block_size=block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if padded == width:
            return rows
        return self.op("Slice", rows, *(self.constant([v]) for v in (0, width, 2)), name=f"{name}.cut")

    # -- storing -------------------------------------------------------------------------------------------------

    def _store_blocks(self, names: Sequence[str], kind: Kind) -> tuple[str, str, str, tuple[int, int, int]]:
        """Codes ``[N, blocks, bytes]``, scales ``[N, blocks]`` and, if not symmetric, packed zero points."""
        n = sum(self.weights.shape(name)[0] for name in names)
        k = self.weights.shape(names[0])[1]
        block = kind.block_of(k)
        stored = f"{self._merged_name(names)}.int{kind.bits}-b{block}"
        scales, zeros = f"{stored}.scales", "" if kind.symmetric else f"{stored}.zeros"
        if stored not in self._spool:
            blocks = -(-k // block)
            moment = self._moments.of(names[0]) if self._moments and kind.fit == "gptq" else None
            steps: list[Floats] = []
            middles: list[npt.NDArray[np.uint8]] = []

            def codes() -> Iterator[npt.NDArray[np.uint8]]:
                for grid in self.quantised(names, kind, block, moment):
                    steps.append(grid.scales)
                    middles.append(grid.zero_points)
                    yield pack_bits(grid.codes.reshape(-1, blocks, block), kind.bits)

            self._spool.stream(stored, np.uint8, (n, blocks, block * kind.bits // 8), codes())
            found = np.concatenate(steps)
            self._spool.add(scales, found.astype(np.float16) if _fits_half(found, kind) else found)
            if zeros:
                self._spool.add(zeros, pack_bits(np.concatenate(middles), kind.bits))
            if k % kind.block:
                self.fallen.append((kind.block, block, k % block != 0, n * blocks * block * kind.bits // 8))
            cut = () if blocks * block == k else (("slice", 1, 0, k),)
            grid_name = f"int{kind.bits}-b{block}{_suffix(kind, moment is not None)}"
            rows = [self.weights.shape(name)[0] for name in names]
            self._record(names, rows, stored, grid_name, cut, scales, zeros or None)
        wide = self.cast(scales, "float32") if self._spool.dtype(scales) == "float16" else scales
        return stored, wide, zeros, (n, k, block)

    def quantised(self, names: Sequence[str], kind: Kind, block: int, moment: Floats | None) -> Iterator[Affine]:
        """The codes of merged matrices, some rows at a time; with a ``moment`` of all rows at once."""
        most: float | None = None
        if kind.half_scales and moment is None:
            parts = (part for name in names for part in self.weights.pieces(name))
            most = max((float(np.abs(part).max(initial=0.0)) for part in parts), default=0.0)
        whole = [self._merge(names)[0]] if moment is not None else None
        for piece in whole or (part for name in names for part in self.weights.pieces(name)):
            rest = -piece.shape[1] % block
            padded = np.pad(piece, ((0, 0), (0, rest))) if rest else piece
            if kind.fit == "nearest" and not kind.half_scales:
                yield quantise_affine(padded, bits=kind.bits, block=block, symmetric=kind.symmetric)
            else:
                yield fit(padded, kind, block, moment, most=most)

    def _merge(self, names: Sequence[str]) -> tuple[Floats, list[int]]:
        parts = [self.weights[name] for name in names]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)), [len(part) for part in parts]

    def _merged_name(self, names: Sequence[str]) -> str:
        return names[0] if len(names) == 1 else f"{names[0]}+{len(names) - 1}"

    def _record(
        self, names: Sequence[str], rows: Sequence[int], stored: str, grid: str, layout: tuple[tuple[Any, ...], ...],
        scales: str | None = None, zero_points: str | None = None,
    ) -> None:  # fmt: skip
        """Note where each of the merged weights lies: rows ``[start, stop)`` of the stored one."""
        start = 0
        for name, count in zip(names, rows, strict=True):
            part = () if len(names) == 1 else (("slice", 0, start, start + count),)
            self.tensors.append(StoredTensor(name, stored, grid, (*layout, *part), scales, zero_points))
            start += count

    def _unique(self, name: str) -> str:
        seen = self._names.get(name, -1) + 1
        self._names[name] = seen
        return name if not seen else f"{name}_{seen}"


def _suffix(kind: Kind, compensated: bool) -> str:
    """What a grid's name says of how its codes were found: nothing where each weight was rounded to the nearest."""
    if kind.fit == "gptq" and compensated:
        return "-gptq"
    return "-search" if kind.fit != "nearest" and kind.bits == 4 else ""


def _as(dtype: str, values: Floats, name: str) -> npt.NDArray[Any]:
    """``values`` of the parameter ``name`` in C order as float32 or float16, which must be able to hold them."""
    if dtype == "float16" and values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise Unsupported(f"{name} holds weights too large for fp16", hint="take fp32 or a quantised type")
    return np.asarray(values, dtype, order="C")


def _fits_half(scales: Floats, kind: Kind) -> bool:
    """Scales that float16 keeps with all its digits; :func:`fit` has rounded them to it already, if they do."""
    return kind.half_scales and bool((scales == scales.astype(np.float16)).all())


_PROTO = {"float32": "FLOAT", "float16": "FLOAT16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
