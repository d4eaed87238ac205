"""Which grid each tensor of a GGUF file gets: llama.cpp's own choice for each file type, said as tables.

A file type like Q4_K_M is a mixture: value and down projections of some layers get more bits, the output layer more
still, and rows that are no whole blocks fall back to a grid with smaller ones. The choice must be llama.cpp's own, or
the label would lie; a test compares whole files with those of ``llama_model_quantize``. Rules as of llama.cpp's
``llama-quant.cpp``, for models without experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Unsupported, UsageError, nearest
from ..grids import GGML_GRIDS
from ..quantisation_gguf import FILE_TYPES
from .gguf_layout import Placed

__all__ = ["FLOATS", "NEED_IMPORTANCE", "Mixture", "needs_importance", "storage_order", "tensor_types"]

FLOATS = ("f32", "f16", "bf16")

_TINY = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"})
_IQ2_LARGE = frozenset({"iq2_s", "iq2_m"})
_HEAD_Q5 = _TINY | {"iq3_xxs"}
_EMBEDDING = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "q2_k"),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
    **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "q4_k"),
}
_OUTPUT_PROJECTION = {
    "q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k",
    "iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s", "iq2_m": "iq3_s",
}  # fmt: skip
_QUERY_AND_KEY = {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}
# Where a row is no whole number of blocks: the grid of 32 that llama.cpp takes instead of one of 256 (or 64, 128).
_SMALLER = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
_EMBEDDING_AND_HEAD = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Mixture:
    """What llama.cpp's choice depends on beside the tensors: layers, query heads per key-value head (``gqa``), whether
    an importance matrix is given."""

    file_type: str
    architecture: str
    layers: int
    gqa: int = 1
    importance: bool = False


def storage_order(names: Iterable[str]) -> list[str]:
    """Tensor names in the order in which ``llama_model_quantize`` goes through them and writes them: those outside the
    layers first, then layer by layer, each by name."""

    def key(name: str) -> tuple[int, bytes]:
        found = re.match(r"blk\.(\d+)\.", name)
        return (int(found[1]) if found else -1, name.encode())

    return sorted(names, key=key)


def tensor_types(placed: Sequence[Placed], mixture: Mixture, asked: Mapping[str, str] | None = None) -> dict[str, str]:
    """The grid of each tensor of ``placed``, by its stored name.

    ``asked`` maps parameter names to grids that are taken exactly as they are. Raises :class:`UsageError` for a name
    there that the model doesn't store as a matrix or a grid that doesn't exist, and :class:`Unsupported` for one that
    its rows can't take.
    """
    manual = _manual(placed, asked or {})
    base = FILE_TYPES[mixture.file_type].grid
    columns = {item.stored: item.stored_shape[-1] for item in placed}
    matrices = {item.stored for item in placed if item.is_matrix}
    found = dict.fromkeys(columns, "f32")
    if base in FLOATS:
        return found | dict.fromkeys(matrices, base) | manual
    chooser = _Chooser(mixture, base, tied="output.weight" not in columns, values=_values(columns))
    for name in storage_order(matrices):
        if name in manual:  # llama.cpp does not count these either
            found[name] = manual[name]
        else:
            found[name] = _fitting(chooser.grid(name, columns[name]), columns[name])
    return found


def needs_importance(name: str, grid: str, file_type: str) -> bool:
    """Whether the tensor ``name`` in ``grid`` is garbage without an importance matrix (llama.cpp refuses it then)."""
    if name in _EMBEDDING_AND_HEAD:
        return False
    return grid in NEED_IMPORTANCE or (grid == "q2_k" and file_type == "q2_k_s")


def _manual(placed: Sequence[Placed], asked: Mapping[str, str]) -> dict[str, str]:
    known = {item.name: item for item in placed}
    found = {}
    for name, grid in asked.items():
        if name not in known or not known[name].is_matrix:
            matrices = [item.name for item in placed if item.is_matrix]
            raise UsageError(f"types: {name!r} is no matrix of this model", hint=nearest(name, matrices))
        if grid not in GGML_GRIDS:
            raise UsageError(f"types: unknown GGUF type {grid!r} for {name}", hint=nearest(grid, list(GGML_GRIDS)))
        columns, block = known[name].stored_shape[-1], GGML_GRIDS[grid].elements
        if columns % block:
            raise Unsupported(
                f"types: {name} has rows of {columns} values, which are no whole {grid} blocks of {block}",
                hint=f"for such rows take {_fitting(grid, columns)}",
            )
        found[known[name].stored] = grid
    return found


def _values(names: Iterable[str]) -> int:
    return sum(1 for name in names if _is_value(name))


def _is_value(name: str) -> bool:
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _fitting(grid: str, columns: int) -> str:
    """``grid``, or what llama.cpp falls back to for rows of ``columns`` values."""
    if columns % GGML_GRIDS[grid].elements == 0:
        return grid
    if grid == "q1_0":
        raise Unsupported(
            f"rows of {columns} values are no whole q1_0 blocks of 128, and llama.cpp has nothing to fall back to",
            hint="take another quantisation",
        )
    smaller = _SMALLER.get(grid, grid)
    return smaller if columns % GGML_GRIDS[smaller].elements == 0 else "f16"


def _more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class _Chooser:
    """Goes through the tensors in storage order and counts, as llama.cpp does."""

    def __init__(self, mixture: Mixture, base: str, *, tied: bool, values: int) -> None:
        self.kind, self.base, self.mixture = mixture.file_type, base, mixture
        self.tied, self.values = tied, values
        self.wide = mixture.gqa >= 4  # few key-value heads: their matrices are small, bits there are cheap
        self.large = mixture.architecture == "llama" and mixture.layers == 80 and mixture.gqa > 1  # "70B"
        self.seen = {"value": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}

    def grid(self, name: str, columns: int) -> str:
        """The grid for the next tensor, before it is known whether its rows fit."""
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self._head(columns)
        if name == "token_embd.weight":
            return _EMBEDDING.get(self.kind, self.base)
        if _is_value(name):
            return self._value(self._next("value"))
        if "attn_k.weight" in name or "attn_q.weight" in name:
            return _QUERY_AND_KEY.get(self.kind, self.base)
        if "attn_output.weight" in name:
            return _OUTPUT_PROJECTION.get(self.kind, self.base)
        if "ffn_down" in name:
            return self._down(self._next("ffn_down"))
        for part in ("ffn_up", "ffn_gate"):
            if part in name:
                index, layers = self._next(part), self.mixture.layers
                inner = layers // 8 <= index < 7 * layers // 8
                return "iq3_xxs" if self.kind == "iq3_xs" and inner else self.base
        return self.base

    def _next(self, what: str) -> int:
        self.seen[what] += 1
        return self.seen[what] - 1

    def _head(self, columns: int) -> str:
        if columns % GGML_GRIDS[self.base].elements:
            return "q8_0"
        if self.kind in _HEAD_Q5:
            return "q5_k"
        return self.base if self.base == "q8_0" else "q6_k"

    def _value(self, index: int) -> str:
        kind, wide = self.kind, self.wide
        if kind in _TINY:
            return "q4_k" if wide else "iq3_s" if kind in _IQ2_LARGE else "q2_k"
        grid = self.base
        if kind == "q2_k":
            grid = "q4_k" if wide else "q3_k"
        elif kind == "iq3_xxs":
            grid = "q4_k" if wide else "iq3_xxs" if self.mixture.importance else "iq3_s"
        elif kind in ("q2_k_s", "iq3_xs", "iq3_s"):
            grid = "q4_k" if wide else self.base
        elif kind == "iq3_m":
            grid = "q4_k"
        elif kind == "q3_k_m":
            grid = "q5_k" if index < 2 else "q4_k"
        elif kind == "q3_k_l":
            grid = "q5_k"
        elif kind in ("iq4_nl", "iq4_xs"):
            grid = "q5_k" if wide else self.base
        elif kind in ("q4_k_m", "q5_k_m"):
            grid = "q6_k" if _more_bits(index, self.values) else self.base
        elif kind == "q4_k_s":
            grid = "q5_k" if index < 4 else self.base
        return "q5_k" if self.large and grid in ("q3_k", "q4_k") else grid

    def _down(self, index: int) -> str:
        kind, layers, weighed = self.kind, self.mixture.layers, self.mixture.importance
        first = index < layers // 8
        if kind in _TINY:
            return ("iq3_s" if kind in _IQ2_LARGE else "q2_k") if first else self.base
        if kind in ("q2_k", "q3_k_l"):
            return {"q2_k": "q3_k", "q3_k_l": "q5_k"}[kind]
        if kind == "q3_k_m":
            return "q5_k" if index < layers // 16 else "q4_k"
        if kind in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _more_bits(index, layers) else self.base
        if kind == "iq3_xxs" and not weighed:
            return "q4_k" if first else "q3_k"
        if not first:
            return self.base
        if kind in ("iq4_nl", "iq4_xs"):
            return self.base if weighed else "q5_k"
        if kind in ("q4_0", "q5_0") and weighed:
            return {"q4_0": "q4_1", "q5_0": "q5_1"}[kind]
        return {"q2_k_s": "q4_k", "iq3_m": "q4_k", "q4_k_s": "q5_k"}.get(kind, self.base)
