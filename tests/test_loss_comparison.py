"""Losses compared over seeds, on tiny models: figures, winners, going on, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edgestill.errors import EdgestillError, RecipeError, UsageError
from edgestill.files import hash_tree
from edgestill.loss_comparison import LossCompareConfig, compare_losses, parse_losses
from edgestill.schemas import FOLDER
from edgestill.stages import Observer

RECIPE = """
name = "tiny"
[teacher]
source = "{teacher}"
[student]
layers = {layers}
[data]
max_length = 32
[[data.text]]
name = "words"
source = "{text}"
train = 64
dev = 16
test = 24
{more}
{distill}
[bench]
threads = 1
tokens = 150
window = 16
"""
DISTILL = """
[distill]
loss = {{ {loss} = 1.0 }}
max_steps = {steps}
batch_size = 8
learning_rate = 2e-3
save_every = 2
threads = 1
seed = 7
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(sentences))
    return path


def recipe(folder: Path, teacher: Path, text: Path, *, loss: str, steps: int = 3, more: str = "",
           layers: int = 2, distill: str = DISTILL) -> Path:  # fmt: skip
    path = folder / "tiny.toml"
    section = distill.format(loss=loss, steps=steps)
    path.write_text(RECIPE.format(teacher=teacher, text=text, more=more, distill=section, layers=layers))
    return path


class Count(Observer):
    def __init__(self) -> None:
        self.ran: list[str] = []

    def finished(self, name: str, seconds: float, note: str) -> None:
        self.ran.append(name)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text: Path) -> tuple[Path, Any]:
    """A decoder taught by two losses over two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    path = recipe(folder, tiny_llama, text, loss="forward_kl")
    return folder, compare_losses(LossCompareConfig(path, ("forward_kl", "jsd:0.3"), 2, folder / "runs"))


@pytest.mark.whole
def test_every_figure_is_there_for_every_loss(compared: tuple[Path, Any]) -> None:
    folder, result = compared
    assert result.seeds == (7, 8)
    assert [row.loss for row in result.rows] == ["forward_kl", "jsd:0.3"]
    wanted = {f"{name}@words" for name in ("kl", "top1_agreement", "perplexity", "ece", "next_token_accuracy")}
    for row in result.rows:
        assert set(row.metrics) == wanted
        assert row.tokens_seen > 0
        for found in row.metrics.values():
            assert len(found.values) == 2
            assert found.mean == pytest.approx(np.mean(found.values))
            assert found.low <= found.mean <= found.high
    assert {(w.metric, w.data) for w in result.winners} == {tuple(key.split("@")) for key in wanted}
    assert set(result.baselines) == {"teacher", "untrained-cut"}
    assert result.baselines["teacher"]["perplexity@words"] > 1
    assert (folder / "runs/tiny/losses/jsd-0.3/seed-8/student/model.safetensors").is_file()


def test_figures_are_those_of_the_test_split_and_of_that_student(compared: tuple[Path, Any]) -> None:
    """KL and accuracy of one student, once more by hand: transformers, a softmax, a sum."""
    import torch
    from scipy.special import log_softmax
    from transformers import AutoModelForCausalLM

    folder, result = compared
    reference = folder / "runs/tiny/work/references/words/teacher"
    ids, mask = (np.load(reference / f"{name}.npy") for name in ("ids", "mask"))
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny/losses/jsd-0.3/seed-8/student")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny/teacher")
    kl, right = [], []
    for row, real in zip(ids, mask, strict=True):
        tokens = torch.tensor(row[real == 1][None])
        with torch.no_grad():
            p, q = (log_softmax(m(tokens).logits[0].double().numpy(), axis=-1)[:-1] for m in (teacher, model))
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        right += (q.argmax(-1) == tokens[0, 1:].numpy()).tolist()
    found = result.rows[1].metrics
    assert found["kl@words"].values[1] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["next_token_accuracy@words"].values[1] == pytest.approx(np.mean(right))


def test_the_same_again_does_nothing_and_more_seeds_only_the_new_ones(compared: tuple[Path, Any]) -> None:
    folder, first = compared
    seen = Count()
    config = LossCompareConfig(folder / "tiny.toml", ("forward_kl", "jsd:0.3"), 2, folder / "runs")
    again = compare_losses(config, seen)
    assert not [name for name in seen.ran if "seed" in name]
    assert dataclasses.replace(again, unchanged=()) == dataclasses.replace(first, unchanged=())
    seen = Count()
    more = compare_losses(dataclasses.replace(config, losses=("forward_kl", "jsd:0.3", "reverse_kl"), seeds=1), seen)
    assert [name for name in seen.ran if "seed" in name] == ["reverse_kl, seed 7"]
    assert all(winner.winner is None for winner in more.winners)  # one seed
    assert more.rows[0].metrics["kl@words"].values == first.rows[0].metrics["kl@words"].values[:1]


def test_a_damaged_student_is_made_again(compared: tuple[Path, Any]) -> None:
    folder, first = compared
    student = folder / "runs/tiny/losses/forward_kl/seed-7/student"
    before = hash_tree(student)
    (student / "config.json").write_text("{}")
    again = compare_losses(
        LossCompareConfig(folder / "tiny.toml", ("forward_kl", "jsd:0.3"), 2, folder / "runs")
    )  # fmt: skip
    assert hash_tree(student) == before
    assert again.rows[0].metrics == first.rows[0].metrics


def test_the_document_fits_its_schema(compared: tuple[Path, Any]) -> None:
    document = json.loads(json.dumps(dataclasses.asdict(compared[1]), allow_nan=False))
    jsonschema.validate(document, json.loads((FOLDER / "loss_comparison.json").read_text()))


def test_the_table_marks_who_wins(compared: tuple[Path, Any], capfd: pytest.CaptureFixture[str]) -> None:
    from edgestill.bench.spread import spread
    from edgestill.show import show

    result = compared[1]
    show(result)
    plain = capfd.readouterr().err
    assert "±" in plain
    assert "untrained-cut" in plain
    rows = [
        dataclasses.replace(row, metrics={"kl@words": spread(values)})
        for row, values in zip(result.rows, ([0.1, 0.11], [0.9, 0.91]), strict=True)
    ]
    from edgestill.loss_comparison import _winners

    show(dataclasses.replace(result, rows=tuple(rows), winners=_winners(rows)))
    assert "★ 0.105 ± 0.0071" in capfd.readouterr().err


@pytest.mark.whole
def test_embeddings_share_one_cache_and_are_probed(tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.csv"
    rows = [f"{line},{index % 2}" for index, line in enumerate(text.read_text().splitlines())]
    labelled.write_text("text,label\n" + "\n".join(rows))
    more = f'[[data.task]]\nname = "parity"\nsource = "{labelled}"\ntrain = 40\ntest = 20\n'
    path = recipe(tmp_path, tiny_bert, text, loss="embedding_cosine", more=more)
    losses = ("embedding_cosine", "embedding_cosine=0.5+embedding_gram=2")
    result = compare_losses(LossCompareConfig(path, losses, 1, tmp_path / "runs"))
    for row in result.rows:
        assert set(row.metrics) == {"spearman@words", "cosine@words", "accuracy@parity", "ece@parity"}
    assert result.rows[1].weights == {"embedding_cosine": 0.5, "embedding_gram": 2.0}
    assert set(result.baselines["teacher"]) == {"accuracy@parity", "ece@parity"}
    signal_folder = tmp_path / "runs/tiny/losses/signal"
    assert len(list(signal_folder.iterdir())) == 1, "one cache serves all students"
    assert not list((tmp_path / "runs/tiny/losses").glob("*/seed-*/work/teacher-*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from edgestill.loss_comparison import LossCompareConfig, compare_losses
from edgestill.stages import Observer

class Killer(Observer):
    count = 0
    def advanced(self, message, fraction=None):
        if message.startswith({where!r}):
            Killer.count += 1
            if Killer.count == {after}:
                os.kill(os.getpid(), signal.SIGKILL)

compare_losses(LossCompareConfig(Path({recipe!r}), ("forward_kl", "jsd:0.3"), 1, Path({runs!r})), Killer())
"""


@pytest.mark.whole
def test_killed_and_called_again_it_ends_as_if_undisturbed(
    compared: tuple[Path, Any], tmp_path: Path, tiny_llama: Path, text: Path
) -> None:
    folder, whole = compared
    path = recipe(tmp_path, tiny_llama, text, loss="forward_kl")
    code = KILLED.format(where="step", after=5, recipe=str(path), runs=str(tmp_path / "runs"))
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seen = Count()
    result = compare_losses(LossCompareConfig(path, ("forward_kl", "jsd:0.3"), 1, tmp_path / "runs"), seen)
    assert [name for name in seen.ran if "seed" in name] == ["jsd:0.3, seed 7"], "the first student was finished"
    for mine, theirs in zip(result.rows, whole.rows, strict=True):
        for key, found in mine.metrics.items():
            assert found.values == theirs.metrics[key].values[:1]
    for loss in ("forward_kl", "jsd-0.3"):
        weights = [root / f"runs/tiny/losses/{loss}/seed-7/student/model.safetensors" for root in (folder, tmp_path)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_wrong_is_said_before_anything_is_taught(
    tiny_bert: Path, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, tiny_llama, text, loss="forward_kl")

    def error(*losses: str, seeds: int = 2, at: Path = path) -> EdgestillError:
        with pytest.raises(EdgestillError) as caught:
            compare_losses(LossCompareConfig(at, losses, seeds, tmp_path / "runs"))
        return caught.value

    unknown = error("forward_kl", "revers_kl")
    assert "revers_kl" in unknown.message
    assert "reverse_kl" in unknown.hint
    assert isinstance(error("forward_kl", seeds=0), UsageError)
    assert "beta" in error("jsd:1.5").message
    assert "twice" in error("jsd", "jsd:0.5").message
    assert not (tmp_path / "runs").exists(), "not even the teacher was fetched"
    fits = error("forward_kl", "embedding_cosine")
    assert isinstance(fits, RecipeError)
    assert "embedding_cosine" in fits.message
    assert "forward_kl" in fits.hint
    assert not (tmp_path / "runs/tiny/losses").exists()
    bare = recipe(tmp_path, tiny_bert, text, loss="x", distill="")
    assert "no [distill] section" in error("embedding_cosine", at=bare).message


def test_sums_are_read_and_nonsense_in_them_is_refused() -> None:
    assert parse_losses([" forward_kl ", "skew_kl"]) == {
        "forward_kl": {"forward_kl": 1},
        "skew_kl:0.1": {"skew_kl:0.1": 1},
    }
    assert parse_losses(["forward_kl=2"]) == {"forward_kl=2": {"forward_kl": 2}}
    for bad in (["forward_kl=x"], ["forward_kl=0"], ["forward_kl=-1"], ["forward_kl=nan"], ["jsd+jsd:0.5"], [""], []):
        with pytest.raises(UsageError):
            parse_losses(bad)


def test_students_with_a_trimmed_vocabulary_are_measured_on_their_own_ids(
    tiny_bert: Path, text: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, tiny_bert, text, loss="embedding_cosine", steps=1)
    path.write_text(path.read_text().replace("layers = 2", "layers = 2\nvocabulary = 100"))
    result = compare_losses(LossCompareConfig(path, ("embedding_cosine",), 1, tmp_path / "runs"))
    student, teacher = (
        json.loads((tmp_path / "runs/tiny" / place / "config.json").read_text())["vocab_size"]
        for place in ("losses/embedding_cosine/seed-7/student", "teacher")
    )
    assert student < teacher
    assert 0 < result.rows[0].metrics["spearman@words"].mean <= 1
    assert 0 < result.baselines["untrained-cut"]["spearman@words"] <= 1
