"""How good a halved sentence encoder becomes, and whether that is better than sentence-transformers' own recipe."""

from __future__ import annotations

import json

from edgestill.errors import EdgestillError

from ..context import Context
from ..environments import SENTENCE_TRANSFORMERS
from ..processes import PROGRAMS, launch
from ..quality import Trained, encode, spearman, spearman_draws, train
from ..registry import Taken, figure
from ..workloads import write_spec

RECIPE = "minilm-hour"
BUDGETS = {"hour": RECIPE, "quarter": "minilm-quarter"}  # sentences and time that both sides get, by recipe
HELD_OUT = 600
_HOUR_SECONDS = 3600.0
_LEAST = 0.95


@figure(
    "minilm_spearman", group="distill", title="MiniLM 6 -> 3 layers: Spearman against the teacher, all pairs of "
    f"{HELD_OUT} held-out sentences", unit="rho", limit=_LEAST, sense="at_least", peer="the teacher",
    slow="up to an hour on two cores",
)  # fmt: skip
def minilm_spearman(context: Context, variant: str) -> Taken:
    trained = _trained(context)
    texts = _held_out(trained)
    teacher, student = (encode(context, path, texts) for path in (trained.teacher.path, trained.result.path))
    value = spearman(student, teacher)
    interval = spearman_draws(teacher, lambda chosen: spearman(student[chosen], teacher[chosen]))
    return Taken(value, _how(context, trained, len(texts)), interval, void=_void(context))


@figure(
    "st_recipe", group="distill", title="Spearman of the same student less that of sentence-transformers' "
    "model distillation", unit="rho", limit=0.0, sense="at_least",
    peer="sentence-transformers: embeddings by MSELoss, same layers, sentences and wall time",
    variants=tuple(BUDGETS), environment=SENTENCE_TRANSFORMERS, slow="two hours on two cores; the quarter half an hour",
)  # fmt: skip
def st_recipe(context: Context, variant: str) -> Taken:
    prepared = context.environment(SENTENCE_TRANSFORMERS)
    trained = _trained(context, BUDGETS[variant])
    texts = _held_out(trained)
    theirs = context.scratch / "st-student"
    spec = write_spec(
        context.scratch / "st.json", teacher=str(trained.teacher.path), keep=list(trained.result.keep),
        texts=trained.data.split("train"), length=trained.recipe.data.max_length, out=str(theirs),
        work=str(context.scratch / "st-work"), seconds=trained.result.seconds, trial_steps=2 if context.tiny else 20,
    )  # fmt: skip
    answer = context.scratch / "st-answer.json"
    context.progress("sentence-transformers' model distillation")
    launch([prepared.python, "-P", PROGRAMS / "distill_st.py", spec, answer], threads=context.threads)
    facts = json.loads(answer.read_text())
    teacher, ours, other = (
        encode(context, path, texts) for path in (trained.teacher.path, trained.result.path, theirs)
    )  # fmt: skip
    value = spearman(ours, teacher) - spearman(other, teacher)
    interval = spearman_draws(
        teacher,
        lambda chosen: spearman(ours[chosen], teacher[chosen]) - spearman(other[chosen], teacher[chosen]),
    )
    how = (
        f"{spearman(ours, teacher):.4f} less {spearman(other, teacher):.4f}; sentence-transformers "
        f"{facts['version']}: {facts['steps']} steps in {facts['seconds']:.0f} s; ours: "
    )
    return Taken(value, how + _how(context, trained, len(texts)), interval, void=_void(context))


def _trained(context: Context, recipe: str = RECIPE) -> Trained:
    trained = train(context, recipe, "encoder")
    if trained.result.seconds > _HOUR_SECONDS:
        raise EdgestillError(f"the recipe took {trained.result.seconds:.0f} s, more than the hour that it may take")
    return trained


def _held_out(trained: Trained) -> list[str]:
    """Test sentences of the first text, which training has not seen."""
    return list(trained.data.text[0].test[:HELD_OUT])


def _how(context: Context, trained: Trained, count: int) -> str:
    assert trained.recipe.distill is not None
    pairs = count * (count - 1) // 2
    return (
        f"{trained.recipe.name}.toml: {trained.result.steps} steps in {trained.result.seconds:.0f} s on "
        f"{context.threads} threads, "
        f"{len(trained.data.split('train')):,} sentences; {pairs:,} pairs of {count} held-out sentences, vectors by "
        "transformers; sentences drawn again for the interval"
    )


def _void(context: Context) -> str:
    return "a tiny model" if context.tiny else ""
