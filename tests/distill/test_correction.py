from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgestill.checkpoints import open_model
from edgestill.data import DataSets, LabelledSet
from edgestill.distill import DistillResult, distill
from edgestill.errors import RecipeError
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig
from edgestill.recipe_training import CorrectionConfig


def _run(teacher: Path, place: Path, data: DataSets, loss: dict[str, float], **changes: Any) -> DistillResult:
    progress = changes.pop("progress", lambda text, part=None: None)
    layers = changes.pop("layers", 2)
    settings = {"batch_size": 8, "max_steps": 6, "learning_rate": 2e-3, "threads": 1, "save_every": 2, **changes}
    return distill(
        teacher, place / "out", config=DistillConfig(loss=loss, **settings), student=StudentConfig(layers=layers),
        data=data, max_length=32, work=place / "work", progress=progress,
    )  # fmt: skip


class _Cut(Exception):
    pass


def test_a_corrected_teacher_knows_the_text_better_and_teaches(tiny_llama: Path, tmp_path: Path, data: DataSets):
    before = hash_tree(tiny_llama)
    correction = CorrectionConfig(steps=5, learning_rate=5e-3)
    told: list[str] = []
    result = _run(tiny_llama, tmp_path / "a", data, {"forward_kl": 1.0}, correct_teacher=correction, evaluate_every=3,
                  patience=5, progress=lambda text, part=None: told.append(text))  # fmt: skip
    assert hash_tree(tiny_llama) == before  # a copy learned, not the teacher
    card = json.loads((result.path / "distillation.json").read_text())
    corrected = open_model(tmp_path / "a" / "work" / "teacher" / "model")
    assert card["teacher_id"] == open_model(tiny_llama).model_id
    assert card["corrected_teacher"]["id"] == corrected.model_id != card["teacher_id"]
    assert card["corrected_teacher"]["steps"] == 5
    facts = card["corrected_teacher"]
    assert facts["dev_after"]["cross_entropy"] < 0.95 * facts["dev_before"]["cross_entropy"]
    # Metrics are against the original teacher, and against the corrected one under names of their own.
    assert result.dev_after["teacher_cross_entropy"] == pytest.approx(facts["dev_before"]["cross_entropy"], rel=1e-9)
    assert result.dev_after["corrected_teacher_cross_entropy"] == pytest.approx(
        facts["dev_after"]["cross_entropy"], rel=1e-5
    )
    assert result.dev_after["corrected_kl"] < result.dev_before["corrected_kl"]
    measured = [row for row in result.curves if "waited" in row]
    best = min(measured, key=lambda row: row["dev"]["corrected_kl"])
    assert card["best_step"] == best["step"]
    assert any(text.startswith("teacher correction: step 5 ") for text in told)


@pytest.mark.whole
def test_a_correction_goes_on_where_it_was_cut_and_is_made_once(tiny_llama: Path, tmp_path: Path, data: DataSets):
    correction = CorrectionConfig(epochs=0.3, learning_rate=1e-3)

    def cut(text: str, part: float | None = None) -> None:
        if text.startswith("teacher correction: step 3 "):
            raise _Cut

    arguments: dict[str, Any] = {"loss": {"forward_kl": 1.0}, "correct_teacher": correction}
    whole = _run(tiny_llama, tmp_path / "whole", data, **arguments)
    with pytest.raises(_Cut):
        _run(tiny_llama, tmp_path / "cut", data, progress=cut, **arguments)
    told: list[str] = []
    again = _run(tiny_llama, tmp_path / "cut", data, progress=lambda text, part=None: told.append(text), **arguments)
    assert next(text for text in told if "step" in text).startswith("teacher correction: step 3 of 6")
    assert hash_tree(again.path) == hash_tree(whole.path)
    told.clear()
    other = _run(tiny_llama, tmp_path / "cut", data, progress=lambda text, part=None: told.append(text),
                 **{**arguments, "loss": {"reverse_kl": 1.0}})  # fmt: skip
    assert not any(text.startswith("teacher correction") for text in told)  # another student, the same teacher
    assert hash_tree(other.path) != hash_tree(whole.path)


def test_a_classifier_is_corrected_by_its_labels(classifier: Path, tmp_path: Path, data: DataSets):
    rows = tuple((text, 0) for text in data.split("train")[:40])
    labelled = DataSets(data.text, (LabelledSet("marks", ("good", "bad"), rows, (), "0" * 64),))
    result = _run(classifier, tmp_path, labelled, {"forward_kl": 1.0}, layers=1, learning_rate=5e-3,
                  correct_teacher=CorrectionConfig(steps=8, learning_rate=5e-3))  # fmt: skip
    assert result.dev_after["corrected_kl"] < result.dev_before["corrected_kl"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(RecipeError, match="labelled"):
        _run(classifier, tmp_path / "b", data, {"forward_kl": 1.0}, correct_teacher=CorrectionConfig(steps=1))


def test_an_embedding_has_no_right_answer(encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="no right embedding") as caught:
        _run(encoder, tmp_path, data, {"embedding_cosine": 1.0}, correct_teacher=CorrectionConfig(steps=1))
    assert caught.value.hint
    for wrong in ({}, {"steps": 1, "epochs": 1.0}):
        with pytest.raises(ValueError, match="either"):
            CorrectionConfig(**wrong)
