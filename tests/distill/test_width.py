from __future__ import annotations

import pytest
import torch

from edgestill.checkpoints import ARCHITECTURES
from edgestill.distill.anatomy import base_model, blocks, find_module
from edgestill.distill.width import cut_ffn

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
KEPT = [sorted({(7 * place + layer) % 48 for place in range(20)}) for layer in range(4)]


def _outputs(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK)[0]


def test_keeping_all_neurons_is_the_teacher_exactly(model):
    before = _outputs(model)
    cut_ffn(model, [range(48)] * 4)
    assert torch.equal(before, _outputs(model))


def test_a_cut_neuron_is_one_whose_activation_is_zero(model):
    """The reference: the whole model with the activations of the other neurons held at zero by a hook."""
    name = find_module(model, "ffn", 1)
    handles = []
    for layer, kept in zip(blocks(model), KEPT, strict=True):
        hold = torch.zeros(48)
        hold[kept] = 1

        def silence(_, inputs, hold=hold):
            return (inputs[0] * hold,)

        handles.append(layer.get_submodule(name).register_forward_pre_hook(silence))
    expected = _outputs(model)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, _outputs(model), atol=1e-3)
    cut_ffn(model, KEPT)
    torch.testing.assert_close(_outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_config_and_sizes_say_the_new_width_and_the_config_builds_the_same_model(model):
    cut_ffn(model, KEPT)
    config = base_model(model).config
    assert getattr(config, ARCHITECTURES[config.model_type].ffn_key) == 20
    for layer in blocks(model):
        last = layer.get_submodule(find_module(model, "ffn", 1))
        turned = config.model_type == "gpt2"
        assert (last.nx if turned else last.in_features, last.weight.shape[0 if turned else 1]) == (20, 20)
    fresh = type(model)(type(model.config)(**model.config.to_dict()))
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items() if "pooler" not in name}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen2", "qwen3"])
def test_tied_embeddings_stay_tied(build, family):
    decoder = build(family)
    cut_ffn(decoder, KEPT)
    words, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    assert words.data_ptr() == head.data_ptr()


def test_a_cut_model_trains(model):
    cut_ffn(model, KEPT)
    model(input_ids=IDS, attention_mask=MASK)[0].square().mean().backward()
    last = blocks(model)[2].get_submodule(find_module(model, "ffn", 1))
    assert float(last.weight.grad.abs().max()) > 0
