"""What an artifact does when it runs: finite, faithful to its own weights, the same by any way in, and at what loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..artifact import CLASS_TASKS, TOKEN_TASKS, Task
from ..runtimes.scoring import kl_divergence, open_reference
from ..runtimes.session import DecodedToken, SessionInfo
from .fidelity import fidelity
from .limits import Ceiling, Faithful
from .records import Check

__all__ = [
    "LOSS_METRICS",
    "Runner",
    "against_other_reference",
    "check_decode",
    "check_faithful",
    "check_finite",
    "check_longest",
    "check_padding",
    "distance",
    "loss_checks",
]

Array = npt.NDArray[Any]
Scores = Mapping[str, Array]
Describe = Callable[[int], str]

LOSS_METRICS: Mapping[str, str] = {
    "kl": "kl", "perplexity_ratio": "perplexity_ratio", "cosine": "cosine_distance", "top1_agreement": "",
    "spearman": "",
}  # fmt: skip
"""Metrics that a verdict states as loss, and the ceiling of :class:`~edgestill.bench.limits.Ceiling` that judges."""


class Runner(Protocol):
    """What is needed of a worker, e.g. :class:`edgestill.runtimes.transports.local.LocalWorker`."""

    def info(self) -> SessionInfo:
        """See :class:`edgestill.runtimes.session.Session`, like the rest."""
        ...

    def forward(self, ids: Array, mask: Array) -> Array:
        """One pass."""
        ...

    def decode(self, prompt_ids: Sequence[int], n: int, logits: bool = False) -> list[DecodedToken]:
        """Greedy decoding."""
        ...

    def score(self, reference: Path, batch_size: int = 8) -> dict[str, Array]:
        """See :func:`edgestill.runtimes.scoring.score`."""
        ...


def check_finite(scores: Scores, describe: Describe) -> Check:
    """No NaN or infinity came out."""
    for name in ("kl", "logprob", "logits", "embeddings", "cosine"):
        if name not in scores:
            continue
        values = scores[name]
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            first = int(bad.argmax())
            row = int(scores["window"][first]) if "window" in scores else first
            return Check("finite", "integrity", False, float(bad.sum()), 0.0, unit="outputs", worst_input=describe(row),
                         reason=f"NaN or infinity in {name}")  # fmt: skip
    return Check("finite", "integrity", True, 0.0, 0.0, unit="outputs", reason="no NaN or infinity came out")


def check_faithful(task: Task, scores: Scores, limits: Faithful, describe: Describe) -> list[Check]:
    """The artifact in its runtime against its own weights in torch: how far, and how often another first choice."""
    if task == "feature-extraction":
        away = 1 - scores["cosine"]
        worst = int(away.argmax())
        return [
            Check("faithful", "faithful", bool(away[worst] <= limits.divergence), float(away[worst]), limits.divergence,
                  unit="largest 1 - cosine", reason=limits.reason, worst_input=describe(worst))
        ]  # fmt: skip
    kl = np.asarray(scores["kl"], np.float64)
    rows = np.asarray(scores.get("window", np.arange(len(kl))))
    worst, mean = int(rows[int(kl.argmax())]), float(kl.mean())
    agreement = float(np.mean(scores["top1"]))
    # One changed choice among few examples is noise where the choices are near; more of them are not.
    least = min(limits.agreement, 1 - 1 / len(kl))
    return [
        Check("faithful", "faithful", bool(mean <= limits.divergence), mean, limits.divergence,
              unit="mean KL, nats", reason=limits.reason, worst_input=describe(worst)),
        Check("faithful_top1", "faithful", agreement >= least, agreement, least, "at_least", unit="fraction",
              reason="share of equal first choices", worst_input=describe(worst)),
    ]  # fmt: skip


def check_decode(worker: Runner, prompt: Sequence[int], new_tokens: int, limits: Faithful) -> Check:
    """Decoding token by token with the key/value cache says the same as one pass over the whole text."""
    name = "decode_parity"
    if "decode" not in worker.info().capabilities:
        return Check(name, "faithful", True, reason="not applicable: this runtime does not decode")
    steps = worker.decode(prompt, new_tokens, logits=True)
    ids = [*prompt, *(step.id for step in steps[:-1])]
    whole = worker.forward(np.array([ids]), np.ones((1, len(ids)), np.int64))[0, len(prompt) - 1 :]
    cached = np.stack([_logits(step) for step in steps])
    kl = kl_divergence(whole, cached)
    worst = float(np.nanmax(kl)) if np.isfinite(kl).any() else float("inf")
    passed = bool(np.isfinite(kl).all() and worst <= limits.parity)
    step = int(np.nan_to_num(kl, nan=np.inf).argmax())
    return Check(name, "faithful", passed, worst, limits.parity, unit="largest KL, nats",
                 reason=f"cached decoding against one pass, {new_tokens} tokens",
                 worst_input=f"decoded token {step}")  # fmt: skip


def check_padding(worker: Runner, task: Task, ids: Array, limits: Faithful) -> Check:
    """A row says the same alone as beside a longer one, padded. ``ids [n]``: one real row, at least two tokens."""
    half = max(1, len(ids) // 2)
    batch = np.stack([ids, np.where(np.arange(len(ids)) < half, ids, ids[-1])]).astype(np.int64)
    mask = np.ones_like(batch)
    mask[1, half:] = 0
    together = worker.forward(batch, mask)
    alone = [worker.forward(batch[:1], mask[:1]), worker.forward(batch[1:, :half], mask[1:, :half])]
    found = []
    for row, single in enumerate(alone):
        length = len(ids) if row == 0 else half
        pair = (single[0, :length], together[row, :length]) if task in TOKEN_TASKS else (single, together[[row]])
        found.append(float(np.max(distance(task, *pair))))
    worst = max(found, key=lambda value: np.inf if np.isnan(value) else value)
    return Check("padding_parity", "faithful", bool(worst <= limits.parity), worst, limits.parity,
                 unit="largest 1 - cosine" if task == "feature-extraction" else "largest KL, nats",
                 reason="a row alone against the same row in a padded batch",
                 worst_input="the padded row" if worst == found[1] else "the full row")  # fmt: skip


def check_longest(worker: Runner, task: Task, ids: Array, said: Array, limits: Faithful) -> Check:
    """One row of the greatest length ``ids [n]`` against ``said`` by its own weights in torch: the last 8 positions
    ``[8, V]`` where the model answers at every token, else the output ``[1, D]``. A position table or cache that ends
    too early shows."""
    found = worker.forward(ids[None].astype(np.int64), np.ones((1, len(ids)), np.int64))
    found = found[0, -len(said) :] if task in TOKEN_TASKS else found
    finite = bool(np.isfinite(found).all())
    worst = float(np.max(distance(task, said, found))) if finite else float("inf")
    return Check("longest_context", "faithful", finite and worst <= limits.parity, worst, limits.parity,
                 unit="largest 1 - cosine" if task == "feature-extraction" else "largest KL, nats",
                 reason=f"{len(ids)} tokens at once, against its own weights in torch")  # fmt: skip


def distance(task: Task, a: Array, b: Array) -> Array:
    """KL(a ‖ b) of rows of logits ``[n, V]``, or 1 − cosine of rows of embeddings ``[n, D]``, in float64."""
    if task != "feature-extraction":
        return kl_divergence(a, b)
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray(1 - np.divide((x * y).sum(axis=1), norms, out=np.zeros(len(x)), where=norms != 0))


def against_other_reference(task: Task, scores: Scores, reference: Path) -> dict[str, Array]:
    """What ``score()`` would give against ``reference``, from the outputs that a score against another one kept.

    For embeddings (where their size is the same) and classifiers, whose outputs are small; ``reference_embeddings``
    is added for Spearman.
    """
    opened = open_reference(reference)
    said = np.asarray(opened.said)
    if task in CLASS_TASKS:
        logits = scores["logits"]
        if task == "token-classification":
            said = said[np.asarray(opened.mask) == 1]
        found = {"logits": logits, "kl": kl_divergence(said, logits),
                 "top1": said.argmax(axis=1) == logits.argmax(axis=1)}  # fmt: skip
        return found | ({"window": scores["window"]} if "window" in scores else {})
    embeddings = scores["embeddings"]
    found = {"embeddings": embeddings, "reference_embeddings": said}
    if said.shape == embeddings.shape:
        found["cosine"] = 1 - distance(task, said, embeddings)
    return found


def loss_checks(
    task: Task,
    scores: Scores,
    documents: Sequence[int],
    against: str,
    ceiling: Ceiling | None,
    overrides: Mapping[str, float],
) -> list[Check]:
    """The price of the artifact against a float model, with intervals over documents.

    Judged by ``ceiling`` (against the student), or by ``overrides`` (metric -> limit, from the recipe's gates) where
    they name the metric; without either it is only stated.
    """
    checks = []
    for estimate in fidelity(task, scores, documents=documents):
        if estimate.metric not in LOSS_METRICS:
            continue
        summary, attribute = estimate.summary, LOSS_METRICS[estimate.metric]
        value, low, high, unit = summary.value, summary.low, summary.high, estimate.metric
        higher = estimate.metric in ("top1_agreement", "spearman", "cosine")
        limit = overrides.get(estimate.metric)
        reason = "limit from the recipe's gates"
        if limit is None:
            reason = "stated, not judged"
            if ceiling is not None and attribute:
                limit = getattr(ceiling, attribute)
                limit = 1 - limit if estimate.metric == "cosine" else limit
                reason = ceiling.reason
        passed = limit is None or (value >= limit if higher else value <= limit)
        checks.append(
            Check(f"{estimate.metric}_to_{against}", "loss", bool(passed), value, limit,
                  "at_least" if higher else "at_most", unit, low, high, reason)
        )  # fmt: skip
    return checks


def _logits(step: DecodedToken) -> Array:
    if step.logits is None:
        raise ValueError("the worker decoded without logits")
    return step.logits
