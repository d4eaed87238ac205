from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.data import DataSets
from edgestill.distill import DistillResult, distill, sequence
from edgestill.distill.batches import Examples, encode
from edgestill.distill.sampling import Writer, stop_ids
from edgestill.distill.sequence import choose_examples, write_texts
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig
from edgestill.recipe_teaching import SequenceConfig

WRITING = {"prompt_tokens": 4, "new_tokens": 6}


def _config(**changes: Any) -> DistillConfig:
    plain = {"loss": {"cross_entropy": 1.0}, "batch_size": 8, "max_steps": 12, "learning_rate": 2e-3, "threads": 1}
    return DistillConfig.model_validate({**plain, "sequence": WRITING, **changes})


def _run(teacher: Path, place: Path, data: DataSets, config: DistillConfig, **changes: Any) -> DistillResult:
    arguments = {"student": StudentConfig(layers=2), "data": data, "max_length": 32, "work": place / "work", **changes}
    return distill(teacher, place / "out", config=config, **arguments)


@pytest.fixture
def examples(tiny_llama: Path, sentences: list[str]) -> Examples:
    return encode(sentences[:20], load_tokenizer(tiny_llama), "text-generation", 64)


def _write(folder: Path, examples: Examples, work: Path, progress: Any = None, **settings: Any) -> Examples:
    config = SequenceConfig.model_validate({**WRITING, "batch_size": 4, **settings})
    writer = Writer([load_torch(folder)], config, vocab_size=320, stop={2}, whose="teacher")
    told = {} if progress is None else {"progress": progress}
    return write_texts(examples, config, writer, seed=0, key={"teacher": "x"}, work=work, **told)


def test_the_chosen_texts_go_on_as_the_teacher_says(tiny_llama: Path, tmp_path: Path, examples: Examples):
    found = _write(tiny_llama, examples, tmp_path, share=0.3)
    model = load_torch(tiny_llama)
    chosen = choose_examples(20, 0.3, 0)
    assert len(chosen) == 6
    for number in range(20):
        if number not in chosen:
            assert (found.ids[number], found.prompts[number]) == (examples.ids[number], 0)
            continue
        prompt = min(4, len(examples.ids[number]) // 2)
        ids = list(examples.ids[number][:prompt])
        while len(ids) < prompt + 6 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :320].argmax()))
        assert (found.ids[number], found.prompts[number]) == (tuple(ids), prompt)
    assert choose_examples(20, 0.3, 1) != chosen


def test_texts_are_written_once_and_go_on_after_a_kill(
    tiny_llama: Path, tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sequence, "SHARD_ROWS", 4)
    settings = {"sampling_temperature": 1.5, "top_p": 0.95}
    whole = _write(tiny_llama, examples, tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    def die(message: str, part: float) -> None:
        if part > 0.5:
            raise Killed

    with pytest.raises(Killed):
        _write(tiny_llama, examples, tmp_path / "cut", progress=die, **settings)
    [folder] = (tmp_path / "cut").iterdir()
    assert len(list(folder.glob("shard-*.json"))) == 3
    # A shard that was damaged, one that is another's and one that is cut off are written again.
    first, _, third = sorted(folder.glob("shard-*.json"))
    first.write_text(first.read_text().replace("]]", ", 7]]", 1))
    third.write_bytes(third.read_bytes()[:40])
    told: list[float] = []
    again = _write(tiny_llama, examples, tmp_path / "cut", progress=lambda _, part: told.append(part), **settings)
    assert again == whole
    assert told == [0.0, 0.4, 0.6, 0.8]  # all but the second
    assert hash_tree(folder) == hash_tree(next((tmp_path / "whole").iterdir()))
    told.clear()
    assert (
        _write(tiny_llama, examples, tmp_path / "cut", progress=lambda _, part: told.append(part), **settings) == whole
    )
    assert told == []


def test_other_settings_are_other_texts(tiny_llama: Path, tmp_path: Path, examples: Examples):
    for settings in ({}, {"sampling_temperature": 1.0}, {"new_tokens": 5}):
        _write(tiny_llama, examples, tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_student_learns_the_teachers_words(tiny_llama: Path, tmp_path: Path, data: DataSets):
    result = _run(tiny_llama, tmp_path, data, _config(max_steps=150, schedule="constant"))
    losses = [row["cross_entropy"] for row in result.curves[1:-1]]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    card = json.loads((result.path / "distillation.json").read_text())
    assert card["sequence"]["texts"] == card["examples"] >= 150
    assert card["config"]["sequence"]["new_tokens"] == 6
    examples = encode(data.split("train"), load_tokenizer(tiny_llama), "text-generation", 32)
    assert result.cost["teacher_forward_tokens"] == sum(min(4, len(ids) // 2) for ids in examples.ids)
    assert 0 < result.cost["teacher_generated_tokens"] <= 6 * len(examples)
    assert result.cost["student_forward_tokens"] == result.tokens_seen


@pytest.mark.whole
def test_a_killed_run_ends_with_the_same_bytes(tiny_llama: Path, tmp_path: Path, data: DataSets):
    config = _config(
        loss={"forward_kl": 0.5, "cross_entropy": 0.5}, save_every=3,
        sequence={**WRITING, "share": 0.5, "sampling_temperature": 1.0},
    )  # fmt: skip
    whole = _run(tiny_llama, tmp_path / "whole", data, config)

    class Killed(Exception):
        pass

    for place in ("teacher writes", "step 2 ", "step 7 "):

        def progress(message: str, part: float | None = None, place: str = place) -> None:
            if message.startswith(place):
                raise Killed

        with pytest.raises(Killed):
            _run(tiny_llama, tmp_path / "cut", data, config, progress=progress)
    again = _run(tiny_llama, tmp_path / "cut", data, config)
    assert hash_tree(again.path) == hash_tree(whole.path)
    assert dict(again.cost) == dict(whole.cost)


def test_on_policy_and_sequence_go_together(tiny_llama: Path, tmp_path: Path, data: DataSets):
    config = _config(loss={"forward_kl": 1.0}, on_policy={**WRITING, "ratio": 0.5})
    result = _run(tiny_llama, tmp_path, data, config)
    assert {row["words"] for row in result.curves[1:-1]} == {"text", "student"}
    assert min(result.cost.values()) > 0


def test_what_can_not_be_is_one_clear_line(tiny_llama: Path, encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match=r"\[distill.sequence\] prompt_tokens \+ new_tokens = 64"):
        _run(tiny_llama, tmp_path, data, _config(sequence={}))
    with pytest.raises(Unsupported, match="the teacher has to write texts"):
        _run(encoder, tmp_path, data, _config(loss={"embedding_cosine": 1.0}))
    broken = load_torch(tiny_llama)
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(BadInput, match="the teacher's output is not finite"):
        Writer([broken], SequenceConfig(), vocab_size=320, stop=(), whose="teacher").write([(5,)], [(0,)])


def test_the_ids_that_end_a_text_are_the_tokenizers_and_the_models(tiny_llama: Path):
    from dataclasses import replace

    folder, tokenizer = open_model(tiny_llama), load_tokenizer(tiny_llama)
    assert stop_ids(folder, tokenizer) == {2}
    assert stop_ids(replace(folder, config={**folder.config, "eos_token_id": [0, 1]}), tokenizer) == {0, 1, 2}
    assert stop_ids(replace(folder, config={"eos_token_id": None}), tokenizer) == {2}
