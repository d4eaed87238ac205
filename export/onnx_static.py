"""Static int8: on which grid each product's input is rounded, and which products stay in 8-bit blocks.

Nothing of it is a list. On calibration text, in torch: what goes into each product gives its grid (:func:`fit_grid`);
each product's cost is the divergence from the float model when it alone is rounded, weights and input; and those that
cost most for their size stay in blocks until the whole model, on dev text, loses less than :data:`MOST_LOSS`. Costs and
grids are kept as JSON and used again, as those of :mod:`.sensitivity` are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..bench.sample_text import SAMPLE_TEXT
from ..errors import BadInput
from ..files import atomic_write, hash_json, read_json
from ..grids import InputGrid, dequantise_affine, quantise_affine
from ..progress import Progress, silent
from .onnx_inputs import Seen, fit_grid, products_of, watch_inputs
from .sensitivity import Ruler, ruler_of

if TYPE_CHECKING:
    from .source import Source

__all__ = ["MOST_LOSS", "ON_COSTS", "ON_DEV", "ON_GRIDS", "Product", "StaticPlan", "affordable", "choose_kept",
           "plan_static"]  # fmt: skip

Floats = npt.NDArray[np.float32]

SCHEMA_VERSION = 1
BITS = 7  # of a weight: 255 * 64 * 2 fits into 16 bits, so that no processor's pairs of products overflow
MOST_LOSS = {"feature-extraction": 2e-3}
"""1 - cosine of embeddings; nats of everything else are :data:`_MOST_NATS`."""
_MOST_NATS = 0.05
_KEPT_AS = "int8"
# How much text (tokens of text generation, texts of other tasks) ranges, costs and the choice are taken on.
ON_GRIDS, ON_COSTS, ON_DEV = (4096, 64), (512, 16), (1024, 48)
_MOST_WORK = 4e12  # floating-point operations for all costs: minutes on one core; more of it takes fewer tokens
_LEAST_TOKENS = 128


@dataclass(frozen=True)
class Product:
    """Matrices that are multiplied with one input: its ``grid``, what went in (``low`` to ``high``), how many
    ``weights`` they have, and the divergence (nats a token, or 1 - cosine) of rounding them alone."""

    parameters: tuple[str, ...]
    grid: InputGrid
    low: float
    high: float
    weights: int
    loss: float


@dataclass(frozen=True)
class StaticPlan:
    """What the writer is told: a grid per parameter, the type of those that stay in blocks, and a note of how it came
    about for ``contents``."""

    grids: Mapping[str, InputGrid]
    types: Mapping[str, str]
    note: str


def plan_static(
    source: Source, *, calibration: Sequence[str] = (), dev: Sequence[str] = (), work: Path | None = None,
    progress: Progress = silent,
) -> StaticPlan:  # fmt: skip
    """Measure ``source`` on ``calibration`` text and choose on ``dev`` text; ``work`` keeps what was measured.

    Without texts a few built-in sentences stand in, which the note says. Raises :class:`BadInput` for texts without a
    token, :class:`MissingDependency` without torch.
    """
    built_in = not calibration or not dev
    calibration = list(calibration) or list(SAMPLE_TEXT[::2])
    dev = list(dev) or list(SAMPLE_TEXT[1::2])
    task = source.folder.task
    module, root = source.torch()
    parts, tied = products_of(root)
    products = _products(source, module, parts, calibration, work, progress)
    judge = ruler_of(source, dev, *ON_DEV)
    limit = MOST_LOSS.get(task, _MOST_NATS)
    progress("choosing what stays in blocks", 0.9)
    kept, loss = choose_kept(products, lambda rest: _rounded(judge, parts, rest), limit)
    unit = "1 - cosine" if task == "feature-extraction" else "nats"
    inside = [product for product in products if product not in kept]
    note = (
        f"{len(kept)} of {len(products)} products kept in blocks by measurement ({loss:.2g} {unit} on dev text for the "
        f"{len(inside)} static ones)" + ("; calibrated on built-in sentences" if built_in else "")
    )
    types = {name: _KEPT_AS for product in kept for name in product.parameters}
    types |= dict.fromkeys(tied, _KEPT_AS)  # stored once, as the embedding is
    return StaticPlan({name: product.grid for product in inside for name in product.parameters}, types, note)


def choose_kept(
    products: Sequence[Product], judge: Callable[[Sequence[Product]], float], limit: float
) -> tuple[list[Product], float]:
    """The fewest products to keep so that the rest lose ``limit`` at most by ``judge``, and what the rest lose.

    They are kept in the order of what they cost for their size: the larger one is, the more time it saves.
    """
    order = sorted(products, key=lambda product: -product.loss / max(1, product.weights))
    known: dict[int, float] = {len(order): 0.0}
    low, high = 0, len(order)
    while low < high:  # the fewer are rounded, the less is lost
        middle = (low + high) // 2
        known[middle] = judge(order[middle:])
        low, high = (low, middle) if known[middle] <= limit else (middle + 1, high)
    return order[:high], known[high]


def _products(
    source: Source, module: Any, parts: Mapping[str, Any], calibration: Sequence[str], work: Path | None,
    progress: Progress,
) -> list[Product]:  # fmt: skip
    """Measured now, or read from ``work`` where the same question was answered before."""
    key = {
        "schema_version": SCHEMA_VERSION, "format": "onnx:int8-static", "bits": BITS, "model_id": source.model_id,
        "text_sha256": hash_json(list(calibration)),
    }  # fmt: skip
    file = None if work is None else work / f"static-{hash_json(key)[:16]}.json"
    if file is not None and file.is_file():
        with contextlib.suppress(BadInput, KeyError, TypeError):
            return [_read(row) for row in read_json(file)["products"]]
    seen = watch_inputs(module, parts, source.inputs(calibration, *ON_GRIDS), progress)
    found = [_fitted(one, parts, source.folder.turned) for one in seen]
    weights = sum(product.weights for product in found)
    ruler = ruler_of(source, calibration, *affordable(weights, len(found)))
    for index, product in enumerate(found):
        progress(f"what rounding costs: {product.parameters[0]}", index / len(found))
        found[index] = replace(product, loss=_rounded(ruler, parts, [product]))
    if file is not None:
        atomic_write(file, json.dumps({**key, "products": [_row(product) for product in found]}, indent=1) + "\n")
    return found


def affordable(weights: int, products: int) -> tuple[int, int]:
    """Of :data:`ON_COSTS`, what so many products with so many weights are measured on: of large models, less."""
    tokens, texts = ON_COSTS
    fewer = max(_LEAST_TOKENS, min(tokens, int(_MOST_WORK / (2.0 * max(1, weights) * max(1, products)))))
    return fewer, max(1, texts * fewer // tokens)


def _fitted(seen: Seen, parts: Mapping[str, Any], turned: Collection[str]) -> Product:
    weights = {name: parts[name].weight.detach().numpy() for name in seen.parameters}
    columns = [np.square(weight).sum(axis=1 if name in turned else 0) for name, weight in weights.items()]
    grid = fit_grid(seen.rows, seen.low, seen.high, np.sum(columns, axis=0))
    count = sum(weight.size for weight in weights.values())
    return Product(tuple(seen.parameters), grid, seen.low, seen.high, count, 0.0)


def _rounded(ruler: Ruler, parts: Mapping[str, Any], products: Sequence[Product]) -> float:
    """Divergence with these products computed as the artifact will, the rest in float."""
    changed, hooks = {}, []
    for product in products:
        for name in product.parameters:
            weight = np.ascontiguousarray(ruler.weight(name), np.float32)
            changed[name] = dequantise_affine(quantise_affine(weight, bits=BITS))
            hooks.append(parts[name].register_forward_pre_hook(_rounding(product.grid)))
    try:
        return ruler.distance(changed) if changed else 0.0
    finally:
        for hook in hooks:
            hook.remove()


def _rounding(grid: InputGrid) -> Callable[..., Any]:
    import torch

    return lambda _, given: (torch.from_numpy(grid.rounded(given[0].numpy())), *given[1:])


def _row(product: Product) -> dict[str, Any]:
    return {**vars(product), "grid": {"scale": float(product.grid.scale), "zero_point": product.grid.zero_point}}


def _read(row: Mapping[str, Any]) -> Product:
    grid = InputGrid(np.float32(row["grid"]["scale"]), int(row["grid"]["zero_point"]))
    return Product(**{**row, "grid": grid, "parameters": tuple(row["parameters"])})
