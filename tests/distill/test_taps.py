"""What taps hear against what the models say about themselves and against their own matrices, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgestill.checkpoints import ARCHITECTURES
from edgestill.distill.anatomy import blocks
from edgestill.distill.recompute import recompute_blocks
from edgestill.distill.signal import INSIDE, Attention, Hidden, Relations
from edgestill.distill.taps import Heard, Taps
from edgestill.errors import RecipeError

ENCODER = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
           "num_hidden_layers": 3, "initializer_range": 0.2, "max_position_embeddings": 40}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
# family -> (class stem, config, queries, keys, values inside a block, norm before them)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str | None]] = {
    **{
        name: (stem, ENCODER, ("attention.self.query", "attention.self.key", "attention.self.value"), None)
        for name, stem in (("bert", "Bert"), ("electra", "Electra"), ("roberta", "Roberta"),
                           ("xlm-roberta", "XLMRoberta"))
    },
    "mpnet": ("MPNet", ENCODER, ("attention.attn.q", "attention.attn.k", "attention.attn.v"), None),
    "distilbert": (
        "DistilBert", {"vocab_size": 40, "dim": 32, "n_heads": 4, "hidden_dim": 48, "n_layers": 3,
                       "initializer_range": 0.2},
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"), None,
    ),
    **{
        name: (stem, DECODER, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm")
        for name, stem in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    },
    "gemma3_text": (
        "Gemma3Text", {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 3, "sliding_window_pattern": 2},
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm",
    ),
    "gpt2": (
        "GPT2", {"vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64,
                 "initializer_range": 0.2},
        ("attn.c_attn",), "ln_1",
    ),
}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 7, 30], [8, 6, 12, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    stem, sizes, *_ = FAMILIES[family]
    return getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**sizes)).eval()


def test_every_architecture_is_among_them() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)


def test_attention_is_what_the_model_says_it_is(family: str) -> None:
    reference = _model(family)
    reference.set_attn_implementation("eager")
    model = _model(family)
    taps = Taps(model, [2, 0], [Attention, Hidden])
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
        said = reference(input_ids=IDS, attention_mask=MASK, output_attentions=True)
    heard = taps.take()
    assert heard.relations is None
    assert heard.attention is not None
    for found, layer in zip(heard.attention, (2, 0), strict=True):
        assert found.shape == (2, 4, 5, 5)
        assert torch.equal(found, said.attentions[layer])
        assert bool((found[1, :, :3, 3:] == 0).all())  # nobody looks at padding
    assert heard.blocks is not None
    assert [tuple(block.shape) for block in heard.blocks] == [(2, 5, 32)] * 2


def test_relations_are_what_the_projections_of_the_last_layer_asked_for_give(family: str) -> None:
    model = _model(family)
    *_, names, norm = FAMILIES[family]
    with torch.no_grad():
        states = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    taps = Taps(model, [0, 1], [Relations])
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
        block = blocks(model)[1]
        before = states[1] if norm is None else block.get_submodule(norm)(states[1])
        made = [block.get_submodule(name)(before) for name in names]
    expected = made if len(made) == 3 else list(made[0].chunk(3, dim=-1))
    heard = taps.take()
    assert heard.blocks is None
    assert heard.attention is None
    found = heard.relations
    assert found is not None
    for mine, theirs in zip((found.queries, found.keys, found.values), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert found.heads == (2 if family in ("gemma3_text", "llama", "qwen2", "qwen3") else 4)
    assert found.keys.shape[-1] == found.heads * 8


def test_taken_off_the_model_is_as_it_was(family: str) -> None:
    model = _model(family)
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        was = model.config._attn_implementation
        taps = Taps(model, range(3), INSIDE)
        during = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(during[MASK.bool()], before[MASK.bool()], rtol=1e-4, atol=1e-5)
        taps.take()
        taps.remove()
        assert model.config._attn_implementation == was
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK).last_hidden_state, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _sum(heard: Heard) -> torch.Tensor:
    assert heard.attention is not None
    assert heard.relations is not None
    total = sum(maps.square().sum() for maps in heard.attention)
    return total + sum(x.sin().sum() for x in (heard.relations.queries, heard.relations.keys, heard.relations.values))


def test_layers_that_are_computed_again_are_heard_once_and_give_the_same_gradient(family: str) -> None:
    gradients = []
    for again in (False, True):
        model = _model(family)
        model.config.use_cache = False
        taps = Taps(model, range(3), [Attention, Relations])
        if again:
            recompute_blocks(model)
        model(input_ids=IDS, attention_mask=MASK)
        _sum(taps.take()).backward()
        assert not taps._attention
        assert not taps._vectors
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-7)


def test_layers_that_are_not_there_are_one_clear_line() -> None:
    with pytest.raises(RecipeError, match=r"no layers \[1, 3\] in a model of 3"):
        Taps(_model("bert"), [1, 3], [Hidden])
    with pytest.raises(RecipeError, match=r"no layers \[\]"):
        Taps(_model("bert"), [], [Hidden])
