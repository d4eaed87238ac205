from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill.checkpoints import load_torch, open_model
from edgestill.data import DataSets, LabelledSet, TextSet
from edgestill.distill import DistillResult, distill
from edgestill.errors import BadInput, EdgestillError, RecipeError, ResourceExhausted
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig


def _config(loss: dict[str, float], **changes: Any) -> DistillConfig:
    plain = {"batch_size": 8, "epochs": 2.0, "learning_rate": 2e-3, "save_every": 10, "threads": 1}
    return DistillConfig(loss=loss, **{**plain, **changes})  # type: ignore[arg-type]


def _run(teacher: Path, place: Path, data: DataSets, config: DistillConfig, **changes: Any) -> DistillResult:
    arguments = {"student": StudentConfig(layers=2), "data": data, "max_length": 32, "work": place / "work", **changes}
    return distill(teacher, place / "out", config=config, **arguments)


EMBEDDING = {"embedding_cosine": 1.0, "embedding_gram": 1.0}


def test_an_encoder_learns(encoder: Path, tmp_path: Path, data: DataSets, capfd: pytest.CaptureFixture[str]):
    told: list[tuple[str, float | None]] = []
    config = _config({"embedding_cosine": 1.0, "embedding_gram": 10.0}, epochs=6.0)
    result = _run(encoder, tmp_path, data, config, progress=lambda text, part=None: told.append((text, part)))
    assert result.dev_after["spearman"] > result.dev_before["spearman"] + 0.05
    assert result.dev_after["cosine"] > result.dev_before["cosine"] + 0.5
    assert (result.keep, result.teacher_layers, result.steps) == ((0, 3), 4, 112)
    assert result.seconds > 0
    assert open_model(result.path).layers == 2
    assert told[-1][1] == 1.0
    assert capfd.readouterr() == ("", "")  # nothing prints


def test_the_journal_holds_the_raw_components(encoder: Path, tmp_path: Path, data: DataSets):
    weights = {"embedding_cosine": 2.0, "embedding_gram": 10.0}
    result = _run(encoder, tmp_path, data, _config(weights, warmup_ratio=0.0, schedule="constant"))
    rows = [json.loads(line) for line in (result.path / "training.jsonl").read_text().splitlines()]
    assert rows == [dict(row) for row in result.curves]
    assert rows[0] == {"step": 0, "tokens": 0, "dev": dict(result.dev_before)}
    assert rows[-1] == {"step": 38, "tokens": result.tokens_seen, "dev": dict(result.dev_after)}
    for number, row in enumerate(rows[1:-1], start=1):
        assert row["step"] == number
        assert row["loss"] == pytest.approx(sum(weight * row[name] for name, weight in weights.items()), rel=1e-5)
        assert row["learning_rate"] == 2e-3
    assert rows[-2]["tokens"] == result.tokens_seen
    card = json.loads((result.path / "distillation.json").read_text())
    assert card["losses"]["embedding_gram"] == {"weight": 10.0, "effective_weight": 10.0}
    assert card["steps"] == 38
    assert card["examples"] == 150


def test_the_first_logged_loss_is_that_of_the_cut(encoder: Path, tmp_path: Path, data: DataSets):
    everything = _config({"embedding_cosine": 1.0}, batch_size=150, max_steps=1)
    result = _run(encoder, tmp_path, data, everything)
    student_folder = tmp_path / "cut"
    distill(encoder, student_folder, student=StudentConfig(layers=2), config=None, data=data, max_length=32,
            work=tmp_path / "w")  # fmt: skip
    from edgestill.checkpoints import load_tokenizer

    batch = load_tokenizer(encoder)(data.split("train"), padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (load_torch(f)(batch["input_ids"], batch["attention_mask"]) for f in (student_folder, encoder))
    assert result.curves[1]["embedding_cosine"] == pytest.approx(1 - float((ours * theirs).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("loss", [{"forward_kl": 1.0}, {"forward_kl": 0.5, "cross_entropy": 0.5, "hidden_states": 0.2}])
def test_a_decoder_learns(tiny_llama: Path, tmp_path: Path, data: DataSets, loss: dict[str, float]):
    result = _run(tiny_llama, tmp_path, data, _config(loss, temperature=1.5, layer_map="skip"))
    assert result.dev_after["kl"] < 0.95 * result.dev_before["kl"]
    assert result.dev_after["teacher_cross_entropy"] == result.dev_before["teacher_cross_entropy"]
    assert result.tokens_seen == result.curves[-1]["tokens"]


INSIDE = {"attention_maps": 1.0, "attention_relations:2": 1.0, "hidden_states": 1.0}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "loss", "layer_map", "mapped"),
    [
        ("encoder", {"embedding_cosine": 1.0, **INSIDE}, "cka", None),
        ("tiny_llama", {"jsd:0.5": 1.0, **INSIDE}, (1, 2), [1, 2]),
    ],
)
def test_students_learn_from_inside_of_their_teachers(kind, loss, layer_map, mapped, tmp_path, data, request):
    teacher = request.getfixturevalue(kind)
    result = _run(teacher, tmp_path, data, _config(loss, layer_map=layer_map, learning_rate=1e-3))
    card = json.loads((result.path / "distillation.json").read_text())
    assert set(card["losses"]) == set(loss)
    found = card["layer_map"]
    assert found == (mapped or sorted(set(found)))
    assert len(found) == 2
    steps = [row for row in result.curves if "loss" in row]
    for name in loss:
        first, last = (np.mean([row[name] for row in rows]) for rows in (steps[:5], steps[-5:]))
        assert last < first, name
    # How attention was computed while learning is no part of the student.
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (teacher, result.path))
    assert set(ours) <= set(theirs) | {"dtype"}
    again = _run(teacher, tmp_path / "again", data, _config(loss, layer_map=layer_map, learning_rate=1e-3))
    assert hash_tree(again.path) == hash_tree(result.path)


def test_a_run_that_stopped_goes_on_to_the_same_bytes_with_a_learned_map(encoder, tmp_path, data):
    """The map is learned from the untrained student again, not from what the checkpoint holds."""
    config = _config({"embedding_cosine": 1.0, **INSIDE}, layer_map="cka", max_steps=8, save_every=3)

    class Stopped(Exception):
        pass

    def stop(text: str, part: float | None = None) -> None:
        if text.startswith("step 5 "):
            raise Stopped

    whole = _run(encoder, tmp_path / "whole", data, config)
    with pytest.raises(Stopped):
        _run(encoder, tmp_path / "parts", data, config, progress=stop)
    assert (tmp_path / "parts" / "work" / "checkpoint-3").is_dir()
    assert hash_tree(_run(encoder, tmp_path / "parts", data, config).path) == hash_tree(whole.path)


def test_an_encoder_learns_which_texts_are_near(encoder: Path, tmp_path: Path, data: DataSets):
    result = _run(encoder, tmp_path, data, _config({"contrastive_scores:0.1": 1.0}, epochs=6.0))
    assert result.dev_after["spearman"] > result.dev_before["spearman"] + 0.05


def test_a_map_of_layers_that_are_not_there_is_found_before_any_work(encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="layer_map names layer 4, the teacher has layers 0 to 3"):
        _run(encoder, tmp_path, data, _config({"hidden_states": 1.0}, layer_map=(0, 4)))
    assert not (tmp_path / "work").exists()


def test_a_classifier_learns_from_the_teacher_and_from_labels(classifier: Path, tmp_path: Path, data: DataSets):
    one = StudentConfig(layers=1)
    result = _run(classifier, tmp_path, data, _config({"forward_kl": 1.0}), student=one)
    assert result.dev_after["kl"] < result.dev_before["kl"]
    texts = data.split("train")
    # Labels in another order than the model's, all "good": the index must be mapped, not copied.
    rows = tuple((text, 0) for text in texts[:40])
    labelled = DataSets(data.text, (LabelledSet("marks", ("good", "bad"), rows, (), "0" * 64),))
    both = _config({"forward_kl": 0.01, "cross_entropy": 1.0}, epochs=4.0)
    result = _run(classifier, tmp_path / "both", labelled, both, student=one)
    losses = [row["cross_entropy"] for row in result.curves if row.get("cross_entropy")]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    from edgestill.checkpoints import load_tokenizer

    batch = load_tokenizer(classifier)(texts[:40], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = load_torch(result.path)(**batch).logits
    assert (logits.argmax(-1) == 2).float().mean() > 0.9  # "good" is the model's class 2


def test_labels_of_other_classes_are_not_taken(classifier: Path, tmp_path: Path, data: DataSets):
    other = DataSets(data.text, (LabelledSet("spam", ("ham", "spam"), (("x", 0),), (), "0" * 64),))
    with pytest.raises(RecipeError, match="labelled bad, fair, good"):
        _run(classifier, tmp_path, other, _config({"cross_entropy": 1.0}))


def test_a_teacher_that_is_the_student_is_refused(encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="nothing to learn") as caught:
        _run(encoder, tmp_path, data, _config(EMBEDDING, max_steps=2), student=StudentConfig())
    assert "layers" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_whole_teacher_may_learn_from_text(tiny_llama: Path, tmp_path: Path, data: DataSets):
    result = _run(tiny_llama, tmp_path, data, _config({"cross_entropy": 1.0}, max_steps=4), student=StudentConfig())
    assert result.dev_before["kl"] == pytest.approx(0.0, abs=1e-9)
    assert result.dev_after["cross_entropy"] < result.dev_before["cross_entropy"]


def test_texts_longer_than_the_model_are_cut_into_its_length(tiny_llama: Path, tmp_path: Path, data: DataSets):
    long = DataSets((TextSet("long", (" ".join(data.split("train")),), (), (), (), "0" * 64),), ())
    one = _config({"forward_kl": 1.0}, max_steps=1, batch_size=2)
    result = _run(tiny_llama, tmp_path, long, one, max_length=100_000)
    assert result.tokens_seen == 2 * 128  # two windows of the model's 128 places


def test_equal_input_gives_equal_bytes_from_any_folder(encoder: Path, tmp_path: Path, data: DataSets):
    config = _config(EMBEDDING, max_steps=12, save_every=5)
    hashes = []
    for place in (tmp_path / "a", tmp_path / "somewhere" / "else"):
        copy = shutil.copytree(encoder, place / "teacher")
        hashes.append(hash_tree(_run(copy, place, data, config).path))
    assert hashes[0] == hashes[1]


def test_a_finished_job_is_not_run_again_and_a_changed_one_is(encoder: Path, tmp_path: Path, data: DataSets):
    config = _config(EMBEDDING, max_steps=12)
    first = _run(encoder, tmp_path, data, config)
    told: list[str] = []
    second = _run(encoder, tmp_path, data, config, progress=lambda text, part=None: told.append(text))
    assert (first, told) == (second, [])
    (first.path / "model.safetensors").write_bytes(b"")
    again = _run(encoder, tmp_path, data, config)
    assert dict(again.dev_after) == dict(first.dev_after)
    assert open_model(again.path).layers == 2
    other = _run(encoder, tmp_path, data, _config(EMBEDDING, max_steps=12, seed=1))
    assert hash_tree(other.path) != first
    assert dict(other.dev_after) != dict(first.dev_after)


def test_gradient_accumulation_gives_the_same_student(tiny_llama: Path, tmp_path: Path, data: DataSets):
    weights = []
    for batch, passes in ((8, 1), (1, 8)):
        config = _config({"forward_kl": 1.0}, batch_size=batch, gradient_accumulation=passes, max_steps=6)
        place = tmp_path / str(batch)
        weights.append(load_file(_run(tiny_llama, place, data, config).path / "model.safetensors"))
    moved = 0.0
    start = load_file(tiny_llama / "model.safetensors")
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-4)
        moved = max(moved, float((tensor - start[name]).abs().max()) if "layers.1" not in name else 0.0)
    assert moved > 4e-3  # otherwise the comparison would hold for untrained students, too


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": {"forward_kl": 1.0}}, RecipeError, "does not fit"),
        (
            {"learning_rate": 1e30, "max_grad_norm": 1e30},
            EdgestillError,
            r"loss became \S+ at step \d+ \(embedding_cosine\)",
        ),
    ],
)
def test_bad_settings_are_one_clear_line(encoder, tmp_path, data, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        _run(encoder, tmp_path, data, _config(**{"loss": {"embedding_cosine": 1.0}, **changes}))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_no_text_is_one_clear_line(encoder: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="no text"):
        _run(encoder, tmp_path, DataSets((), ()), _config(EMBEDDING))


@pytest.mark.parametrize("loss", [{"embedding_cosine": 1.0}, {"hidden_states": 1.0}])
def test_a_teacher_with_nan_is_one_clear_line(encoder: Path, tmp_path: Path, data: DataSets, loss: dict[str, float]):
    broken = shutil.copytree(encoder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["encoder.layer.2.output.dense.bias"][3] = np.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="not finite"):
        _run(broken, tmp_path, data, _config(loss))


def test_too_little_disk_is_said_before_training(encoder, tmp_path, data, monkeypatch: pytest.MonkeyPatch):
    from edgestill.distill import run

    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50_000}))
    with pytest.raises(ResourceExhausted, match="free"):
        _run(encoder, tmp_path, data, _config(EMBEDDING))
    assert not (tmp_path / "out").exists()


def test_out_of_memory_names_the_knob(encoder, tmp_path, data, monkeypatch: pytest.MonkeyPatch):
    from edgestill.distill import trainer

    def explode(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer, "count_items", explode)
    with pytest.raises(ResourceExhausted, match="memory") as caught:
        _run(encoder, tmp_path, data, _config(EMBEDDING))
    assert "gradient_accumulation" in caught.value.hint


def test_threads_and_verbosity_are_put_back(encoder: Path, tmp_path: Path, data: DataSets):
    from transformers.utils import logging

    before = (torch.get_num_threads(), logging.get_verbosity())
    _run(encoder, tmp_path, data, _config(EMBEDDING, max_steps=1))
    assert (torch.get_num_threads(), logging.get_verbosity()) == before
