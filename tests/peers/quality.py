"""Distilling by a recipe of ``recipes/``, for the figures about quality; tiny models and texts with ``--tiny``."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from edgestill.bench.statistics import bootstrap_interval
from edgestill.checkpoints import ModelFolder
from edgestill.data import DataSets, TextSet, load_data
from edgestill.distill import DistillResult, distill
from edgestill.errors import EdgestillError
from edgestill.recipe import Recipe, load_recipe

from .context import Context
from .models import Kind
from .processes import PROGRAMS, launch
from .registry import Unavailable

__all__ = ["Trained", "encode", "held_out_data", "spearman", "spearman_draws", "train"]

RECIPES = Path(__file__).resolve().parent / "recipes"
DRAWS = 200
Vectors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A student, the recipe and data that made it, and its teacher."""

    result: DistillResult
    recipe: Recipe
    data: DataSets
    teacher: ModelFolder


def train(context: Context, name: str, kind: Kind, **changes: Any) -> Trained:
    """Distil by ``recipes/NAME.toml`` with these keys of ``[distill]`` instead of its own, once an invocation."""

    def take() -> Trained:
        teacher = context.model(kind)
        recipe = load_recipe(RECIPES / f"{name}.toml")
        data = held_out_data(context, name)
        assert recipe.distill is not None
        small = {"max_steps": 4, "batch_size": 4} if context.tiny else {}
        config = recipe.distill.model_copy(update={"threads": context.threads, **small, **changes})
        student = recipe.student.model_copy(update={"layers": 1}) if context.tiny else recipe.student
        out = context.scratch / "-".join([name, *(f"{value}" for value in changes.values() if isinstance(value, int)),
                                          *config.loss])  # fmt: skip
        work = out.with_name(out.name + "-work")
        try:
            result = distill(
                teacher.path, out, student=student, config=config, data=data, max_length=recipe.data.max_length,
                work=work, progress=context.progress,
            )  # fmt: skip
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Trained(result, recipe, data, teacher)

    return context.once(("train", name, json.dumps(changes, sort_keys=True)), take)


def held_out_data(context: Context, name: str) -> DataSets:
    """The split texts of ``recipes/NAME.toml``."""

    def take() -> DataSets:
        try:
            return load_data(load_recipe(RECIPES / f"{name}.toml").data, base=RECIPES, progress=context.progress)
        except EdgestillError as error:
            raise Unavailable(str(error)) from error

    return _words() if context.tiny else context.once(("data", name), take)


def _words() -> DataSets:
    from ..conftest import WORDS

    chooser = random.Random(0)
    texts = sorted({" ".join(chooser.choices(WORDS, k=chooser.randint(4, 12))) for _ in range(120)})
    return DataSets((TextSet("words", tuple(texts[:60]), (), tuple(texts[60:80]), tuple(texts[80:]), "0" * 64),), ())


def encode(context: Context, model: Path, texts: list[str]) -> Vectors:
    """Unit vectors ``[N, D]``, by transformers alone in a process of its own."""
    given, out = context.scratch / "texts.json", context.scratch / "vectors.npy"
    given.write_text(json.dumps(texts))
    launch([sys.executable, "-P", PROGRAMS / "encode_plain.py", model, given, out], threads=context.threads)
    found: Vectors = np.load(out).astype(np.float64)
    return found


def spearman(student: Vectors, teacher: Vectors) -> float:
    """Rank correlation of the cosines of all pairs of texts."""
    pairs = np.triu_indices(len(student), 1)
    return float(spearmanr((student @ student.T)[pairs], (teacher @ teacher.T)[pairs]).statistic)


def spearman_draws(teacher: Vectors, value: Callable[[npt.NDArray[np.int64]], float]) -> tuple[float, float]:
    """The 95 % interval of ``value(chosen texts)`` over texts drawn again, each text at most once in a draw: a pair of
    a text with itself would count as agreement."""

    def reduce(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.array([value(np.unique(row.astype(np.int64))) for row in rows])

    return bootstrap_interval(np.arange(len(teacher)), reduce, resamples=DRAWS)
