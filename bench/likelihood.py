"""How likely a worker's model finds continuations of contexts: what multiple choice, cloze and lm-eval are made of."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..progress import Progress, silent
from ..runtimes.session import SessionInfo

__all__ = ["Likelihood", "Scorer", "likelihoods", "write_question"]

_CHUNK = 64  # pairs that are asked together: between two, progress is told


class Scorer(Protocol):
    """What is needed of a worker (:class:`edgestill.runtimes.transports.client.WorkerClient`)."""

    def info(self) -> SessionInfo:
        """Who runs the model."""
        ...

    def score(self, reference: Path, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
        """See :func:`edgestill.runtimes.scoring.score`."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """``logprob``: of the whole continuation, in nats; ``tokens`` it has; whether greedy decoding would write it."""

    logprob: float
    tokens: int
    greedy: bool


def likelihoods(
    worker: Scorer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Likelihood]:
    """The likelihood of each ``(context, continuation)``, token ids, in the order given.

    A context that is too long loses its beginning, so that the model is fed ``max_length`` tokens at most (default:
    what it takes); the last token of a continuation is not fed. Pairs run longest first, so that each batch holds rows
    of about one length. Raises :class:`BadInput` for an empty side or a continuation longer than the model takes.
    """
    room = min(max_length or worker.info().max_length, worker.info().max_length)
    rows: list[tuple[list[int], int]] = []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise BadInput(f"pair {number}: {len(context)} context tokens, {len(continuation)} to predict",
                           hint="at least one of each")  # fmt: skip
        if len(continuation) > room:
            raise BadInput(f"pair {number}: a continuation of {len(continuation)} tokens, the model takes {room}",
                           hint="shorten it, or cut the text into windows")  # fmt: skip
        row = [*context, *continuation][-(room + 1) :]
        rows.append((row, len(row) - len(continuation)))
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    found: dict[int, Likelihood] = {}
    for first in range(0, len(order), _CHUNK):
        asked = order[first : first + _CHUNK]
        with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
            folder = write_question(Path(scratch) / "question", [rows[index] for index in asked])
            scores = worker.score(folder, batch_size)
        for place, index in enumerate(asked):
            mine = scores["window"] == place
            logprob = scores["logprob"][mine]
            found[index] = Likelihood(float(logprob.sum()), len(logprob), bool(scores["right"][mine].all()))
        progress("likelihoods", (first + len(asked)) / len(order))
    return [found[index] for index in range(len(rows))]


def write_question(folder: Path, rows: Sequence[tuple[Sequence[int], int]]) -> Path:
    """Write a folder for :func:`edgestill.runtimes.likelihood.score_likelihood`: token ids and where the continuation
    starts."""
    folder.mkdir()
    longest = max(len(ids) for ids, _ in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for index, (row, _) in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    np.save(folder / "ids.npy", ids)
    np.save(folder / "mask.npy", mask)
    np.save(folder / "starts.npy", np.array([start for _, start in rows], np.int64))
    described = {"task": "text-generation", "likelihood": True}
    (folder / "reference.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    return folder
