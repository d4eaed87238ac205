"""Which of the teacher's layers each of the student's layers imitates.

By rule: the layer that it was copied from, evenly spread, or the last ones (PKD, arXiv 1908.09355). By name: a list in
the recipe. Or learned: the layers whose states are most alike by linear CKA (arXiv 1905.00414) on training texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .anatomy import base_model, blocks
from .batches import Examples, collate
from .hooks import BlockOutputs

__all__ = ["learn_layer_map", "linear_cka", "map_layers", "match_layers"]

CKA_TOKENS = 1024
_BATCH = 16


def map_layers(how: str | Sequence[int], keep: Sequence[int], total: int) -> tuple[int, ...]:
    """The map by rule or by name, for a student made of the layers ``keep`` of ``total``.

    >>> map_layers("kept", (0, 2, 5), 6), map_layers("skip", (0, 2, 5), 6), map_layers("last", (0, 2, 5), 6)
    ((0, 2, 5), (1, 3, 5), (3, 4, 5))
    >>> map_layers([0, 3, 3], (0, 2, 5), 6)
    (0, 3, 3)

    Raises :class:`RecipeError` for a list of another length than the student has layers, or of layers that the teacher
    does not have.
    """
    count = len(keep)
    if not isinstance(how, str):
        if len(how) != count:
            raise RecipeError(
                f"[distill] layer_map names {len(how)} layers, the student has {count}",
                hint="name a layer of the teacher for each of the student's",
            )
        strange = next((layer for layer in how if not 0 <= layer < total), None)
        if strange is not None:
            raise RecipeError(
                f"[distill] layer_map names layer {strange}, the teacher has layers 0 to {total - 1}",
                hint="name layers that it has, counted from 0",
            )
        return tuple(how)
    if how == "kept":
        return tuple(keep)
    if how == "skip":
        return tuple((index + 1) * total // count - 1 for index in range(count))
    if how == "last":
        return tuple(range(total - count, total))
    raise RecipeError(f"unknown layer_map {how!r}", hint="known: kept, skip, last, cka, or a list of layers")


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of the states ``[N, D]`` and ``[N, D']`` of the same N tokens, 0 to 1.

    ``|Yᵀ X|² / (|Xᵀ X| |Yᵀ Y|)`` with centred columns and Frobenius norms: 1 where one is a rotation and scaling of
    the other. States that don't vary at all are like nothing: 0.
    """
    return _alignment(_gram(first), _gram(second))


def _gram(states: Tensor) -> Tensor:
    """Centred inner products [N, N], which hold all that CKA asks, for any width."""
    wide = states.double()
    wide = wide - wide.mean(0, keepdim=True)
    return wide @ wide.T


def _alignment(first: Tensor, second: Tensor) -> float:
    size = float(first.norm() * second.norm())
    return float((first * second).sum()) / size if size > 0 else 0.0


def match_layers(likeness: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Strictly ascending columns, one for each row, of the highest total ``likeness`` ([S][T] with S <= T).

    Dynamic programming over rows; of equal totals the lower layers win.

    >>> match_layers([[0.9, 0.8, 0.1], [0.95, 0.7, 0.6]])
    (0, 1)
    """
    rows, columns = len(likeness), len(likeness[0])
    if rows > columns:
        raise RecipeError(
            f"{rows} layers can't each imitate another of {columns}", hint="use layer_map = a list, which may repeat"
        )
    best: list[list[tuple[float, tuple[int, ...]]]] = []
    for row in range(rows):
        line: list[tuple[float, tuple[int, ...]]] = []
        for column in range(columns):
            before = best[row - 1][:column] if row else [(0.0, ())]
            total, chosen = max(before, key=lambda item: item[0], default=(float("-inf"), ()))
            line.append((total + likeness[row][column], (*chosen, column)))
        best.append(line)
    return max(best[-1], key=lambda item: item[0])[1]


def learn_layer_map(student: nn.Module, teacher: nn.Module, examples: Examples, pad_id: int = 0) -> tuple[int, ...]:
    """The ascending map of the highest total linear CKA between the untrained student's and the teacher's layers.

    Over the first real tokens of ``examples``, at most :data:`CKA_TOKENS`; both models are on one device. Holds one
    ``[N, N]`` matrix for each layer of either.
    """
    ours, theirs = (_grams(model, examples, pad_id) for model in (student, teacher))
    return match_layers([[_alignment(mine, other) for other in theirs] for mine in ours])


def _grams(model: nn.Module, examples: Examples, pad_id: int) -> list[Tensor]:
    outputs = BlockOutputs(model, range(len(blocks(model))))
    device = next(model.parameters()).device
    found: list[list[Tensor]] = []
    tokens = 0
    try:
        for begin in range(0, len(examples), _BATCH):
            rows = [examples[row] for row in range(begin, min(begin + _BATCH, len(examples)))]
            batch = collate(rows, pad_id)
            mask = batch["attention_mask"].to(device)
            with torch.inference_mode():
                base_model(model)(input_ids=batch["input_ids"].to(device), attention_mask=mask)
                found.append([state[mask.bool()].cpu() for state in outputs.take()])
            tokens += int(mask.sum())
            if tokens >= CKA_TOKENS:
                break
    finally:
        outputs.remove()
    return [_gram(torch.cat([part[layer] for part in found])[:CKA_TOKENS]) for layer in range(len(found[0]))]
