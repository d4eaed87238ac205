"""Core ML's side of the allocation: tables of 4 to 256 values, codes with a scale a block or a row, or float16."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..coreml_grids import (
    Blocks,
    Mask,
    dequantise_blocks,
    dequantise_palette,
    holds_blocks,
    quantise_blocks,
    quantise_palette,
)
from ..grids import Affine
from ..progress import Progress
from ..quantisation_coreml import CoremlQuantisation, parse
from . import coreml, coreml_package
from .allocate_space import Chosen, Tensor, for_two_uses
from .compensate import DAMPING
from .coreml_compress import Coder, compressible, fitting
from .coreml_islands import describe
from .onnx_compensation import compensate
from .writer import Weights

if TYPE_CHECKING:
    from ..recipe import ExportConfig
    from .source import Source

__all__ = ["CoremlSpace"]

Floats = npt.NDArray[np.float32]

_FLOAT = "fp16"
# Rising in size. A table for 16 rows costs next to nothing beside the codes; codes in blocks are compensated.
_TYPES = ("pal2", "pal3", "pal4", "int4", "pal6", "int8", "int8-b32", _FLOAT)
_GROUP = 16
# Tables of a vocabulary keep one table: k-means for thousands of groups takes minutes.
_GROUPED_ROWS = 4096
_NEWEST = 18


class CoremlSpace:
    """The matrices of a model that its program multiplies by or looks up, for the system that ``config`` asks for, or
    iOS 18, which knows more types. It is converted once, its float32 islands measured on ``calibration``, and every
    size and the package are of that."""

    recipe = "coreml-1"
    how = "codes of 4 bits rounded with compensation"

    def __init__(self, source: Source, config: ExportConfig, calibration: Sequence[str], progress: Progress) -> None:
        model = source.folder
        asked = config.min_target or f"iOS{_NEWEST}"
        plain = config.model_copy(update={"to": f"coreml:{_FLOAT}", "name": config.variant, "min_target": asked})
        made = coreml.convert(source, plain, {}, progress, calibration)
        description = f"{model.task}, types chosen for {config.quantisation}, by edgestill"
        self._converted = dataclasses.replace(made, description=description)
        self._license = model.license
        self._tied = model.embeddings_path
        self._moments: Mapping[str, Floats] = {}
        able = compressible(made.program.get_spec())
        self._names = {tensor.stored: tensor.name for tensor in made.tensors if tensor.stored in able}
        weights = Weights(model.path)
        self.tensors = []
        for name in dict.fromkeys(self._names.values()):
            weight = weights[name]
            types = tuple(_able(weight, made.target.ios))
            self.tensors.append(Tensor(name, weight.shape, types))

    def learn(self, moments: Mapping[str, Floats]) -> None:
        """See :class:`.allocate_space.Space`."""
        self._moments = {
            name: for_two_uses(each, DAMPING) if name == self._tied else each for name, each in moments.items()
        }

    def size_bytes(self, tensor: Tensor, type_: str) -> int:
        """See :class:`.allocate_space.Space`: codes and scales or tables, once for each constant that holds them."""
        asked, (rows, columns) = parse(type_), tensor.shape
        values = -(-rows * columns * asked.bits // 8)
        if asked.palette:
            values += 2 * (rows // (asked.group or rows)) << asked.bits
        elif asked.coded:
            values += 2 * rows * (columns // (asked.block or columns))
        return values * sum(name == tensor.name for name in self._names.values())

    def decoded(self, tensor: Tensor, type_: str, weight: Floats) -> Floats:
        """See :class:`.allocate_space.Space`."""
        asked = parse(type_)
        half = np.asarray(weight, np.float16).astype(np.float32)  # what the converter makes of it first
        if not asked.coded:
            return half
        if asked.palette:
            found = dequantise_palette(quantise_palette(half, bits=asked.bits, group=asked.group))
        else:
            grid = _blocks(half, asked.bits, asked.block, self._moments.get(tensor.name))
            assert grid is not None  # such a type is not offered
            found = dequantise_blocks(grid)
        return np.asarray(found, np.float16).astype(np.float32)

    def whole_bytes(self, types: Mapping[str, str]) -> int:
        """See :class:`.allocate_space.Space`."""
        made = self._converted
        plan = coreml_package.plan_of(made.program, made.tensors, made.target.quantisation, types)
        return coreml_package.package_bytes(
            made.program, description=made.description, license=self._license, plan=plan
        )

    def chosen(self, types: Mapping[str, str], note: str) -> Chosen:
        """See :class:`.allocate_space.Space`. What is computed in float32 is told, as in any package."""
        coder = _Compensating({stored: self._moments.get(name) for stored, name in self._names.items()})
        note += describe(self._converted.islands)
        return Chosen(types, f"coreml:{_FLOAT}", note, {"converted": self._converted, "coder": coder})


def _able(weight: Floats, ios: int) -> Sequence[str]:
    """The types that hold ``weight`` as they are and that ``ios`` knows."""
    rows, columns = weight.shape
    found = []
    for name in _TYPES:
        asked = parse(name)
        if asked.palette and ios >= _NEWEST and rows <= _GROUPED_ROWS:
            group = fitting(rows, _GROUP)
            asked = parse(f"{name}-g{group}" if group else name)
        if asked.ios <= ios and _holds(weight, asked, columns):
            found.append(asked.name)
    return found


def _holds(weight: Floats, asked: CoremlQuantisation, columns: int) -> bool:
    if asked.palette or not asked.coded:
        return True
    return columns % (asked.block or columns) == 0 and holds_blocks(weight, bits=asked.bits, block=asked.block)


class _Compensating(Coder):
    """Codes in blocks that make up for each other's errors, by the moments of each constant's inputs."""

    def __init__(self, moments: Mapping[str, Floats | None]) -> None:
        self._moments = moments

    def blocks(self, name: str, weight: Floats, bits: int, block: int, mask: Mask | None) -> Blocks | None:
        """See :class:`.coreml_compress.Coder`."""
        return _blocks(weight, bits, block, self._moments.get(name))


def _blocks(weight: Floats, bits: int, block: int, moment: Floats | None) -> Blocks | None:
    """Codes of 8 bits lose too little to make up for."""
    grid = quantise_blocks(weight, bits=bits, block=block)
    if grid is None or moment is None or bits == 8:
        return grid
    middle = 1 << bits - 1
    scales = grid.scales.astype(np.float32)
    start = Affine(
        (grid.codes.astype(np.int16) + middle).astype(np.uint8), scales, np.full(scales.shape, middle, np.uint8), bits,
        block or weight.shape[1],
    )  # fmt: skip
    codes = compensate(weight, moment.astype(np.float64), start).codes.astype(np.int16) - middle
    return Blocks(codes.astype(np.int8), grid.scales)
