"""A model in a given number of bytes: which tensor gets which type, by what each is measured to cost.

1. The moments of what goes into each product, on calibration text (:mod:`.moments`).
2. What each tensor costs in each type (:mod:`.sensitivity`), kept as JSON and used again for other budgets.
3. The types with the least sum of costs that fit, exactly (:mod:`.allocate_choice`).
4. Costs do not quite add up, so choices by sharper and by flatter costs are made too, and all are judged as whole
   models on dev text; the best one is written. The test text is never seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..bench.sample_text import SAMPLE_TEXT
from ..errors import Unsupported, UsageError
from ..files import hash_json
from ..progress import Progress, silent
from .allocate_choice import Option, choose, largest, smallest
from .allocate_space import Chosen, Space
from .sensitivity import Ruler, Sensitivities, ruler_of, sensitivities

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..quantisation import Budget
    from ..recipe import ExportConfig
    from .source import Source

__all__ = ["ON_COSTS", "ON_DEV", "ON_MOMENTS", "POWERS", "Allocation", "allocate", "pick"]

Floats = npt.NDArray[np.float32]

# How much text (tokens of text generation, texts of other tasks) the moments, the cost of one tensor and the choice
# between whole models are taken on.
ON_MOMENTS, ON_COSTS, ON_DEV = (6144, 256), (512, 32), (1024, 64)
# Costs to these powers: as measured, flatter (errors that come together hide each other), sharper.
POWERS = (1.0, 0.8, 1.25)


@dataclass(frozen=True)
class Allocation:
    """The types of a model that is to take ``size_bytes``: their predicted divergence (the sum of all costs) and that
    of the whole model on dev text, in nats a token (1 − cosine for embeddings)."""

    types: Mapping[str, str]
    size_bytes: int
    predicted: float
    on_dev: float


def allocate(
    source: Source,
    config: ExportConfig,
    budget: Budget,
    *,
    calibration: Sequence[str],
    dev: Sequence[str],
    work: Path | None = None,
    progress: Progress = silent,
) -> Chosen:
    """What the writer of ``config.format`` is told so that the model of ``source`` takes at most ``budget``.

    Without ``calibration`` or ``dev`` texts a few built-in sentences stand in, which ``contents`` says. ``work`` keeps
    the sensitivities. Raises :class:`UsageError` with the smallest possible size when the budget is too small, and
    :class:`Unsupported` for a format whose writer takes no types.
    """
    given, built_in = calibration, not calibration or not dev
    calibration = list(calibration) or list(SAMPLE_TEXT[::2])
    dev = list(dev) or list(SAMPLE_TEXT[1::2])
    with source.keeping():  # one load for a conversion to Core ML and for what comes after it
        # What can't be done is found before the work that takes minutes.
        space = _space(source, config, given, progress)
        if not space.tensors:
            raise Unsupported(
                f"{budget.to}: no tensor has rows that a quantised type can take",
                hint="export to gguf:f16" if config.format == "gguf" else f"export to {config.format}:fp16",
            )
        room = _room(space, budget)
        moments = source.moments(calibration, *ON_MOMENTS, progress=progress)
        space.learn(moments)
        costs = sensitivities(
            work, {"model_id": source.model_id, "format": config.format, "text_sha256": hash_json(calibration)}, space,
            lambda: ruler_of(source, calibration, *ON_COSTS), moments, progress,
        )  # fmt: skip
        judge = ruler_of(source, dev, *ON_DEV)
        found = pick(
            costs, room, lambda types: judge.distance(_decoded(space, judge, types)), progress,
            lambda types: space.whole_bytes(types) - budget.budget_bytes,
        )  # fmt: skip
    note = _note(source.folder, budget, found, costs, room, built_in, space.how)
    return space.chosen(found.types, note)


def _space(source: Source, config: ExportConfig, calibration: Sequence[str], progress: Progress) -> Space:
    if config.format == "gguf":
        from .allocate_gguf import GgufSpace

        return GgufSpace(source, config)
    if config.format == "onnx":
        from .allocate_onnx import OnnxSpace

        return OnnxSpace(source.folder, config)
    from .allocate_coreml import CoremlSpace

    return CoremlSpace(source, config, calibration, progress)


def _room(space: Space, budget: Budget) -> int:
    """Bytes for the values of tensors: what the smallest types leave of the budget, and their own."""
    sizes = {
        tensor.name: {type_: space.size_bytes(tensor, type_) for type_ in tensor.types} for tensor in space.tensors
    }
    least = {name: min(each, key=each.__getitem__) for name, each in sizes.items()}
    size = space.whole_bytes(least)
    if size > budget.budget_bytes:
        raise UsageError(
            f"{budget.to} is too small: with the smallest types this model takes {size / 1e6:.2f} MB",
            hint=f"{budget.format}@{-(-size // 10**5) / 10:g}MB or more, or a smaller student",
        )
    return budget.budget_bytes - size + sum(sizes[name][type_] for name, type_ in least.items())


def _choose(
    options: Mapping[str, Sequence[Option]], room: int, over: Callable[[Mapping[str, str]], int]
) -> Mapping[str, Option]:
    """The best choice that fits: what stands between the values of tensors depends on their types too, a little."""
    least = smallest(options)
    while True:
        choice = choose(options, room)
        excess = over({name: option.type for name, option in choice.items()})
        if excess <= 0 or room <= least:
            return choice
        room = max(least, min(room, sum(option.size_bytes for option in choice.values())) - excess)


def pick(
    costs: Sensitivities,
    room: int,
    judge: Callable[[Mapping[str, str]], float],
    progress: Progress = silent,
    over: Callable[[Mapping[str, str]], int] = lambda types: 0,
) -> Allocation:
    """The best of a few choices that fit into ``room`` bytes, by ``judge``, which tells how far a model is off.
    ``over`` tells by how many bytes a whole file of these types is too large."""
    tried: dict[tuple[str, ...], Allocation] = {}
    for number, power in enumerate(POWERS):
        options = {
            name: [Option(type_, cost.size_bytes, cost.loss**power) for type_, cost in each.items()]
            for name, each in costs.items()
        }
        choice = _choose(options, room, over)
        types = {name: option.type for name, option in choice.items()}
        key = tuple(types.values())
        if key in tried:
            continue
        progress("choosing the types", number / len(POWERS))
        tried[key] = Allocation(
            types,
            sum(option.size_bytes for option in choice.values()),
            sum(costs[name][type_].loss for name, type_ in types.items()),
            0.0,
        )
    if len(tried) > 1 or room < largest(_options(costs)):
        tried = {key: replace(one, on_dev=judge(one.types)) for key, one in tried.items()}
    return min(tried.values(), key=lambda one: (one.on_dev, one.size_bytes))


def _options(costs: Sensitivities) -> dict[str, list[Option]]:
    return {
        name: [Option(type_, cost.size_bytes, cost.loss) for type_, cost in each.items()]
        for name, each in costs.items()
    }


def _decoded(space: Space, ruler: Ruler, types: Mapping[str, str]) -> dict[str, Floats]:
    tensors = {tensor.name: tensor for tensor in space.tensors}
    return {name: space.decoded(tensors[name], type_, ruler.weight(name).copy()) for name, type_ in types.items()}


def _note(
    model: ModelFolder, budget: Budget, found: Allocation, costs: Sensitivities, room: int, built_in: bool, how: str
) -> str:
    """``"60MB budget: 30 q5_0, 12 iq4_nl of 42 matrices, chosen by …"``."""
    counts = Counter(found.types.values())
    unit = "1 - cosine" if model.task == "feature-extraction" else "nats"
    listed = ", ".join(
        f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    note = f"{budget.name} budget: {listed} of {len(found.types)} matrices, {how}"
    if found.size_bytes >= largest(_options(costs)) and room >= found.size_bytes:
        note += "; the budget is larger than the best types need"
    else:
        note += f"; {found.on_dev:.2g} {unit} on dev text ({found.predicted:.2g} predicted)"
    return note + ("; calibrated on built-in sentences" if built_in else "")
