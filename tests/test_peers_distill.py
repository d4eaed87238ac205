"""The figures about distillation: all there, references and judgements right; those that are cheap for real."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgestill.distill.losses import LOSSES
from edgestill.errors import EdgestillError
from edgestill.recipe import load_recipe
from tests.peers import quality, references, registry
from tests.peers.__main__ import exit_code, measure
from tests.peers.context import Context
from tests.peers.environments import SENTENCE_TRANSFORMERS, TRL
from tests.peers.groups import distill_losses, distill_resume, distill_steps
from tests.peers.registry import select

ROOT = Path(__file__).resolve().parent.parent

# What issue 3 asks for, with its limits.
ASKED = {
    "loss_reference": ("at_most", 1e-6), "chunked_equals_dense": ("at_most", 1e-5), "step_live": ("at_most", 1.05),
    "chunked_memory": ("at_most", 0.35), "trl_ratio": ("at_most", 1.0), "resume_identical": ("at_least", 1.0),
    "minilm_spearman": ("at_least", 0.95), "st_recipe": ("at_least", 0.0), "smollm2_kd_vs_ce": ("at_most", 1.0),
    "vocab_trim": ("at_least", 0.99), "step_cached": ("at_most", 1.10), "cache_bytes": ("at_most", 300.0),
}  # fmt: skip
VARIANTS = {"st_recipe": ("hour", "quarter")}
SLOW = {"minilm_spearman", "st_recipe", "smollm2_kd_vs_ce"}


@pytest.fixture(scope="module", autouse=True)
def _groups() -> None:
    registry.load_groups()


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tiny=True, repeats=1, threads=1)


def test_every_figure_that_was_asked_for_is_there() -> None:
    for name, (sense, limit) in ASKED.items():
        one = registry.FIGURES[name]
        assert (one.group, one.sense, one.limit) == ("distill", sense, limit)
        assert one.variants == VARIANTS.get(name, ())
        assert bool(one.slow) == (name in SLOW)


def test_slow_figures_are_left_out_unless_asked_for(context: Context) -> None:
    out = {s.figure.id for s in select(["distill"]) if s.left_out}
    assert out == SLOW == {s.figure.id for s in select([]) if s.left_out and s.figure.group == "distill"}
    assert not any(s.left_out for s in select(["distill"], slow=True))
    assert not any(s.left_out for s in select(["distill", *SLOW]))
    rows = [measure(s, context) for s in select(["distill"]) if s.left_out]
    assert {row.figure.partition("[")[0] for row in rows} == SLOW
    assert all((row.value, row.holds, row.status) == (None, None, "left out") for row in rows)
    assert exit_code(rows) == 0  # a row without a value is no measurement, and says how to get one
    assert all("--slow" in row.how for row in rows)


def test_pins_are_those_that_we_lock() -> None:
    locked = set((ROOT / "constraints.txt").read_text().replace("_", "-").splitlines())
    for environment in (TRL, SENTENCE_TRANSFORMERS):
        own, *shared = environment.pins
        assert own.startswith(environment.name)
        assert {pin for pin in shared if not pin.startswith("datasets")} <= locked


def test_references_agree_with_closed_forms() -> None:
    """Two outcomes each: what the formulas give by hand."""
    p, q = np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])
    student, teacher = np.log(q), np.log(p)
    ids = np.array([0])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    known = {
        ("forward_kl",): kl, ("reverse_kl",): reverse, ("total_variation",): 0.25, ("cross_entropy",): math.log(2),
        ("jsd", 0.0): kl, ("jsd", 1.0): reverse, ("skew_kl", 0.0): kl, ("skew_reverse_kl", 0.0): reverse,
        ("alpha_beta", 1.0, 0.0): kl, ("alpha_beta", 0.0, 1.0): reverse,
        ("alpha_beta", 0.5, 0.5): 2 * ((0.75**0.5 - 0.5**0.5) ** 2 + (0.25**0.5 - 0.5**0.5) ** 2),
        ("jsd", 0.5): 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
        + 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)),
        ("universal_logit",): 0.5,
        ("logit_mse",): (math.log(1.5) ** 2 + math.log(2) ** 2) / 2,
    }  # fmt: skip
    for (name, *parameters), value in known.items():
        found = references.VALUES[name](student, teacher, ids, 1.0, *parameters)
        assert found == pytest.approx(value, rel=1e-12), name
    assert set(references.VALUES) == {key[0] for key in known}


@pytest.mark.parametrize("name", list(distill_losses.LOGIT_LOSSES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_references_are_the_same(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    ids = torch.randint(11, (5,))
    parameters = LOSSES[name].parameters
    first = references.VALUES[name](student.numpy(), teacher.numpy(), ids.numpy(), temperature, *parameters)
    second = references.GRADIENTS[name](student, teacher, ids, temperature, *parameters)
    assert second.numpy() == pytest.approx(first, rel=1e-9)


def test_every_loss_has_a_reference() -> None:
    named = {error.what.split(":")[0].split()[0] for error in distill_losses._feature_errors()}
    assert named | set(references.VALUES) == set(LOSSES)


def test_chunked_equals_dense(context: Context) -> None:
    [subject] = select(["chunked_equals_dense"])
    row = measure(subject, context)
    assert row.holds is True, row.how
    assert row.value > 0


def test_a_wrong_gradient_is_seen(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = distill_losses.chunked_head

    def wrong(hidden: torch.Tensor, head: torch.nn.Module, loss: object, rows: int) -> object:
        return honest(hidden[:-1], head, loss, rows)  # forgets the last token

    monkeypatch.setattr(distill_losses, "chunked_head", wrong)
    [subject] = select(["chunked_equals_dense"])
    assert measure(subject, context).holds is False


def test_a_value_that_is_no_number_is_the_worst_error() -> None:
    found = distill_losses._compare(torch.tensor([1.0, math.nan]), np.array([1.0, 2.0]), "x")
    assert math.isinf(found.value)


@pytest.mark.slow
def test_memory_sides_compute_the_same_loss(context: Context) -> None:
    """Live and cached; each compares value and gradients of both processes itself, and fails where they differ."""
    for name in ("chunked_memory", "chunked_memory_cached"):
        [subject] = select([name])
        row = measure(subject, context)
        assert (row.status, row.holds) == ("measured", None), row.how
        assert row.value > 0


@pytest.mark.slow
def test_step_sides_do_the_same_work(context: Context) -> None:
    """Ours and transformers' Trainer: the figure itself compares the losses of each step."""
    [subject] = select(["step_own"])
    row = measure(subject, context)
    assert (row.status, row.holds) == ("measured", None), row.how
    assert "busy" not in row.how or row.value > 0


def test_sides_that_do_other_work_are_refused(context: Context) -> None:
    class Other:
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def ask(self, request: dict[str, str]) -> dict[str, float]:
            return {"seconds": 1.0, "loss": self.loss}

    turns = [("own", "step"), ("plain", "step")]
    samples: distill_steps.Samples = {turn: [] for turn in turns}
    distill_steps._round({"own": Other(2.0), "plain": Other(2.0001)}, turns, samples, 0)  # type: ignore[dict-item]
    assert [len(taken[0]) for taken in samples.values()] == [2 * distill_steps.BLOCKS] * 2
    with pytest.raises(EdgestillError, match="same work"):
        distill_steps._round({"own": Other(2.0), "plain": Other(2.1)}, turns, samples, 0)  # type: ignore[dict-item]


@pytest.mark.slow
def test_cached_sides_run_and_bytes_are_counted(context: Context) -> None:
    rows = {s.name: measure(s, context) for s in select(["step_cached", "cache_bytes", "cache_reading"])}
    assert (rows["cache_bytes"].holds, rows["step_cached"].status) == (True, "measured"), rows
    assert 272 <= rows["cache_bytes"].value < 280  # 64 ids and offsets, 16 bytes of numbers; header and checksums
    assert rows["cache_reading"].value > 0


@pytest.mark.slow
def test_killed_runs_end_alike(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(distill_resume.CASES.items()))
    monkeypatch.setattr(distill_resume, "CASES", dict([case]))
    monkeypatch.setattr(distill_resume, "KILLS", (4,))
    [subject] = select(["resume_identical"])
    row = measure(subject, context)
    assert (row.value, row.holds) == (1.0, True), row.how
    assert "1 lives ended" in row.how


def test_spearman_and_its_interval() -> None:
    teacher = np.random.default_rng(0).normal(size=(40, 8))
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    assert quality.spearman(teacher, teacher) == pytest.approx(1)
    noisy = teacher + 0.3 * np.random.default_rng(1).normal(size=teacher.shape)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    value = quality.spearman(noisy, teacher)
    low, high = quality.spearman_draws(teacher, lambda chosen: quality.spearman(noisy[chosen], teacher[chosen]))
    assert low < value < high < 1


@pytest.mark.parametrize("path", sorted(quality.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.distill is not None or path.stem.endswith("-export") or path.stem.startswith("vocabulary")
    assert recipe.data.text[0].test or recipe.task == "text-generation"
