from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgestill.checkpoints import load_torch
from edgestill.data import DataSets
from edgestill.distill import DistillResult, distill
from edgestill.distill.batches import Examples, collate
from edgestill.distill.rollout import Rollouts
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig

WRITING = {"prompt_tokens": 3, "new_tokens": 5}


def _rollouts(steps: int = 100, seed: int = 0, measure: Any = None, kl: float | None = None, **settings: Any):
    config = DistillConfig(loss={"forward_kl": 1.0}, on_policy={**WRITING, **settings}).on_policy
    assert config is not None
    return Rollouts(config, steps=steps, seed=seed, vocab_size=320, stop={2}, pad_id=2, measure=measure, held_out_kl=kl)


def _batches(sizes: tuple[int, ...], lengths: int = 9) -> list[dict[str, torch.Tensor]]:
    chooser = torch.Generator().manual_seed(3)
    ids = tuple(
        tuple(torch.randint(5, 320, (lengths - at % 4,), generator=chooser).tolist()) for at in range(sum(sizes))
    )
    rows = list(Examples(ids, (-100,) * len(ids)))
    found = []
    for size in sizes:
        found.append(collate(rows[:size], 2))
        rows = rows[size:]
    return found


def _rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_the_coin_falls_as_often_as_it_is_asked_to(tiny_llama: Path):
    model = load_torch(tiny_llama)
    batches = _batches((1,), lengths=3)
    for ratio in (0.0, 0.3, 1.0):
        rollouts = _rollouts(400, ratio=ratio, new_tokens=1)
        words = Counter()
        for step in range(1, 401):
            rollouts.take(model, batches, step)
            words[rollouts.words] += 1
        assert words["replay"] == 0
        assert words["student"] == pytest.approx(400 * ratio, abs=3.5 * (400 * ratio * (1 - ratio)) ** 0.5)


def test_the_students_texts_are_prompts_with_what_it_says_next(tiny_llama: Path):
    model = load_torch(tiny_llama)
    [batch] = _batches((4,))
    [found] = _rollouts(ratio=1.0, sampling_temperature=0.0).take(model, [batch], 1)
    assert found["index"].tolist() == batch["index"].tolist()
    for row in range(4):
        real = int(batch["attention_mask"][row].sum())
        prompt = min(3, real // 2)
        ids = batch["input_ids"][row, :prompt].tolist()
        while len(ids) < prompt + 5 and ids[-1] != 2:  # the same, slowly
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        length = len(ids)
        assert found["input_ids"][row, :length].tolist() == ids
        assert found["attention_mask"][row].tolist() == [1] * length + [0] * (found["input_ids"].shape[1] - length)
        learnt = [0] * prompt + [2] * (length - prompt)
        assert found["learn"][row, :length].tolist() == learnt
        assert found["learn"][row, length:].sum() == 0


def test_texts_do_not_depend_on_how_a_step_is_cut_into_passes(tiny_llama: Path):
    model = load_torch(tiny_llama)

    def texts(sizes: tuple[int, ...], step: int) -> list[list[int]]:
        return [row for batch in _rollouts(ratio=1.0).take(model, _batches(sizes), step) for row in _rows(batch)]

    whole = texts((8,), 1)
    assert texts((4, 4), 1) == whole
    assert texts((1,) * 8, 1) == whole
    assert texts((8,), 2) != whole


def test_kept_texts_are_the_newest_and_come_back_more_and_more(tiny_llama: Path):
    model = load_torch(tiny_llama)
    rollouts = _rollouts(200, ratio=1.0, replay=6)
    words, seen = [], []
    for step in range(1, 201):
        [batch] = rollouts.take(model, _batches((2,)), step)
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        words.append(rollouts.words)
        if rollouts.words == "student":
            seen += rows
        else:
            assert all(row in seen[-6:] for row in rows)
    early, late = words[:100].count("replay"), words[100:].count("replay")
    # linear: 25 and 75 of 100 are expected (standard deviations 4.1).
    assert abs(early - 25) < 15
    assert abs(late - 75) < 15
    assert len(rollouts.state()[0]["kept"]) == 6
    assert [row[2] for row in rollouts.state()[0]["kept"]] == seen[-6:]
    fixed = _rollouts(200, ratio=1.0, replay=6, replay_ratio=1.0)
    found = []
    for step in range(1, 9):
        fixed.take(model, _batches((2,)), step)
        found.append(fixed.words)
    assert found == ["student"] + ["replay"] * 7  # nothing is kept before the first step


def test_the_ratio_rises_when_held_out_text_gets_worse(tiny_llama: Path):
    model = load_torch(tiny_llama)
    values = iter([0.9, 1.1, 1.2, 1.0, 1.3])
    rollouts = _rollouts(100, ratio=0.0, adapt_every=2, adapt_step=0.4, measure=lambda _: next(values), kl=1.0)
    ratios = []
    for step in range(1, 12):
        rollouts.take(model, _batches((1,)), step)
        ratios.append(rollouts.ratio)
    assert ratios == [0, 0, 0, 0, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8, 1.0]


def test_a_state_brings_everything_back(tiny_llama: Path):
    model = load_torch(tiny_llama)
    settings = {"ratio": 0.6, "replay": 4, "replay_ratio": 0.5, "adapt_every": 3}

    def go(rollouts: Rollouts, steps: range) -> list[Any]:
        found = []
        for step in steps:
            taken = rollouts.take(model, _batches((2,)), step)
            found.append((rollouts.words, rollouts.ratio, taken[0]["input_ids"].tolist(), rollouts.tokens_written))
        return found

    measure = lambda _: 1.0 + len(str(settings))  # noqa: E731
    whole = go(_rollouts(20, measure=measure, kl=1.0, **settings), range(1, 21))
    for cut in (1, 7, 13):
        first = _rollouts(20, measure=measure, kl=1.0, **settings)
        go(first, range(1, cut + 1))
        second = _rollouts(20, measure=measure, kl=1.0, **settings)
        second.load(json.loads(json.dumps(first.state())))
        assert go(second, range(cut + 1, 21)) == whole[cut:]
    assert {item[0] for item in whole} == {"text", "student", "replay"}


def _config(**changes: Any) -> DistillConfig:
    plain = {"loss": {"forward_kl": 1.0}, "batch_size": 4, "max_steps": 12, "learning_rate": 2e-3, "threads": 1}
    return DistillConfig.model_validate({**plain, **changes})


def _run(teacher: Path, place: Path, data: DataSets, config: DistillConfig, **changes: Any) -> DistillResult:
    arguments = {"student": StudentConfig(layers=2), "data": data, "max_length": 32, "work": place / "work", **changes}
    return distill(teacher, place / "out", config=config, **arguments)


def test_a_student_learns_from_its_own_texts(tiny_llama: Path, tmp_path: Path, data: DataSets):
    config = _config(
        on_policy={**WRITING, "ratio": 1.0, "replay": 16}, max_steps=60, batch_size=8, schedule="constant",
        loss={"forward_kl": 1.0, "jsd:0.5": 0.5, "cross_entropy": 0.5},
    )  # fmt: skip
    result = _run(tiny_llama, tmp_path, data, config)
    rows = result.curves[1:-1]
    assert {row["words"] for row in rows} == {"student", "replay"}
    assert all(row["cross_entropy"] == 0 for row in rows)
    assert sum(row["forward_kl"] for row in rows[-10:]) < 0.9 * sum(row["forward_kl"] for row in rows[:10])
    assert result.dev_after["kl"] < result.dev_before["kl"]


def test_a_ratio_of_0_is_plain_distillation_bit_for_bit(tiny_llama: Path, tmp_path: Path, data: DataSets):
    plain = _run(tiny_llama, tmp_path / "plain", data, _config())
    never = _run(tiny_llama, tmp_path / "never", data, _config(on_policy={**WRITING, "ratio": 0.0}))
    one, other = (load_file(result.path / "model.safetensors") for result in (plain, never))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_that_are_computed_again_write_the_same(tiny_llama: Path, tmp_path: Path, data: DataSets):
    config = {"on_policy": {**WRITING, "ratio": 1.0}, "max_steps": 3}
    plain = _run(tiny_llama, tmp_path / "plain", data, _config(**config))
    again = _run(tiny_llama, tmp_path / "again", data, _config(**config, gradient_checkpointing=True))
    one, other = (load_file(result.path / "model.safetensors") for result in (plain, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.whole
def test_a_run_goes_on_from_each_step_with_the_same_bytes(tiny_llama: Path, tmp_path: Path, data: DataSets):
    config = _config(
        on_policy={**WRITING, "ratio": 0.7, "replay": 12, "replay_ratio": 0.5, "adapt_every": 3, "top_p": 0.9},
        save_every=1, gradient_accumulation=2, batch_size=2,
    )  # fmt: skip
    whole = _run(tiny_llama, tmp_path / "whole", data, config)
    assert {row["words"] for row in whole.curves[1:-1]} == {"text", "student", "replay"}

    class Killed(Exception):
        pass

    for stop in range(1, 12):

        def progress(message: str, part: float | None = None, stop: int = stop) -> None:
            if message.startswith(f"step {stop} "):
                raise Killed

        with pytest.raises(Killed):
            _run(tiny_llama, tmp_path / "cut", data, config, progress=progress)
    assert hash_tree(_run(tiny_llama, tmp_path / "cut", data, config).path) == hash_tree(whole.path)


@pytest.mark.whole
def test_the_cost_is_counted_token_by_token(tiny_llama: Path, encoder: Path, tmp_path: Path, data: DataSets):
    plain = _run(tiny_llama, tmp_path / "plain", data, _config())
    assert dict(plain.cost) == {
        "teacher_forward_tokens": plain.tokens_seen, "teacher_generated_tokens": 0,
        "student_forward_tokens": plain.tokens_seen, "student_generated_tokens": 0,
    }  # fmt: skip
    alone = _run(tiny_llama, tmp_path / "alone", data, _config(loss={"cross_entropy": 1.0}))
    assert alone.cost["teacher_forward_tokens"] == 0
    # 12 steps of 4 texts, each a prompt of one token and one more.
    config = _config(on_policy={"prompt_tokens": 1, "new_tokens": 1, "ratio": 1.0})
    own = _run(tiny_llama, tmp_path / "own", data, config)
    assert dict(own.cost) == {
        "teacher_forward_tokens": 96, "teacher_generated_tokens": 0,
        "student_forward_tokens": 96 + 48, "student_generated_tokens": 48,
    }  # fmt: skip
    assert json.loads((own.path / "distillation.json").read_text())["cost"] == own.cost
    # An encoder's teacher reads each text once, however often the student does.
    cached = _run(encoder, tmp_path / "cached", data, _config(loss={"embedding_cosine": 1.0}, max_steps=100))
    from edgestill.checkpoints import load_tokenizer

    once = sum(map(len, load_tokenizer(encoder)(data.split("train"))["input_ids"]))
    assert cached.cost["teacher_forward_tokens"] == once < cached.cost["student_forward_tokens"]


@pytest.mark.parametrize(
    ("changes", "student", "error", "message"),
    [
        ({"on_policy": {"prompt_tokens": 20, "new_tokens": 13}}, 2, RecipeError, "= 33, but a text may have 32"),
        ({"on_policy": WRITING, "loss": {"cross_entropy": 1.0}}, 2, RecipeError, "needs a loss that asks the teacher"),
        ({"on_policy": WRITING}, 4, RecipeError, "the student is the teacher"),
        ({"on_policy": {**WRITING, "replay": 3}}, 2, RecipeError, "can't hold the 4 texts"),
    ],
)
def test_what_can_not_be_is_one_clear_line(tiny_llama, tmp_path, data, changes, student, error, message):
    with pytest.raises(error, match=message) as caught:
        _run(tiny_llama, tmp_path, data, _config(**changes), student=StudentConfig(layers=student))
    assert caught.value.hint
    assert not (tmp_path / "work").exists()


def test_encoders_do_not_write(encoder: Path, tmp_path: Path, data: DataSets):
    config = _config(on_policy=WRITING, loss={"embedding_cosine": 1.0})
    with pytest.raises(Unsupported, match="has to write texts"):
        _run(encoder, tmp_path, data, config)


def test_adapting_needs_held_out_text(tiny_llama: Path, tmp_path: Path, data: DataSets):
    from dataclasses import replace

    silent = DataSets(tuple(replace(part, dev=()) for part in data.text), ())
    with pytest.raises(RecipeError, match="held-out"):
        _run(tiny_llama, tmp_path, silent, _config(on_policy={**WRITING, "adapt_every": 2}))


def test_a_teacher_with_nan_is_one_clear_line(tiny_llama: Path, tmp_path: Path, data: DataSets):
    import shutil

    from safetensors.torch import save_file

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan  # a layer that the student does not keep
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"the teacher.* is not finite"):
        _run(broken, tmp_path, data, _config(on_policy={**WRITING, "ratio": 1.0}))
