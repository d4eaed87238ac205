"""Accuracy of models that label tokens: over words, and over the entities that words make up.

An entity is found when its first word, its last word and its kind are right (the CoNLL-2003 measure, Tjong Kim Sang and
De Meulder, W03-0419). Labels are read as that task's own scorer does: B- and S- begin an entity, I- and E- go on with
one of the same kind and begin one otherwise, E- and S- end it, O and everything without a prefix is outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .fidelity import Estimate
from .records import Summary
from .statistics import bootstrap_interval

__all__ = ["entities", "f1_estimate", "names_entities"]

Array = npt.NDArray[Any]
Entity = tuple[str, int, int]


def names_entities(labels: Sequence[str]) -> bool:
    """Whether labels mark beginnings and insides of entities (``B-PER``), not just kinds of words (``NOUN``).

    >>> names_entities(["O", "B-PER", "I-PER"]), names_entities(["NOUN", "VERB"])
    (True, False)
    """
    return any(label.startswith(("B-", "I-")) for label in labels)


def entities(tags: Sequence[str]) -> set[Entity]:
    """``(kind, first word, last word)`` of each entity.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found: set[Entity] = set()
    kind, begin = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        inside = mark in ("B", "I", "E", "S") and bool(name)
        if kind and not (inside and mark in ("I", "E") and name == kind):
            found.add((kind, begin, place - 1))
            kind = ""
        if inside and not kind:
            kind, begin = name, place
        if kind and mark in ("E", "S"):
            found.add((kind, begin, place))
            kind = ""
    return found


def f1_estimate(
    said: npt.ArrayLike, true: npt.ArrayLike, sentences: Array, labels: Sequence[str], *, seed: int = 0
) -> Estimate | None:
    """F1 over entities; ``said`` and ``true`` are labels of words, ``sentences`` (ascending) whose words they are.

    The interval resamples sentences. ``None`` when no sentence has an entity: there is nothing to find.
    """
    names = np.asarray(labels, dtype=object)
    rows = []
    for sentence in np.unique(sentences):
        inside = sentences == sentence
        ours, theirs = (entities(names[np.asarray(which)[inside]].tolist()) for which in (said, true))
        rows.append((len(ours & theirs), len(ours), len(theirs)))
    counts = np.asarray(rows, dtype=np.float64)
    right, found, there = counts.sum(axis=0)
    if not there:
        return None

    def f1(drawn: Array) -> Array:
        sums = drawn.sum(axis=1)
        both = sums[:, 1] + sums[:, 2]
        return np.asarray(np.divide(2 * sums[:, 0], both, out=np.ones(len(sums)), where=both > 0))

    low, high = bootstrap_interval(counts, f1, seed=seed) if len(counts) > 1 else (None, None)
    protocol = {
        "entities": int(there), "entities_found": int(found), "entities_right": int(right),
        "precision": float(right / found) if found else None, "recall": float(right / there),
        "independent_units": len(counts), "derived_from": "labels of words, entities as in CoNLL-2003",
    }  # fmt: skip
    value = float(2 * right / (found + there))
    return Estimate("f1", Summary(value, "derived", len(counts), low, high), (), protocol)
