"""How likely a model finds given continuations, reduced on the session's side to a few numbers a token. Numpy only.

The question is a folder, as for :mod:`edgestill.runtimes.scoring`, of a model that says nothing itself:
``reference.json`` (``{"task": "text-generation", "likelihood": true}``), ``ids.npy`` and ``mask.npy`` (int64
``[N, T]``, right padded: context and continuation) and ``starts.npy`` (int64 ``[N]``: index of the first token of the
continuation, at least 1). The last real token of a row is only predicted, never fed, so a row may hold one token more
than the model takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from .session import Session, check_batch

__all__ = ["FORWARD_VALUES", "REDUCE_VALUES", "log_softmax", "map_array", "score_likelihood"]

Doubles = npt.NDArray[np.float64]
# Bounds on what is held at once: logits of one forward pass (float32), rows reduced together (float64).
FORWARD_VALUES = 1 << 26
REDUCE_VALUES = 1 << 21


def score_likelihood(session: Session, folder: Path, *, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
    """One entry a token of a continuation, rows in order: ``logprob`` (nats, of that token), ``right`` (it is the
    model's first choice), ``window`` (its row).

    A model that says NaN gets NaN for ``logprob`` and is never right. Raises :class:`BadInput` for a question that
    does not fit the model or itself.
    """
    info = session.info()
    if info.task != "text-generation":
        raise BadInput(f"likelihoods are asked of a {info.task} model", hint="only text generation has them")
    ids, mask, starts = (map_array(folder / f"{name}.npy") for name in ("ids", "mask", "starts"))
    if ids.ndim != 2 or mask.shape != ids.shape or starts.shape != ids.shape[:1] or not len(ids):
        raise BadInput(
            f"{folder}: shapes don't fit together: ids {ids.shape}, mask {mask.shape}, starts {starts.shape}",
            hint="int64 [N, T], [N, T] and [N], N at least 1",
        )
    if {ids.dtype, mask.dtype, starts.dtype} != {np.dtype(np.int64)}:
        raise BadInput(f"{folder}: ids of {ids.dtype}, mask of {mask.dtype}", hint="int64 is expected")
    lengths = mask.sum(axis=1)
    if (starts < 1).any() or (starts >= lengths).any():
        raise BadInput(f"{folder}: a row has no continuation or no context", hint="at least one token of each")
    rows = max(1, min(batch_size, FORWARD_VALUES // max(1, ids.shape[1] * info.vocab_size)))
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for first in range(0, len(ids), rows):
        longest = int(lengths[first : first + rows].max()) - 1
        fed = np.array(ids[first : first + rows, :longest])
        fed_mask = (np.arange(longest) < lengths[first : first + rows, None] - 1).astype(np.int64)
        check_batch(fed, fed_mask, info)
        logits = session.forward(fed, fed_mask)
        for row, values in enumerate(logits):
            start, stop = int(starts[first + row]), int(lengths[first + row])
            parts += _reduce(values[start - 1 : stop - 1], np.asarray(ids[first + row, start:stop]), first + row)
        del logits
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reduce(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64], window: int
) -> list[dict[str, npt.NDArray[Any]]]:
    """Reduce ``[n, V]`` in chunks of rows."""
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise BadInput(f"token ids {targets.min()} to {targets.max()}, the vocabulary has {logits.shape[1]}",
                       hint="use the model's own tokenizer")  # fmt: skip
    rows = max(1, REDUCE_VALUES // logits.shape[1])
    parts = []
    for start in range(0, len(targets), rows):
        some, wanted = logits[start : start + rows], targets[start : start + rows]
        logprob = np.take_along_axis(log_softmax(some), wanted[:, None], axis=1)[:, 0]
        parts.append(
            {
                "logprob": logprob,
                "right": (some.argmax(axis=1) == wanted) & ~np.isnan(some).any(axis=1),
                "window": np.full(len(wanted), window, np.int64),
            }
        )
    return parts


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    """Log-probabilities over the last axis, in float64."""
    values = np.asarray(logits, np.float64)
    top = values.max(axis=-1, keepdims=True)
    shifted = values - np.where(np.isfinite(top), top, 0)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def map_array(path: Path) -> npt.NDArray[Any]:
    """A numpy file, memory-mapped; :class:`BadInput` for one that is missing or damaged. Never a pickle."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)).view()
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", hint="make the reference again") from None
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} is not a numpy array: {error}", hint="make the reference again") from None
