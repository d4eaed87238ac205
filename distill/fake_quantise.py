"""The grids that ship, in torch: weights to the nearest values that an artifact can hold, bit for bit.

Each function takes blocks ``tiles [n, width]`` float32 and gives the values that the format decodes (as
:mod:`edgestill.grids` does in numpy), and which weights lie beyond the last code. Scales follow from the weights, as
the format's own encoder finds them. So an encoder that meets such values again finds the same codes and scales, and
what was trained is what ships. Two things are done for that alone, and neither leaves the grid:

* scales of asymmetric integers are rounded to as few bits as their products need to be exact in float32;
* where both ends of an asymmetric block fall between two codes, the upper one takes the last code, not the one before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..artifact import StoredTensor
from ..errors import Unsupported
from ..grids import GGML_GRIDS

__all__ = ["FakeGrid", "fake_grid"]

Rounded = tuple[Tensor, Tensor | None]

# Elements quantised at a time: keeps the temporaries in the cache.
_CHUNK_ELEMENTS = 1 << 17
# The reciprocal of a smaller scale is no float32. Such a block is stored as zeros.
_TINY = 2.0**-126
_HALF_TYPES = {"float16": torch.float16, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FakeGrid:
    """One way to store a weight: ``block`` weights of a row share a scale (0: the whole row does). ``cuts``: a weight
    may lie beyond the last code of its block."""

    name: str
    block: int
    round: Callable[[Tensor], Rounded]
    cuts: bool = False

    @torch.no_grad()
    def quantise(self, weight: Tensor, out: Tensor, beyond: Tensor | None = None) -> None:
        """Write what an artifact would hold of ``weight [rows, …]`` float32 into ``out``.

        ``beyond`` (bool) is set where a weight lies more than half a step outside of the codes. A short last block is
        filled with zeros, as the formats do.
        """
        rows = weight.reshape(len(weight), -1) if weight.dim() > 1 else weight.reshape(1, -1)
        columns = rows.shape[1]
        width = self.block or columns
        missing = -columns % width
        target, mask = out.view(rows.shape), None if beyond is None else beyond.view(rows.shape)
        step = max(1, _CHUNK_ELEMENTS // columns)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            tiles = torch.nn.functional.pad(rows[part], (0, missing)) if missing else rows[part]
            values, outside = self.round(tiles.reshape(-1, width))
            target[part] = values.view(tiles.shape)[:, :columns]
            if mask is not None and outside is not None:
                mask[part] = outside.view(tiles.shape)[:, :columns]


def fake_grid(form: str, tensor: StoredTensor) -> FakeGrid:
    """The grid in which an artifact of the format ``form`` stores ``tensor``.

    Raises :class:`Unsupported` for one that is not trained through: those whose encoder searches for its scales would
    not find the trained ones again.
    """
    grid = tensor.grid
    if grid in ("float32", "f32"):
        return FakeGrid(grid, 0, _same)
    if grid in _HALF_TYPES:
        return FakeGrid(grid, 0, partial(_half, dtype=_HALF_TYPES[grid]))
    if form == "gguf" and grid in _GGML:
        return FakeGrid(grid, GGML_GRIDS[grid].elements, _GGML[grid], cuts=grid in ("q4_0", "q5_0"))
    if form == "onnx" and (found := re.fullmatch(r"int([48])-b(\d+)", grid)):
        bits, block = int(found[1]), int(found[2])
        kind = _asymmetric if tensor.zero_points else _symmetric
        return FakeGrid(grid, block, partial(kind, bits=bits), cuts=not tensor.zero_points)
    if form == "coreml" and grid == "int8-channel":
        return FakeGrid(grid, 0, _coreml_int8)
    raise Unsupported(
        f"[distill.quantized] {tensor.name} ships as {form} {grid}, which a student can't be trained through",
        hint="use onnx:int4, onnx:int8, gguf:q4_0, gguf:q8_0 or coreml:int8",
    )


def _same(tiles: Tensor) -> Rounded:
    return tiles, None


def _half(tiles: Tensor, dtype: torch.dtype) -> Rounded:
    return tiles.to(dtype).float(), None


def _extreme(tiles: Tensor) -> Tensor:
    """The value of largest magnitude of each block, the first of several ``[n, 1]``."""
    low, high = tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    both = ((-low == high) & (high != 0)).squeeze(1)
    if bool(both.any()):
        twins = tiles[both]
        extreme[both] = twins.gather(1, twins.abs().argmax(1, keepdim=True))
    return extreme


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale``, 0 where there is no such number."""
    return torch.where(scale.abs() < _TINY, 0.0, 1 / scale)


def _symmetric(tiles: Tensor, bits: int) -> Rounded:
    """``quantise_affine(symmetric=True)``: the extreme takes the code of largest magnitude."""
    zero = 1 << (bits - 1)
    scale = _extreme(tiles) / -zero
    steps = tiles * _inverse(scale)
    codes = steps.round().clamp_(-zero, zero - 1)
    return codes * scale, steps > zero - 0.5


def _asymmetric(tiles: Tensor, bits: int) -> Rounded:
    """``quantise_affine(symmetric=False)``, with a scale that is found again."""
    top = (1 << bits) - 1
    low, high = tiles.amin(1, keepdim=True).clamp_(max=0), tiles.amax(1, keepdim=True).clamp_(min=0)
    scale = (high - low) / top
    inverse = _inverse(scale)
    zero = (-low * inverse).round_().clamp_(0, top)
    codes = (tiles * inverse).round_().add_(zero).clamp_(0, top)
    short = (codes.amax(1, keepdim=True) < top) & (zero < top) & (inverse != 0)
    if bool(short.any()):
        codes = torch.where(short & (tiles == high), float(top), codes)
    return codes.sub_(zero) * _shorten(scale, bits), None


def _shorten(scale: Tensor, bits: int) -> Tensor:
    """``scale`` rounded so that its product with any number of ``bits`` bits is exact in float32."""
    whole = scale.view(torch.int32)
    return ((whole + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)


def _q4_0(tiles: Tensor, half: int = 8) -> Rounded:
    """``quantize_row_q4_0_ref`` of ggml-quants.c, and with ``half`` 16 that of q5_0."""
    scale = _extreme(tiles) / -half
    steps = tiles * _inverse(scale)
    codes = (steps + (half + 0.5)).trunc_().clamp_(max=2 * half - 1)
    return (codes - half) * scale.half().float(), steps > half - 0.5


def _q4_1(tiles: Tensor, top: int = 15) -> Rounded:
    """``quantize_row_q4_1_ref``, and with ``top`` 31 that of q5_1."""
    low, high = tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)
    scale = (high - low) / top
    codes = ((tiles - low) * _inverse(scale) + 0.5).trunc_().clamp_(max=top)
    return codes * scale.half().float() + low.half().float(), None


def _q8_0(tiles: Tensor) -> Rounded:
    """``quantize_row_q8_0_ref``: halves are rounded away from zero, as C's ``roundf`` does."""
    scale = tiles.abs().amax(1, keepdim=True) / 127
    steps = tiles * _inverse(scale)
    codes = steps.trunc()
    codes += torch.where((steps - codes).abs() >= 0.5, steps.sign(), 0.0)
    return codes * scale.half().float(), None


def _coreml_int8(tiles: Tensor) -> Rounded:
    """``quantise_blocks(bits=8)`` of :mod:`edgestill.coreml_grids` on float16 weights, as a program in float16 decodes
    it: each product is rounded to float16."""
    tiles = tiles.half().float()
    wanted = tiles.abs().amax(1, keepdim=True) / 127
    scale = wanted.half()
    up = (scale.view(torch.int16) + 1).view(torch.float16)  # the next float16; scales are not negative
    scale = torch.where(scale.float() < wanted, up, scale)
    below = (scale.view(torch.int16) - 1).clamp(min=0).view(torch.float16)
    values, lower = _coreml_values(tiles, scale), _coreml_values(tiles, below)
    return torch.where((lower == tiles).all(1, keepdim=True), lower, values), None


def _coreml_values(tiles: Tensor, scale: Tensor) -> Tensor:
    wide = scale.float()
    inverse = torch.where(wide != 0, 1 / wide, 0.0)
    codes = (tiles * inverse).round_().clamp_(-128, 127)
    return (codes * wide).half().float()


_GGML: dict[str, Callable[[Tensor], Rounded]] = {
    "q4_0": _q4_0, "q5_0": partial(_q4_0, half=16), "q4_1": _q4_1, "q5_1": partial(_q4_1, top=31), "q8_0": _q8_0,
}  # fmt: skip
