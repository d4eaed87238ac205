from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgestill.checkpoints import open_model
from edgestill.distill.anatomy import blocks
from edgestill.distill.heads import HeadCounts, choose_heads, cut_heads, resolve_heads
from edgestill.errors import RecipeError, Unsupported

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
DECODERS = ["gemma3_text", "llama", "qwen2", "qwen3"]
# (query heads of each layer, groups of each layer): whole groups, and one query head in each group
CUTS = [
    ([(2, 3), (0, 1), (2, 3), (2, 3)], [(1,), (0,), (1,), (1,)]),
    ([(0, 3), (1, 2), (0, 2), (1, 3)], [(0, 1)] * 4),
    ([(3,), (0,), (1,), (2,)], [(1,), (0,), (0,), (1,)]),
]


def _outputs(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("family", DECODERS)
def test_keeping_all_heads_is_the_teacher_exactly(build, family):
    decoder = build(family)
    before = _outputs(decoder)
    cut_heads(decoder, [range(4)] * 4, [range(2)] * 4)
    assert torch.equal(before, _outputs(decoder))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("queries", "groups"), CUTS)
def test_a_cut_head_is_one_whose_output_is_zero(build, family, queries, groups):
    decoder = build(family)
    handles = []
    for layer, kept in zip(blocks(decoder), queries, strict=True):
        hold = torch.zeros(4)
        hold[list(kept)] = 1
        hold = hold.repeat_interleave(8)

        def silence(_, inputs, hold=hold):
            return (inputs[0] * hold,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(silence))
    expected = _outputs(decoder)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, _outputs(decoder), atol=1e-3)
    cut_heads(decoder, queries, groups)
    torch.testing.assert_close(_outputs(decoder), expected, rtol=1e-4, atol=1e-5)
    assert (decoder.config.num_attention_heads, decoder.config.num_key_value_heads) == (len(queries[0]), len(groups[0]))
    assert decoder.config.head_dim == 8
    fresh = type(decoder)(type(decoder.config)(**decoder.config.to_dict()))
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in decoder.state_dict().items()}


@pytest.mark.parametrize("family", DECODERS)
def test_a_cut_decoder_decodes_with_its_cache_as_without_and_stays_tied(build, family):
    decoder = build(family)
    cut_heads(decoder, *CUTS[0])
    with torch.no_grad():
        whole = decoder(input_ids=IDS[:1], use_cache=False).logits[:, -1]
        first = decoder(input_ids=IDS[:1, :3], use_cache=True)
        rest = decoder(input_ids=IDS[:1, 3:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits[:, -1], whole)
    words, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    assert words.data_ptr() == head.data_ptr()


def test_the_best_groups_and_the_best_heads_in_them():
    scores = np.array([5.0, 1.0, 4.0, 4.5, 0.1, 9.0])  # groups of two: 6, 8.5, 9.1
    assert choose_heads(scores, 3, HeadCounts(4, 2)) == ((2, 3, 4, 5), (1, 2))
    assert choose_heads(scores, 3, HeadCounts(3, 3)) == ((0, 3, 5), (0, 1, 2))
    assert choose_heads(scores, 3, HeadCounts(1, 1)) == ((5,), (2,))


def test_what_a_recipe_asks_for(tiny_llama: Path):
    folder = open_model(tiny_llama)  # 4 heads over 2 groups
    assert resolve_heads(folder, None, None) == HeadCounts(4, 2)
    assert resolve_heads(folder, None, 1) == HeadCounts(2, 1)
    assert resolve_heads(folder, 2, None) == HeadCounts(2, 2)
    assert resolve_heads(folder, 1, 1) == HeadCounts(1, 1)
    for heads, groups, words in (
        (None, 3, "teacher has 2 groups"), (8, None, "teacher has 4"), (3, None, "can't be shared by 2 groups"),
        (4, 1, "can't be shared by 1 groups"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words) as caught:
            resolve_heads(folder, heads, groups)
        assert caught.value.hint


def test_an_encoder_refuses_with_the_reason(encoder: Path):
    folder = open_model(encoder)
    assert resolve_heads(folder, 4, 4) == HeadCounts(4, 4)
    with pytest.raises(Unsupported, match="would not load"):
        resolve_heads(folder, 2, None)


def test_decoders_that_refuse_some_cuts_say_why(tiny_gpt2: Path, tiny_gemma3: Path):
    with pytest.raises(Unsupported, match="attention heads in gpt2: its config can't say a head's size"):
        resolve_heads(open_model(tiny_gpt2), 2, None)
    gemma = open_model(tiny_gemma3)
    assert resolve_heads(gemma, 2, None) == HeadCounts(2, 2)
    wide = dataclasses.replace(gemma, config={**gemma.config, "num_attention_heads": 6, "num_key_value_heads": 3})
    with pytest.raises(Unsupported, match="unless they divide the hidden size, 64"):
        resolve_heads(wide, 3, None)
