from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.distill import distill
from edgestill.distill.student import (
    BlockOutputs,
    StudentPlan,
    base_model,
    blocks,
    choose_layers,
    cut_layers,
    make_student,
    map_layers,
    spread,
)
from edgestill.errors import RecipeError
from edgestill.recipe import StudentConfig

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("total", [1, 2, 3, 6, 12, 30])
def test_spread_keeps_first_and_last_and_goes_up(total):
    for count in range(1, total + 1):
        chosen = spread(count, total)
        assert len(set(chosen)) == count
        assert list(chosen) == sorted(chosen)
        assert chosen[0] == 0
        assert count == 1 or chosen[-1] == total - 1
    assert spread(total, total) == tuple(range(total))
    steps = {b - a for a, b in zip(spread(24, 30), spread(24, 30)[1:], strict=False)}
    assert steps == {1, 2}


def test_choose_layers():
    assert choose_layers(StudentConfig(layers=3), 6) == (0, 2, 5)
    assert choose_layers(StudentConfig(keep=(1, 4)), 6) == (1, 4)
    assert choose_layers(StudentConfig(), 4) == (0, 1, 2, 3)
    with pytest.raises(RecipeError, match="0 to 5"):
        choose_layers(StudentConfig(keep=(1, 6)), 6)
    with pytest.raises(RecipeError, match="layers = 7"):
        choose_layers(StudentConfig(layers=7), 6)


def test_unknown_layer_map():
    with pytest.raises(RecipeError, match="layer_map"):
        map_layers("first", (0,), 2)


def test_keeping_all_layers_is_the_teacher_exactly(model):
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=MASK)[0]
        cut_layers(model, range(4))
        after = model(input_ids=IDS, attention_mask=MASK)[0]
    assert torch.equal(before, after)


def test_cut_layers_keeps_the_right_weights_and_renumbers(model):
    originals = list(blocks(model))
    cut_layers(model, (0, 3))
    kept = list(blocks(model))
    assert [layer is original for layer, original in zip(kept, (originals[0], originals[3]), strict=True)] == [True] * 2
    config = base_model(model).config
    assert config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 2
    numbers = [m.layer_idx for layer in kept for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert sorted(set(numbers)) in ([], [0, 1])
    assert bool(torch.isfinite(model(input_ids=IDS, attention_mask=MASK)[0]).all())


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen2", "qwen3"])
def test_tied_embeddings_stay_tied(build, family):
    decoder = build(family)
    cut_layers(decoder, (0, 2))
    words, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    assert words.data_ptr() == head.data_ptr()


def test_tied_embeddings_are_written_once_and_tied_when_read(tiny_llama: Path, tmp_path: Path, data):
    distill(tiny_llama, tmp_path / "out", student=StudentConfig(layers=2), config=None, data=data, max_length=32,
            work=tmp_path / "work")  # fmt: skip
    student = load_torch(tmp_path / "out")
    assert student.get_input_embeddings().weight.data_ptr() == student.get_output_embeddings().weight.data_ptr()
    assert open_model(tmp_path / "out").parameters < open_model(tiny_llama).parameters


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "qwen3"])
def test_per_layer_lists_are_cut_with_the_same_index(build, family):
    decoder = build(family)
    decoder.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    cut_layers(decoder, (0, 3))
    assert decoder.config.layer_types == ["full_attention", "sliding_attention"]
    type(decoder.config)(**decoder.config.to_dict())  # transformers checks the length when a config is made


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen3"])
def test_a_cut_decoder_decodes_with_its_cache_as_without(build, family):
    decoder = build(family)
    cut_layers(decoder, (1, 3))
    with torch.no_grad():
        whole = decoder(input_ids=IDS[:1], use_cache=False).logits[:, -1]
        first = decoder(input_ids=IDS[:1, :3], use_cache=True)
        rest = decoder(input_ids=IDS[:1, 3:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits[:, -1], whole)


def test_block_outputs_are_those_of_the_blocks(model):
    tap = BlockOutputs(model, (0, 1, 3))
    with torch.no_grad():
        output = base_model(model)(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
        found = tap.take()
        norm = getattr(base_model(model), "norm", None) or getattr(base_model(model), "ln_f", None)
        last = found[2] if norm is None else norm(found[2])
    tap.remove()
    assert torch.equal(found[0], output.hidden_states[1])  # [0] is the embedding
    assert torch.equal(found[1], output.hidden_states[2])
    assert torch.equal(last, output.last_hidden_state)
    if norm is not None:  # what transformers calls the last hidden state comes after the final norm
        assert not torch.equal(found[2], output.hidden_states[-1])


def test_only_the_cut_is_written_with_its_card(encoder: Path, tmp_path: Path, data):
    result = distill(encoder, tmp_path / "out", student=StudentConfig(keep=(0, 2)), config=None, data=data,
                     max_length=32, work=tmp_path / "work")  # fmt: skip
    assert (result.keep, result.teacher_layers, result.steps) == ((0, 2), 4, 0)
    card = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert (card["keep"], card["trained"]) == ([0, 2], False)
    student, teacher = load_torch(tmp_path / "out"), load_torch(encoder)
    assert torch.equal(
        student.state_dict()["encoder.encoder.layer.1.output.dense.weight"],
        teacher.state_dict()["encoder.encoder.layer.2.output.dense.weight"],
    )
    assert (
        load_tokenizer(tmp_path / "out")("good film")["input_ids"] == load_tokenizer(encoder)("good film")["input_ids"]
    )
    assert not (tmp_path / "work").exists()


def test_make_student_with_all_layers_is_the_teacher(encoder: Path, tiny_llama: Path):
    for folder in (encoder, tiny_llama):
        opened = open_model(folder)
        teacher, student = load_torch(folder), make_student(opened, StudentPlan.of_layers(opened))
        assert StudentPlan.of_layers(opened).parameters == opened.parameters
        with torch.no_grad():
            ours = student(input_ids=IDS, attention_mask=MASK)
            theirs = teacher(input_ids=IDS, attention_mask=MASK)
        assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.logits for x in (ours, theirs)))
