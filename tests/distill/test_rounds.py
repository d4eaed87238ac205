from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from edgestill.checkpoints import open_model
from edgestill.data import DataSets
from edgestill.distill import DistillResult, distill
from edgestill.distill.rounds import surviving, way
from edgestill.errors import RecipeError
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig


def _run(teacher: Path, place: Path, data: DataSets, student: dict[str, Any], **keys: Any) -> DistillResult:
    plain = {"loss": {"forward_kl": 1.0}, "batch_size": 8, "max_steps": 9, "save_every": 2, "threads": 1}
    config = DistillConfig.model_validate({**plain, **keys})
    return distill(teacher, place / "out", student=StudentConfig.model_validate(student), config=config, data=data,
                   max_length=32, work=place / "work")  # fmt: skip


@pytest.mark.parametrize(("begin", "end", "step"), [(30, 15, 1), (1536, 700, 32), (48, 48, 1), (4, 1, 1)])
def test_each_round_goes_on_and_the_last_arrives(begin, end, step):
    for rounds in range(1, 5):
        sizes = [begin, *(way(begin, end, number, rounds, step) for number in range(1, rounds + 1))]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == end


def test_the_layers_to_go_go_in_equal_parts_and_the_named_ones_stay():
    for rounds in range(1, 5):
        layers: tuple[int, ...] = tuple(range(12))
        final = (0, 4, 7, 11)
        sizes = []
        for number in range(1, rounds + 1):
            layers = tuple(layers[place] for place in surviving(layers, final, 12, number, rounds))
            assert set(final) <= set(layers)
            sizes.append(len(layers))
        assert layers == final
        assert max(a - b for a, b in zip([12, *sizes], sizes, strict=False)) <= -(-8 // rounds)


@pytest.mark.whole
def test_two_rounds_of_pruning_and_distilling(tiny_llama: Path, tmp_path: Path, data: DataSets):
    student = {"layers": 2, "ffn": 64, "kv_heads": 1, "choose": "block_influence", "steps": 2}
    result = _run(tiny_llama, tmp_path, data, student, max_steps=30, learning_rate=2e-3)
    first, last = open_model(tmp_path / "work/round-1/student"), open_model(result.path)
    assert (first.layers, first.config["intermediate_size"], first.config["num_key_value_heads"]) == (3, 96, 2)
    assert (last.layers, last.config["intermediate_size"], last.config["num_key_value_heads"]) == (2, 64, 1)
    card = json.loads((result.path / "distillation.json").read_text())
    inner = json.loads((first.path / "distillation.json").read_text())
    assert set(card["keep"]) < set(inner["keep"]) < {0, 1, 2, 3}
    assert result.keep == tuple(card["keep"])
    assert [entry["steps"] for entry in card["rounds"]] == [15]
    assert card["rounds"][0]["plan"]["ffn"] == 96
    assert card["plan"]["parameters"] == last.parameters
    assert result.steps == 30
    assert {row["round"] for row in result.curves} == {1, 2}
    assert result.dev_after["kl"] < result.curves[-2 - 15]["dev"]["kl"]  # the second round heals what it cut
    assert result.tokens_seen == sum(row["tokens"] for row in result.curves if row["step"] == 15 and "dev" in row)
    # again: nothing is done
    assert _run(tiny_llama, tmp_path, data, student, max_steps=30, learning_rate=2e-3) == result


def test_one_round_is_what_there_was_before(tiny_llama: Path, tmp_path: Path, data: DataSets):
    plain = _run(tiny_llama, tmp_path / "a", data, {"layers": 2})
    named = _run(tiny_llama, tmp_path / "b", data, {"layers": 2, "steps": 1, "choose": "even"})
    assert hash_tree(plain.path) == hash_tree(named.path)


@pytest.mark.whole
def test_named_layers_are_the_same_ones_in_the_end(encoder: Path, tmp_path: Path, data: DataSets):
    loss = {"embedding_cosine": 1.0, "hidden_states": 0.5}
    result = _run(encoder, tmp_path, data, {"layers": 2, "ffn": 32, "steps": 3}, loss=loss)
    assert result.keep == (0, 3)
    assert open_model(result.path).config["intermediate_size"] == 32


def test_too_few_steps_for_the_rounds_is_one_clear_line(tiny_llama: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="4 rounds share 3 optimiser steps"):
        _run(tiny_llama, tmp_path, data, {"layers": 2, "steps": 4}, max_steps=3)


@pytest.mark.whole
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, data: DataSets, monkeypatch: pytest.MonkeyPatch
):
    from edgestill.distill import trainer

    student = {"layers": 2, "ffn": 0.5, "kv_heads": 1, "choose": "taylor", "steps": 2}
    whole = _run(tiny_llama, tmp_path / "whole", data, student)

    class Stop(BaseException):
        pass

    real = trainer.DistillTrainer.log
    for stop in (1, 4, 5, 8):  # in both rounds, before and after checkpoints
        seen = [0]

        def log(self, logs, start_time=None, stop=stop, seen=seen):
            real(self, logs, start_time)
            seen[0] += "learning_rate" in logs
            if seen[0] >= stop:
                raise Stop

        with monkeypatch.context() as patched:
            patched.setattr(trainer.DistillTrainer, "log", log)
            with pytest.raises(Stop):
                _run(tiny_llama, tmp_path / f"stop{stop}", data, student)
        again = _run(tiny_llama, tmp_path / f"stop{stop}", data, student)
        assert hash_tree(again.path) == hash_tree(whole.path)
    weights = load_file(whole.path / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (64, 64)
