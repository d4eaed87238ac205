"""Compare a session with a reference on the session's side: logits come down to a few numbers a token, in numpy.

A reference is a folder: ``reference.json`` (``{"task": …, …}``), ``ids.npy`` and ``mask.npy`` (int64 ``[N, T]``, right
padded) and what the reference model said: ``logits.npy`` (float32 ``[N, T, V]`` for text-generation, ``[N, T, C]`` for
token-classification, ``[N, C]`` for text-classification) or ``embeddings.npy`` (float32 ``[N, D]``,
feature-extraction). Arrays are memory-mapped, so memory follows one batch, not the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..files import read_json
from .likelihood import FORWARD_VALUES as _FORWARD_VALUES
from .likelihood import REDUCE_VALUES as _REDUCE_VALUES
from .likelihood import log_softmax, map_array, score_likelihood
from .session import Session, SessionInfo, check_batch

__all__ = ["Reference", "kl_divergence", "log_softmax", "open_reference", "score"]

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAID = {
    "text-generation": ("logits.npy", 3),
    "text-classification": ("logits.npy", 2),
    "token-classification": ("logits.npy", 3),
    "feature-extraction": ("embeddings.npy", 2),
}


@dataclass(frozen=True)
class Reference:
    """An opened reference: ``ids``, ``mask`` ``[N, T]`` and what the reference model ``said``, memory-mapped."""

    task: str
    ids: Ints
    mask: Ints
    said: npt.NDArray[np.float32]


def open_reference(folder: Path) -> Reference:
    """Open a reference folder; :class:`BadInput` names what is missing or has the wrong shape."""
    described = read_json(folder / "reference.json")
    task = described.get("task") if isinstance(described, dict) else None
    if task not in _SAID:
        raise BadInput(f"{folder}/reference.json: unknown task {task!r}", hint=f"known: {', '.join(_SAID)}")
    name, dimensions = _SAID[task]
    ids, mask, said = (map_array(folder / file) for file in ("ids.npy", "mask.npy", name))
    shapes = f"ids {ids.shape}, mask {mask.shape}, {name} {said.shape}"
    if ids.ndim != 2 or mask.shape != ids.shape or said.ndim != dimensions or len(said) != len(ids):
        raise BadInput(f"{folder}: shapes don't fit together: {shapes}", hint="make the reference again")
    if dimensions == 3 and said.shape[1] != ids.shape[1]:
        raise BadInput(f"{folder}: shapes don't fit together: {shapes}", hint="make the reference again")
    if said.dtype != np.float32 or ids.dtype != np.int64 or mask.dtype != np.int64:
        raise BadInput(f"{folder}: {said.dtype} values, {ids.dtype} ids", hint="float32 and int64 are expected")
    return Reference(task, ids, mask, said)


def score(session: Session, reference: Path, *, batch_size: int = 8) -> dict[str, npt.NDArray[Any]]:
    """Run ``session`` on the reference's inputs and reduce.

    text-generation, one entry a predicted token, windows in order (a window of n real tokens predicts n - 1):
    ``kl`` (nats, KL(reference ‖ session), reduced in float64), ``top1`` (both argmax agree), ``top5`` (the reference's
    argmax is among the session's five highest), ``logprob`` and ``reference_logprob`` (nats, of the true next token),
    ``confidence`` (probability of the session's own first choice) and ``right`` (that choice is the true next token),
    ``window`` (index). text-classification, one entry an example: ``kl``, ``top1``, ``logits [N, C]``.
    token-classification, one entry a real token, rows in order: ``kl``, ``top1``, ``logits [n, C]``, ``window``.
    feature-extraction: ``cosine`` to the reference and ``embeddings [N, D]``.

    A folder that asks for likelihoods instead is answered by :func:`edgestill.runtimes.likelihood.score_likelihood`.

    A session that says NaN gets NaN for ``kl``, ``logprob`` and ``confidence`` and no agreement. Raises
    :class:`BadInput` when session and reference don't fit.
    """
    if batch_size < 1:
        raise BadInput(f"batch size {batch_size}", hint="at least 1")
    described = read_json(reference / "reference.json")
    if isinstance(described, dict) and described.get("likelihood"):
        return score_likelihood(session, reference, batch_size=batch_size)
    opened = open_reference(reference)
    info = session.info()
    if info.task != opened.task:
        raise BadInput(f"the reference is for {opened.task}, the model does {info.task}", hint="make one for this task")
    if opened.task == "text-generation":
        return _score_tokens(session, opened, batch_size, info)
    if opened.task == "token-classification":
        return _score_labels(session, opened, batch_size, info)
    outputs = [session.forward(ids, mask) for _, ids, mask in _batches(opened, batch_size, info)]
    values = np.concatenate(outputs) if outputs else np.zeros_like(opened.said)
    _same_width(values.shape, opened.said.shape)
    if opened.task == "text-classification":
        said = np.asarray(opened.said)
        return {"kl": kl_divergence(said, values), "top1": _agree(said, values), "logits": values}
    return {"cosine": _cosine(np.asarray(opened.said), values), "embeddings": values}


def _score_labels(
    session: Session, reference: Reference, batch_size: int, info: SessionInfo
) -> dict[str, npt.NDArray[Any]]:
    classes = reference.said.shape[2]
    said, got, windows = [], [], []
    for first, ids, mask in _batches(reference, batch_size, info):
        logits = session.forward(ids, mask)
        _same_width(logits.shape, (*ids.shape, classes))
        real = mask == 1
        said.append(np.asarray(reference.said[first : first + len(ids), : ids.shape[1]])[real])
        got.append(logits[real])
        windows.append(first + np.nonzero(real)[0])
    if not got:
        raise BadInput("the reference has no token", hint="make it again")
    theirs, ours = np.concatenate(said), np.concatenate(got)
    return {
        "kl": kl_divergence(theirs, ours),
        "top1": _agree(theirs, ours),
        "logits": ours,
        "window": np.concatenate(windows),
    }


def _score_tokens(
    session: Session, reference: Reference, batch_size: int, info: SessionInfo
) -> dict[str, npt.NDArray[Any]]:
    width = int(reference.mask.shape[1] * reference.said.shape[2]) or 1
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for first, ids, mask in _batches(reference, min(batch_size, max(1, _FORWARD_VALUES // width)), info):
        logits = session.forward(ids, mask)
        _same_width(logits.shape, (*ids.shape, reference.said.shape[2]))
        for row, length in enumerate(mask.sum(axis=1)):
            window = first + row
            targets = ids[row, 1:length]
            parts += [
                {**part, "window": np.full(len(part["kl"]), window, np.int64)}
                for part in _reduce(reference.said[window, : length - 1], logits[row, : length - 1], targets)
            ]
        del logits
    if not parts:
        raise BadInput("the reference has no token to predict", hint="windows need at least two real tokens")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reduce(
    said: npt.NDArray[np.float32], logits: npt.NDArray[np.float32], targets: Ints
) -> list[dict[str, npt.NDArray[Any]]]:
    """Reduce ``[n, V]`` against ``[n, V]`` in chunks of rows."""
    rows = max(1, _REDUCE_VALUES // said.shape[1])
    parts = []
    for start in range(0, len(targets), rows):
        stop = start + rows
        a, b, target = np.asarray(said[start:stop]), logits[start:stop], targets[start:stop, None]
        log_p, log_q = log_softmax(a), log_softmax(b)
        best = a.argmax(axis=1)[:, None]
        clean = ~np.isnan(b).any(axis=1)
        parts.append(
            {
                "kl": _kl(log_p, log_q),
                "top1": _agree(a, b),
                "top5": (_rank(b, best) < 5) & clean,
                "logprob": np.take_along_axis(log_q, target, axis=1)[:, 0],
                "reference_logprob": np.take_along_axis(log_p, target, axis=1)[:, 0],
                "confidence": np.exp(log_q.max(axis=1)),
                "right": (b.argmax(axis=1) == target[:, 0]) & clean,
            }
        )
    return parts


def kl_divergence(reference: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> Doubles:
    """KL(softmax(reference) ‖ softmax(logits)) over the last axis, in nats, float64."""
    return _kl(log_softmax(reference), log_softmax(logits))


def _kl(log_p: Doubles, log_q: Doubles) -> Doubles:
    p = np.exp(log_p)
    # 0 log 0 = 0: where the reference excludes a token, whatever the other side says costs nothing.
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0)
    terms[np.isnan(log_q).any(axis=-1)] = np.nan
    return np.asarray(terms.sum(axis=-1))


def _agree(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return (a.argmax(axis=-1) == b.argmax(axis=-1)) & ~np.isnan(b).any(axis=-1)


def _rank(values: npt.NDArray[np.float32], index: Ints) -> Ints:
    """How many entries of each row stand before ``index [n, 1]``: the greater ones, and equal ones with a lower id."""
    own = np.take_along_axis(values, index, axis=1)
    before = np.arange(values.shape[1]) < index
    return np.asarray(((values > own) | ((values == own) & before)).sum(axis=1))


def _cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Doubles:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = np.einsum("nd,nd->n", x, y)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms != 0)


def _batches(reference: Reference, size: int, info: SessionInfo) -> Iterator[tuple[int, Ints, Ints]]:
    """Yield ``(index of the first row, ids, mask)``, checked, each batch cut to its longest row."""
    for first in range(0, len(reference.ids), size):
        mask = np.asarray(reference.mask[first : first + size])
        longest = max(1, int(mask.sum(axis=1).max(initial=1)))
        ids, mask = np.asarray(reference.ids[first : first + size, :longest]), mask[:, :longest]
        check_batch(ids, mask, info)
        yield first, ids, mask


def _same_width(got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise BadInput(f"the model gives {list(got)}, the reference has {list(wanted)}", hint="compare like with like")
