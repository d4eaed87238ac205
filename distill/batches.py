"""From texts to batches: token ids, a deterministic order, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..artifact import Task
from ..data_labels import NO_LABEL
from ..files import hash_json

__all__ = ["LEARN_GIVEN", "LEARN_OWN", "Batch", "Examples", "collate", "encode", "plan_batches"]

Batch = dict[str, Tensor]

# Examples of so many optimiser steps are sorted by length together: little padding, still well mixed.
SORT_STEPS = 50
# What a batch's `learn` says of a token: 0 a prompt, not learnt; given by the text or a teacher; or the student's own
# word, on which only a teacher's opinion counts (cross-entropy on it would make the student repeat itself).
LEARN_GIVEN, LEARN_OWN = 1, 2


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Any]]):
    """Token ids of the examples, with class labels where they are known (-100: not).

    ``prompts``: how many tokens at the beginning of each example are not learnt; empty: none anywhere. ``tags``: a
    label for each token of each example (-100: none), nothing for an example without any; empty: none anywhere.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    tags: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index, "ids": self.ids[index], "label": self.labels[index]}
        if self.tags:
            row["tags"] = self.tags[index]
        return {**row, "prompt": self.prompts[index]} if self.prompts else row

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each example."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def digest(self) -> str:
        """sha256 of the content."""
        further = [part for part in (self.prompts, self.tags) if part]
        return hash_json([self.ids, self.labels, *further])


def encode(
    texts: Sequence[str],
    tokenizer: Any,
    task: Task,
    max_length: int,
    *,
    prefix: str = "",
    labels: Sequence[int] = (),
    tags: Sequence[tuple[int, ...]] = (),
) -> Examples:
    """Tokenise ``texts`` (with ``prefix`` before each) to at most ``max_length`` tokens.

    For text-generation a longer text becomes several examples, and one of a single token none: it has nothing to
    predict. For the other tasks a longer text is cut. ``labels`` are of texts, ``tags`` of their tokens
    (:func:`~edgestill.data_labels.tag_tokens`; ``()`` for a text without).
    """
    generation = task == "text-generation"
    found: list[tuple[int, ...]] = []
    kept_labels: list[int] = []
    kept_tags: list[tuple[int, ...]] = []
    known = list(labels) or [NO_LABEL] * len(texts)
    for begin in range(0, len(texts), 1024):
        part = [prefix + text for text in texts[begin : begin + 1024]]
        limits = {} if generation else {"truncation": True, "max_length": max_length}
        rows = tokenizer(part, padding=False, return_attention_mask=False, verbose=False, **limits)["input_ids"]
        for number, (row, label) in enumerate(zip(rows, known[begin : begin + 1024], strict=True), start=begin):
            windows = [row[at : at + max_length] for at in range(0, len(row), max_length)] if generation else [row]
            for window in windows:
                if len(window) > (1 if generation else 0):
                    found.append(tuple(window))
                    kept_labels.append(label)
                    kept_tags += [tags[number]] if tags else []
    return Examples(tuple(found), tuple(kept_labels), tags=tuple(kept_tags))


def plan_batches(
    lengths: Sequence[int] | np.ndarray[Any, Any], batch_size: int, accumulation: int, steps: int, seed: int
) -> list[list[int]]:
    """The example numbers of each forward pass: ``steps * accumulation`` lists of ``batch_size``.

    Endless shuffled epochs, cut into blocks of some optimiser steps that are sorted by length, whose steps are
    shuffled again. It depends on ``batch_size * accumulation`` only, so that 1 x 8 and 8 x 1 see the same steps.
    """
    group = batch_size * accumulation
    lengths = np.asarray(lengths)
    waiting = np.empty(0, dtype=np.int64)
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps * accumulation:
        wanted = group * min(SORT_STEPS, steps - len(plan) // accumulation)
        while len(waiting) < wanted:
            fresh = np.random.default_rng([seed, epoch]).permutation(len(lengths))
            waiting = np.concatenate([waiting, fresh])
            epoch += 1
        block, waiting = waiting[:wanted], waiting[wanted:]
        block = block[np.argsort(lengths[block], kind="stable")].reshape(-1, group)
        order = np.random.default_rng([seed, epoch, len(plan)]).permutation(len(block))
        for row in block[order]:
            plan += [part.tolist() for part in row.reshape(accumulation, batch_size)]
    return plan


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """Pad on the right to the longest row. The mask says which tokens are real, by length and never by id.

    Rows with a ``prompt`` (tokens at the beginning that are not learnt) give the batch a mask ``learn`` [B, T]; rows
    with ``tags`` have a ``label`` for each token [B, T] instead of one for each row [B].
    """
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["ids"])] = torch.tensor(row["ids"], dtype=torch.long)
        mask[number, : len(row["ids"])] = 1
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "index": torch.tensor([row["index"] for row in rows], dtype=torch.long),
        "label": torch.tensor([row["label"] for row in rows], dtype=torch.long),
    }
    if "tags" in rows[0]:
        batch["label"] = torch.full((len(rows), longest), NO_LABEL, dtype=torch.long)
        for number, row in enumerate(rows):
            batch["label"][number, : len(row["tags"])] = torch.tensor(row["tags"], dtype=torch.long)
    if "their_ids" in rows[0]:  # the same text in the tokens of a teacher with another vocabulary
        widest = max(len(row["their_ids"]) for row in rows)
        batch["their_ids"] = torch.zeros((len(rows), widest), dtype=torch.long)
        batch["their_mask"] = torch.zeros((len(rows), widest), dtype=torch.long)
        batch["aligned"] = torch.full((len(rows), longest), -1, dtype=torch.long)
        for number, row in enumerate(rows):
            batch["their_ids"][number, : len(row["their_ids"])] = torch.tensor(row["their_ids"], dtype=torch.long)
            batch["their_mask"][number, : len(row["their_ids"])] = 1
            batch["aligned"][number, : len(row["aligned"])] = torch.tensor(row["aligned"], dtype=torch.long)
    if any("prompt" in row for row in rows):
        batch["learn"] = mask * LEARN_GIVEN
        for number, row in enumerate(rows):
            batch["learn"][number, : row.get("prompt", 0)] = 0
    return batch
