"""Small offline tasks for encoders, from a JSON-lines file of one's own: texts with labels, pairs with a similarity.

A line is one example, of one of two kinds; a file holds one kind::

    {"text": "never dull", "label": "positive"}
    {"first": "A man plays a guitar.", "second": "Somebody makes music.", "score": 3.8}

*Labels*: a classifier answers with its own (``label`` is one of its names, or an index); for a sentence encoder a
linear probe (:mod:`edgestill.bench.tasks`) is fitted on its embeddings of the lines with ``"split": "train"`` and
judged on the others. *Pairs* (semantic textual similarity): Spearman's correlation of the embeddings' cosines with
the scores that people gave, as SentEval and MTEB take it; the scale of the scores does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import ARTIFACT_FILE, open_artifact
from ..errors import BadInput
from ..progress import Progress, silent
from .fidelity import Estimate, expected_calibration_error, mean_estimate
from .records import Summary
from .statistics import bootstrap_interval
from .task_files import checked, load_tokenizer_file, read_examples
from .tasks import accuracy_ratio, first_choices

__all__ = ["LabelledTexts", "ScoredPairs", "read_labelled", "read_pairs"]

Array = npt.NDArray[Any]
_FEWEST_PAIRS = 3  # Spearman of two is 1 or -1


@dataclass(frozen=True)
class LabelledTexts:
    """``texts`` with their ``labels``; the first ``train`` of them are what a probe is fitted on."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str | int, ...]
    train: int
    sha256: str
    headline: str = "accuracy"

    def ask(
        self, worker: Any, folder: Path, *, batch_size: int = 8, progress: Progress = silent
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64], int]:
        """Which of the examples are right, how sure the model is of its choice, and how many classes there are."""
        task, names, prefix = _model_facts(folder)
        if task == "text-classification":
            texts, train, labels = self.texts[self.train :], 0, self._indices(names, folder)
            classes = len(names)
        elif task == "feature-extraction":
            if not self.train:
                raise BadInput(
                    f"{self.name}: a probe needs examples to learn from", hint='add "split": "train" to some'
                )
            known = sorted({str(label) for label in self.labels[: self.train]})
            strange = [label for label in self.labels[self.train :] if str(label) not in known]
            if strange or len(known) < 2:
                what = f"no example to learn {strange[0]!r} from" if strange else "one label only to learn"
                raise BadInput(f"{self.name}: {what}", hint='two labels or more, each with "split": "train"')
            texts, train = self.texts, self.train
            labels, classes = np.array([known.index(str(label)) for label in self.labels]), len(known)
        else:
            raise BadInput(f"{self.name} labels whole texts, {folder.name} is for {task}",
                           hint="labels need a classifier of texts or a sentence encoder")  # fmt: skip
        outputs = _outputs(worker, folder, [prefix + text for text in texts], batch_size, progress)
        right, sure = first_choices(task, outputs, labels, train, classes)
        return right, sure, classes

    def estimates(self, answers: Any, *, teacher: Any | None = None, seed: int = 0) -> list[Estimate]:
        """``accuracy`` and ``ece``; with a teacher's answers ``accuracy_ratio``, drawn on the same examples."""
        right, sure, classes = answers
        protocol = {"task": "labels", "classes": classes, "train_examples": self.train, "data_sha256": self.sha256}
        found = [mean_estimate("accuracy", right, seed=seed, protocol=protocol)]
        if teacher is not None and teacher[0].any():
            found.append(accuracy_ratio(right, teacher[0], seed=seed))
        return [*found, expected_calibration_error(sure, right, seed=seed, protocol=protocol)]

    def _indices(self, names: Sequence[str], folder: Path) -> npt.NDArray[np.int64]:
        found = []
        for label in self.labels[self.train :]:
            index = label if isinstance(label, int) else names.index(label) if label in names else -1
            if not 0 <= index < len(names):
                raise BadInput(f"{self.name}: {folder.name} has no label {label!r}", hint=f"it has {', '.join(names)}")
            found.append(index)
        return np.array(found, np.int64)


@dataclass(frozen=True)
class ScoredPairs:
    """``pairs`` (indices of ``texts``, each text once) and the ``scores`` that people gave them."""

    name: str
    texts: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    sha256: str
    headline: str = "sts_spearman"

    def ask(
        self, worker: Any, folder: Path, *, batch_size: int = 8, progress: Progress = silent
    ) -> npt.NDArray[np.float64]:
        """The cosine of each pair's embeddings."""
        task, _, prefix = _model_facts(folder)
        if task != "feature-extraction":
            raise BadInput(f"{self.name} asks how alike texts are, {folder.name} is for {task}",
                           hint="pairs need a sentence encoder")  # fmt: skip
        vectors = _outputs(worker, folder, [prefix + text for text in self.texts], batch_size, progress)
        unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        first, second = (unit[[pair[side] for pair in self.pairs]] for side in (0, 1))
        cosines = np.asarray((first * second).sum(axis=1))
        if not np.isfinite(cosines).all():
            raise BadInput(f"{folder.name} gives embeddings without a direction", hint="verify the artifact")
        return cosines

    def estimates(self, answers: Any, *, teacher: Any | None = None, seed: int = 0) -> list[Estimate]:
        """``sts_spearman``, with an interval that resamples pairs; ``protocol`` has the teacher's."""
        gold = np.array(self.scores)

        def correlation(drawn: Array) -> Array:
            return _spearman(np.asarray(answers)[drawn.astype(np.intp)], gold[drawn.astype(np.intp)])

        everyone = np.arange(len(gold), dtype=np.float64)
        low, high = bootstrap_interval(everyone, correlation, seed=seed)
        protocol: dict[str, Any] = {"task": "pairs", "independent_units": len(gold), "data_sha256": self.sha256}
        if teacher is not None:
            protocol["teacher_sts_spearman"] = float(_spearman(np.asarray(teacher)[None], gold[None])[0])
        value = float(correlation(everyone[None])[0])
        samples = tuple(float(f"{cosine:.6g}") for cosine in answers)
        return [Estimate("sts_spearman", Summary(value, "derived", len(gold), low, high), samples, protocol)]


def read_labelled(path: Path) -> LabelledTexts:
    """Read a file of texts with labels; :class:`BadInput` names the line that is not one."""

    def parse(raw: Any) -> tuple[bool, str, str | int]:
        fields = checked(raw, ("text", "label", "split"))
        text, label, split = fields.get("text"), fields.get("label"), fields.get("split", "test")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("`text` must be a text")
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise ValueError("`label` must be a name or an index")
        if split not in ("train", "test"):
            raise ValueError("`split` is train or test")
        return split == "test", text, label

    rows, digest = read_examples(path, parse, '{"text", "label"} on each line')
    rows.sort(key=lambda row: row[0])  # stable: those to learn from first, each part in the order of the file
    train = sum(not row[0] for row in rows)
    if train == len(rows):
        raise BadInput(f"{path} has nothing but examples to learn from", hint='leave "split" out of those to judge on')
    return LabelledTexts(path.stem, tuple(row[1] for row in rows), tuple(row[2] for row in rows), train, digest)


def read_pairs(path: Path) -> ScoredPairs:
    """Read a file of pairs with scores; :class:`BadInput` names the line that is not one."""

    def parse(raw: Any) -> tuple[str, str, float]:
        fields = checked(raw, ("first", "second", "score"))
        first, second, score = fields.get("first"), fields.get("second"), fields.get("score")
        if not all(isinstance(text, str) and text.strip() for text in (first, second)):
            raise ValueError("`first` and `second` must be texts")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError("`score` must be a number")
        return str(first), str(second), float(score)

    rows, digest = read_examples(path, parse, '{"first", "second", "score"} on each line')
    if len(rows) < _FEWEST_PAIRS or len({row[2] for row in rows}) < 2:
        raise BadInput(f"{path}: {len(rows)} pairs with {len({row[2] for row in rows})} different scores have no order",
                       hint="three pairs or more, not all alike")  # fmt: skip
    places = {text: index for index, text in enumerate(dict.fromkeys(text for row in rows for text in row[:2]))}
    pairs = tuple((places[first], places[second]) for first, second, _ in rows)
    return ScoredPairs(path.stem, tuple(places), pairs, tuple(row[2] for row in rows), digest)


def _model_facts(folder: Path) -> tuple[str, tuple[str, ...], str]:
    """Task, labels and prompt prefix of an artifact or a model folder."""
    if (folder / ARTIFACT_FILE).is_file():
        manifest = open_artifact(folder, check=False).manifest
        return manifest.task, manifest.labels, manifest.prompt_prefix
    from ..checkpoints import open_model

    model = open_model(folder)
    return model.task, model.labels, model.prompt_prefix


def _outputs(worker: Any, folder: Path, texts: Sequence[str], batch_size: int, progress: Progress) -> Array:
    """``forward`` of every text, ``[N, …]``; texts of about one length run together, those too long are cut."""
    tokenizer = load_tokenizer_file(folder)
    tokenizer.no_padding()
    tokenizer.enable_truncation(worker.info().max_length)
    rows = [one.ids for one in tokenizer.encode_batch(list(texts))]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise BadInput(f"text {empty[0]} is empty after tokenising", hint="look at the text")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    found: dict[int, Array] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = np.zeros((len(batch), len(rows[batch[0]])), np.int64)
        mask = np.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, : len(rows[index])], mask[place, : len(rows[index])] = rows[index], 1
        found |= dict(zip(batch, worker.forward(ids, mask), strict=True))
        progress("texts", (start + len(batch)) / len(order))
    return np.stack([found[index] for index in range(len(rows))])


def _spearman(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """Spearman's coefficient of each row of ``a`` and ``b`` ``[R, n]``, ties at their mean rank; 0 where a resample
    holds one value only."""
    from scipy.stats import rankdata

    x, y = (rankdata(side, axis=1) for side in (a, b))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.asarray(np.divide((x * y).sum(axis=1), spread, out=np.zeros(len(x)), where=spread > 0))
