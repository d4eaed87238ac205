"""Sequence-level distillation: before training, the teacher continues the beginnings of the texts.

The student then learns from the teacher's words as from any text (Kim and Rush, arXiv 1606.07947). They are written
once: a folder named by the hash of everything that decides them holds ``shard-00000.json`` and so on, each with its own
checksum and written whole or not at all, so that a killed run goes on with the next one, and a second student finds
them all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import ModelFolder
from ..errors import BadInput, Unsupported
from ..files import atomic_write, hash_json, read_json
from ..progress import Progress, silent
from ..recipe_teaching import SequenceConfig
from .batches import Examples
from .rollout import check_window, prompt_length
from .sampling import Writer

__all__ = ["check_sequence", "choose_examples", "write_texts"]

VERSION = 1
SHARD_ROWS = 256
# What a random number is for, beside those of rollout.py.
_WRITING, _CHOICE = 4, 5

Row = list[Any]


def check_sequence(settings: SequenceConfig | None, folder: ModelFolder, window: int) -> None:
    """Refuse what ``[distill.sequence]`` can't do, before anything is loaded; ``window``: tokens of a text at most."""
    if settings is None:
        return
    if folder.task != "text-generation":
        raise Unsupported(
            f"[distill.sequence] for {folder.task}: the teacher has to write texts, an encoder can't",
            hint="remove the section",
        )
    check_window(settings, "sequence", window)


def choose_examples(count: int, share: float, seed: int) -> list[int]:
    """Which of ``count`` examples the teacher continues: ``round(share * count)`` of them, ascending."""
    order = np.random.default_rng([seed, _CHOICE]).permutation(count)
    return sorted(order[: round(share * count)].tolist())


def write_texts(
    examples: Examples,
    settings: SequenceConfig,
    writer: Writer,
    *,
    seed: int,
    key: dict[str, Any],
    work: Path,
    progress: Progress = silent,
) -> Examples:
    """The examples with the chosen ones cut to a prompt and continued by ``writer``; their prompts are not learnt.

    ``key`` says what else decides the texts (the teachers, the ids that end a text). Raises
    :class:`~edgestill.errors.BadInput` when a teacher says NaN.
    """
    chosen = choose_examples(len(examples), settings.share, seed)
    chosen.sort(key=lambda number: len(examples.ids[number]))  # prompts of one length together: no padding
    known = {
        "version": VERSION, "shard_rows": SHARD_ROWS, "seed": seed, "texts": examples.digest(),
        "settings": settings.model_dump(mode="json"), **key,
    }  # fmt: skip
    folder = work / f"sequence-{hash_json(known)[:16]}"
    ids, prompts = list(examples.ids), list(examples.prompts or [0] * len(examples))
    for number, begin in enumerate(range(0, len(chosen), SHARD_ROWS)):
        part = chosen[begin : begin + SHARD_ROWS]
        path = folder / f"shard-{number:05d}.json"
        rows = _read(path, part)
        if rows is None:
            rows = []
            for start in range(0, len(part), settings.batch_size):
                progress("teacher writes texts", (begin + start) / len(chosen))
                rows += _write(part[start : start + settings.batch_size], examples, settings, writer, seed)
            atomic_write(path, json.dumps({"sha256": hash_json(rows), "rows": rows}) + "\n")
        for example, prompt, written in rows:
            ids[example] = (*examples.ids[example][:prompt], *written)
            prompts[example] = prompt
    return Examples(tuple(ids), examples.labels, tuple(prompts))


def _write(part: Sequence[int], examples: Examples, settings: SequenceConfig, writer: Writer, seed: int) -> list[Row]:
    lengths = [prompt_length(len(examples.ids[number]), settings.prompt_tokens) for number in part]
    found = writer.write(
        [examples.ids[number][:length] for number, length in zip(part, lengths, strict=True)],
        [(seed, _WRITING, number) for number in part],
    )
    return [[number, length, list(item.ids)] for number, length, item in zip(part, lengths, found, strict=True)]


def _read(path: Path, part: Sequence[int]) -> list[Row] | None:
    """The rows of a whole shard, or ``None`` where it has to be written (again)."""
    if not path.is_file():
        return None
    try:
        shard = read_json(path)
    except BadInput:
        return None
    rows = shard.get("rows") if isinstance(shard, dict) else None
    if not isinstance(rows, list) or shard.get("sha256") != hash_json(rows):
        return None
    return rows if [row[0] for row in rows] == list(part) else None
