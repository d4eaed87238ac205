"""How much noise costs: teacher and student on the same held-out text, clean and perturbed.

Fidelity is the student's to the teacher *on the same noisy text* (does it still do what the teacher does?), the task
score is what is left of it for both; an encoder is also compared with itself on the clean text (``self_cosine``,
``self_agreement``). A subset of the text is used, and ``n`` says how much; text that a tokenizer reads as it read the
clean one is not run again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..artifact import TOKEN_TASKS, Task
from ..progress import Progress, silent
from ..runtimes.scoring import open_reference, score
from ..runtimes.session import Session, SessionInfo
from .fidelity import Estimate, fidelity, mean_estimate, own_estimates
from .perturb import PERTURBATIONS, perturb
from .reference import Inputs, encode_texts, renamed, window_texts, write_reference
from .tasks import first_choices

if TYPE_CHECKING:
    from ..data import LabelledSet

__all__ = ["CLEAN", "NoiseRow", "Renumbered", "Sizes", "measure_robustness"]

Array = npt.NDArray[Any]
CLEAN = "clean"
_SHOWN = ("kl", "top1_agreement", "spearman", "cosine", "perplexity", "next_token_accuracy")


@dataclass(frozen=True)
class Sizes:
    """How much is looked at, per data set: texts of an encoder, predicted tokens of a decoder, labelled texts."""

    texts: int = 100
    tokens: int = 512
    train: int = 200
    test: int = 150


@dataclass(frozen=True)
class NoiseRow:
    """One figure of one model under one noise (``clean``, ``typos``, …) on one data set, with its 95 % interval.

    ``metric`` is a name of :data:`edgestill.bench.metrics.METRICS`, or ``self_cosine`` / ``self_agreement``.
    """

    subject: str
    noise: str
    data: str
    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None


def measure_robustness(
    sessions: Mapping[str, Session],
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    tasks: Sequence[LabelledSet] = (),
    *,
    max_length: int,
    window: int = 128,
    prefix: str = "",
    sizes: Sizes | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[NoiseRow]:
    """Figures of ``sessions`` (the first one is the teacher) on clean and noisy versions of ``texts`` and ``tasks``.

    All read the same token ids, by ``tokenizer``. Text generation: fidelity, perplexity and accuracy of the next
    token of the noisy text; others: fidelity, likeness to themselves, accuracy on ``tasks`` (embeddings: a probe
    fitted on clean text, asked about noisy text).
    """
    sizes = sizes or Sizes()
    task: Task = next(iter(sessions.values())).info().task  # type: ignore[assignment]
    rows: list[NoiseRow] = []
    for name, given in texts.items():
        clean: dict[str, tuple[tuple[int, ...], Array]] = {}
        seen: dict[bytes, dict[str, list[Estimate]]] = {}
        for noise in (CLEAN, *PERTURBATIONS):
            progress(f"{name}: {noise}", None)
            noisy = _noisy(given[: None if task == "text-generation" else sizes.texts], noise, seed)
            if task == "text-generation":
                inputs = window_texts(tokenizer, noisy, window=min(window, max_length), limit=sizes.tokens)
            else:
                inputs = encode_texts(tokenizer, noisy, max_length=max_length, prefix=prefix)
            key = inputs.ids.tobytes() + inputs.mask.tobytes()
            if key not in seen:
                seen[key] = _ask(sessions, inputs, task, clean, seed)
            rows += [_row(subject, noise, name, e) for subject, found in seen[key].items() for e in found]
    if task != "text-generation":
        for data in tasks:
            rows += _labelled(sessions, tokenizer, data, max_length, prefix, sizes, seed, progress)
    return rows


def _noisy(texts: Sequence[str], noise: str, seed: int) -> list[str]:
    return list(texts) if noise == CLEAN else [perturb(text, noise, seed) for text in texts]


def _ask(
    sessions: Mapping[str, Session],
    inputs: Inputs,
    task: Task,
    clean: dict[str, tuple[tuple[int, ...], Array]],
    seed: int,
) -> dict[str, list[Estimate]]:
    """Estimates of each session on ``inputs``; ``clean`` keeps what each said of the clean text, which comes first."""
    found: dict[str, list[Estimate]] = {}
    teacher = next(iter(sessions))
    with tempfile.TemporaryDirectory() as folder:
        reference = write_reference(Path(folder) / "said", task, inputs, sessions[teacher].forward, facts={})
        said = open_reference(reference).said
        for name, session in sessions.items():
            own = name == teacher
            asked: Any = _Again(session, said) if own else session
            scores = score(asked, reference)
            if task == "text-generation":
                estimates = (own_estimates if own else _to_teacher)(scores, documents=inputs.documents, seed=seed)
            else:
                scores["reference_embeddings"] = np.asarray(said)
                estimates = [] if own else fidelity(task, scores, documents=inputs.documents, seed=seed)
                outputs = scores["embeddings" if "embeddings" in scores else "logits"]
                before = clean.setdefault(name, (inputs.documents, outputs))
                # Noise cuts words into other tokens, so what is said at every token has no counterpart.
                if task not in TOKEN_TASKS and before[1] is not outputs and before[0] == inputs.documents:
                    estimates.append(_likeness(task, before[1], outputs, seed))
            found[name] = [e for e in estimates if e.metric in _SHOWN or e.metric.startswith("self_")]
        del said  # unmapped before its file goes
    return found


def _to_teacher(scores: Mapping[str, Array], *, documents: Sequence[int], seed: int) -> list[Estimate]:
    return fidelity("text-generation", scores, documents=documents, seed=seed)


class Renumbered:
    """A teacher that reads, and says, the ids of a student with a trimmed vocabulary: ``columns[id]`` is its own id."""

    def __init__(self, session: Session, columns: Sequence[int]) -> None:
        info = session.info()
        task: Task = info.task  # type: ignore[assignment]
        self._info = dataclasses.replace(info, vocab_size=len(columns))
        self.forward = renamed(session.forward, columns, task)

    def info(self) -> SessionInfo:
        """That of the teacher, with the student's vocabulary."""
        return self._info


class _Again:
    """The teacher saying, batch after batch, what it has said already, so that it is not asked twice."""

    def __init__(self, session: Session, said: Array) -> None:
        self.info = session.info
        self._said = said
        self._next = 0

    def forward(self, ids: Array, attention_mask: Array) -> Array:
        """The next rows."""
        rows = self._said[self._next : self._next + len(ids)]
        self._next += len(ids)
        return np.asarray(rows[:, : ids.shape[1]] if rows.ndim == 3 else rows)


def _likeness(task: Task, before: Array, after: Array, seed: int) -> Estimate:
    """How like itself a model is under noise: cosine of its embeddings, or whether it chooses the same class."""
    if task == "text-classification":
        return mean_estimate("self_agreement", before.argmax(axis=1) == after.argmax(axis=1), seed=seed)
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return mean_estimate("self_cosine", (a * b).sum(axis=1) / np.maximum(norms, 1e-12), seed=seed)


def _labelled(
    sessions: Mapping[str, Session], tokenizer: Any, data: LabelledSet, max_length: int, prefix: str, sizes: Sizes,
    seed: int, progress: Progress,
) -> list[NoiseRow]:  # fmt: skip
    """Accuracy on clean and noisy test texts; a probe is fitted once, on clean training texts."""
    task = next(iter(sessions.values())).info().task
    train = data.train[: sizes.train] if task == "feature-extraction" else ()
    test = data.test[: sizes.test]
    labels = np.array([label for _, label in (*train, *test)])
    learnt: dict[str, Array] = {}
    seen: dict[bytes, dict[str, Estimate]] = {}
    rows = []
    for noise in (CLEAN, *PERTURBATIONS):
        progress(f"{data.name}: {noise}", None)
        texts = _noisy([text for text, _ in test], noise, seed)
        inputs = encode_texts(tokenizer, texts, max_length=max_length, prefix=prefix)
        key = inputs.ids.tobytes() + inputs.mask.tobytes()
        if key not in seen:
            seen[key] = {}
            for name, session in sessions.items():
                if train and name not in learnt:
                    plain = encode_texts(tokenizer, [t for t, _ in train], max_length=max_length, prefix=prefix)
                    learnt[name] = _outputs(session, plain)
                outputs = _outputs(session, inputs)
                outputs = np.concatenate([learnt[name], outputs]) if train else outputs
                right, _ = first_choices(task, outputs, labels, len(train), len(data.labels))
                seen[key][name] = mean_estimate("accuracy", right, seed=seed)
        rows += [_row(name, noise, data.name, estimate) for name, estimate in seen[key].items()]
    return rows


def _outputs(session: Session, inputs: Inputs, batch_size: int = 8) -> Array:
    """What a session says of each row: logits ``[N, C]`` or embeddings ``[N, D]``."""
    order = np.argsort(inputs.mask.sum(axis=1), kind="stable")  # like lengths together: little padding
    parts = []
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        longest = int(inputs.mask[rows].sum(axis=1).max())
        parts.append(session.forward(inputs.ids[rows, :longest], inputs.mask[rows, :longest]))
    return np.asarray(np.concatenate(parts)[np.argsort(order)])


def _row(subject: str, noise: str, data: str, estimate: Estimate) -> NoiseRow:
    summary = estimate.summary
    return NoiseRow(subject, noise, data, estimate.metric, summary.value, summary.n, summary.low, summary.high)
