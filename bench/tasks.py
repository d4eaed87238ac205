"""Accuracy on labelled text: the labels that a classifier gives to texts or words, or a linear probe on embeddings.

The probe is fitted anew on each artifact's own embeddings of the training texts, since that is what an app does which
ships the artifact: an embedding that is turned or scaled as a whole costs nothing, one that lost information does. It
is plain logistic regression on the raw embeddings, C = 1, as in MTEB (Muennighoff et al., 2023), deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data_labels import LabelledSet, TaggedSet, in_labels_of, join_words, tag_tokens
from ..errors import BadInput, RecipeError
from ..progress import Progress, silent
from ..runtimes.scoring import open_reference
from .fidelity import Estimate, expected_calibration_error, mean_estimate, softmax
from .records import Summary
from .reference import make_reference, read_facts
from .statistics import bootstrap_interval
from .tagging import f1_estimate, names_entities

__all__ = [
    "accuracy_ratio", "first_choices", "fit_probe", "make_task_reference", "predict_probe", "task_estimates",
]  # fmt: skip

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


def make_task_reference(
    model: Path,
    out: Path,
    data: LabelledSet | TaggedSet,
    *,
    max_length: int | None = None,
    ids_from: Path | None = None,
    columns: Sequence[int] | None = None,
    batch_size: int = 8,
    threads: int = 2,
    progress: Progress = silent,
) -> Path:
    """The reference of ``model`` on a labelled set: training texts first (embeddings only), then test texts.

    Labels, those of a model that has any by its own numbers, stand in ``reference.json``, so that
    :func:`task_estimates` needs nothing else. Otherwise as :func:`edgestill.bench.reference.make_reference`. Raises
    :class:`RecipeError` for labels that the model does not have, and for those of words where it labels texts.
    """
    from ..checkpoints import load_tokenizer, open_model

    folder = open_model(model)
    words = folder.task == "token-classification"
    if words != isinstance(data, TaggedSet):
        raise RecipeError(
            f"[[data.task]] {data.name} labels {'whole texts' if words else 'words'}, and {model.name} "
            f"{'labels words' if words else 'does not'}",
            hint="give it `tags`, a label for each word" if words else "give it `label`, one for each text",
        )
    settings: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "threads": threads,
                                "progress": progress}  # fmt: skip
    if isinstance(data, TaggedSet):
        data = in_labels_of(data, folder.labels)
        extra: dict[str, Any] = {"data": data.name, "classes": list(data.labels)}
        if ids_from is not None:  # the same tokens, so the same labels
            return make_reference(model, out, ids_from=ids_from, columns=columns,
                                  extra=read_facts(ids_from)["extra"], **settings)  # fmt: skip
        length = min(max_length or folder.max_length, folder.max_length)
        extra["tags"] = tag_tokens(load_tokenizer(folder.path), data.test, length, folder.prompt_prefix)
        extra["words"] = sum(len(labels) for _, labels in data.test)
        return make_reference(model, out, texts=[join_words(text) for text, _ in data.test], extra=extra, **settings)
    if folder.labels:
        data = in_labels_of(data, folder.labels)
    probes = folder.task == "feature-extraction"
    train = data.train if probes else ()
    if probes and not train:
        raise BadInput(f"{data.name}: a probe needs training examples", hint="set `train` in the [[data.task]]")
    rows = [*train, *data.test]
    extra = {"data": data.name, "labels": [label for _, label in rows], "classes": list(data.labels),
             "train": len(train)}  # fmt: skip
    texts = [text for text, _ in rows] if ids_from is None else []
    return make_reference(model, out, texts=texts, ids_from=ids_from, columns=columns, extra=extra, **settings)


def task_estimates(
    outputs: Array, reference: Path, *, teacher_outputs: Array | None = None, seed: int = 0
) -> list[Estimate]:
    """``accuracy`` and ``ece`` of an artifact's ``outputs`` on the rows of a task reference.

    ``outputs [N, …]`` are the ``embeddings`` or ``logits`` that ``score()`` gave; with the teacher's on the same rows
    also ``accuracy_ratio``, whose interval draws the same examples for both.

    For token-classification ``outputs [n, C]`` are those of all real tokens, row after row, and the teacher's ``[N, T,
    C]``; accuracy is that of words, and ``f1`` of entities comes first, where labels name some.
    """
    facts = read_facts(reference)
    extra = facts["extra"]
    if facts["task"] == "token-classification":
        return _words(outputs, reference, facts, teacher_outputs, seed)
    labels = np.asarray(extra["labels"])[np.asarray(facts["documents"])]
    train = int(np.sum(np.asarray(facts["documents"]) < extra["train"]))
    if len(outputs) != len(labels):
        raise BadInput(f"{len(outputs)} outputs for {len(labels)} labels", hint="score the same reference")
    right, confidence = first_choices(facts["task"], outputs, labels, train, len(extra["classes"]))
    protocol: dict[str, Any] = {"train_examples": train, "classes": len(extra["classes"])}
    if facts["task"] == "feature-extraction":
        protocol["probe"] = "logistic regression, C = 1, fitted on the artifact's own embeddings"
    estimates = [mean_estimate("accuracy", right, seed=seed, protocol=protocol)]
    if teacher_outputs is not None:
        teacher, _ = first_choices(facts["task"], teacher_outputs, labels, train, len(extra["classes"]))
        estimates.append(accuracy_ratio(right, teacher, seed=seed))
    estimates.append(expected_calibration_error(confidence, right, seed=seed, protocol=protocol))
    return estimates


def _words(
    outputs: Array, reference: Path, facts: dict[str, Any], teacher_outputs: Array | None, seed: int
) -> list[Estimate]:
    extra, mask = facts["extra"], np.asarray(open_reference(reference).mask) == 1
    tags = [label for document in facts["documents"] for label in extra["tags"][document]]
    if not len(tags) == len(outputs) == int(mask.sum()):
        raise BadInput(f"{len(outputs)} outputs for {len(tags)} tokens", hint="score the same reference")
    known = np.asarray(tags) >= 0
    true, sentences = np.asarray(tags)[known], np.nonzero(mask)[0][known]
    if not len(true):
        raise BadInput(f"{extra['data']}: no word has a label", hint="look at `tags` and at [data] max_length")
    logits = np.asarray(outputs, np.float64)[known]
    said = logits.argmax(axis=1)
    right = said == true
    protocol = {
        "classes": len(extra["classes"]), "words": len(true), "words_without_token": extra["words"] - len(true),
    }  # fmt: skip
    estimates = [mean_estimate("accuracy", right, groups=sentences, seed=seed, protocol=protocol)]
    if names_entities(extra["classes"]):
        found = f1_estimate(said, true, sentences, extra["classes"], seed=seed)
        estimates = estimates if found is None else [found, *estimates]
    if teacher_outputs is not None:
        teacher = np.asarray(teacher_outputs)[mask][known].argmax(axis=1) == true
        estimates.append(accuracy_ratio(right, teacher, groups=sentences, seed=seed))
    sure = softmax(logits).max(axis=1)
    estimates.append(expected_calibration_error(sure, right, groups=sentences, seed=seed, protocol=protocol))
    return estimates


def accuracy_ratio(right: Array, teacher: Array, *, groups: npt.ArrayLike | None = None, seed: int = 0) -> Estimate:
    """Accuracy over the teacher's, from what each got right ``[n]`` on the same examples; paired bootstrap of examples
    or of ``groups`` of them."""
    if not np.any(teacher):
        raise BadInput("the teacher gets no example right: there is no ratio", hint="check the labels of the task")

    def ratio(drawn: Array) -> Array:
        means = drawn.mean(axis=1)
        return np.asarray(np.divide(means[:, 0], means[:, 1], out=np.ones(len(means)), where=means[:, 1] > 0))

    pairs = np.stack([right, teacher], axis=1).astype(np.float64)
    value = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    units = len(pairs) if groups is None else len(np.unique(np.asarray(groups)))
    low, high = bootstrap_interval(pairs, ratio, groups=groups, seed=seed) if units > 1 else (None, None)
    protocol = {"derived_from": "accuracy of both on the same examples", "teacher_accuracy": float(pairs[:, 1].mean())}
    return Estimate("accuracy_ratio", Summary(value, "derived", len(pairs), low, high), (), protocol)


def fit_probe(x: Array, y: Array, classes: int, *, c: float = 1.0) -> tuple[Doubles, Doubles]:
    """Logistic regression ``min ½‖W‖² + C Σ loss``, intercept not penalised: ``W [K, D]`` and ``b [K]``.

    Two classes: one sigmoid (``K = 1``); more: softmax (``K = classes``). L-BFGS from zero in float64, so the same
    data give the same probe.
    """
    from scipy.optimize import minimize

    features = np.asarray(x, np.float64)
    width = features.shape[1]
    rows = 1 if classes == 2 else classes
    targets = np.eye(classes)[y][:, -1:] if rows == 1 else np.eye(classes)[y]

    def objective(flat: Doubles) -> tuple[float, Doubles]:
        weight, bias = flat[: rows * width].reshape(rows, width), flat[rows * width :]
        scores = features @ weight.T + bias
        if rows == 1:
            probabilities = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
            loss = float(np.sum(np.logaddexp(0, scores) - targets * scores))
        else:
            top = scores.max(axis=1, keepdims=True)
            total = np.log(np.exp(scores - top).sum(axis=1, keepdims=True)) + top
            probabilities = np.exp(scores - total)
            loss = float(np.sum(total) - np.sum(scores * targets))
        difference = probabilities - targets
        slope = np.concatenate([(weight + c * difference.T @ features).ravel(), c * difference.sum(axis=0)])
        return c * loss + 0.5 * float(np.sum(weight**2)), slope

    start = np.zeros(rows * width + rows)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-12})
    return found.x[: rows * width].reshape(rows, width), found.x[rows * width :]


def predict_probe(x: Array, probe: tuple[Doubles, Doubles]) -> npt.NDArray[np.int64]:
    """Classes ``[N]`` by a probe from :func:`fit_probe`."""
    return np.asarray(_probe_logits(x, probe).argmax(axis=1), np.int64)


def _probe_logits(x: Array, probe: tuple[Doubles, Doubles]) -> Doubles:
    """Logits ``[N, classes]``; those of a single sigmoid are 0 and its score."""
    scores = np.asarray(x, np.float64) @ probe[0].T + probe[1]
    return np.concatenate([np.zeros_like(scores), scores], axis=1) if scores.shape[1] == 1 else scores


def first_choices(
    task: str, outputs: Array, labels: Array, train: int, classes: int
) -> tuple[npt.NDArray[np.bool_], Doubles]:
    """Whether the first choice is right, and its probability, for each of the rows after the first ``train``.

    ``outputs`` are class logits ``[N, C]`` or embeddings ``[N, D]``, on whose first ``train`` rows a probe is fitted.
    """
    if task == "text-classification":
        if outputs.shape[1] < classes:
            raise BadInput(f"{outputs.shape[1]} logits for {classes} labels", hint="the task is not the model's")
        logits = np.asarray(outputs[train:], np.float64)
    else:
        logits = _probe_logits(outputs[train:], fit_probe(outputs[:train], labels[:train], classes))
    return np.asarray(logits.argmax(axis=1) == labels[train:]), softmax(logits).max(axis=1)
