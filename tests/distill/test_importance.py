from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill.checkpoints import load_torch, open_model
from edgestill.distill.anatomy import base_model, blocks
from edgestill.distill.importance import MOST_EXAMPLES, calibration_batches, measure_importance
from edgestill.distill.planning import Calibration
from edgestill.errors import BadInput


def _text(sentences: list[str], count: int = 12) -> Calibration:
    return Calibration(tuple(sentences[:count]), 32)


@pytest.mark.parametrize("fixture", ["encoder", "tiny_llama", "classifier", "tagger"])
def test_block_influence_and_activations_equal_a_loop_over_single_texts(fixture, request, sentences):
    folder = open_model(request.getfixturevalue(fixture))
    batches = _text(sentences).batches(folder)
    found = measure_importance(folder, batches)
    model = load_torch(folder.path)
    decoder = folder.task == "text-generation"
    ffn, out = ("mlp.down_proj", "self_attn.o_proj") if decoder else ("output.dense", "attention.output.dense")
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_, inputs, output):
            seen[name] = (inputs[0] if inputs else None, output[0] if isinstance(output, tuple) else output)

        return hook

    for index, layer in enumerate(blocks(model)):
        layer.register_forward_hook(keep(f"block{index}"))
        layer.get_submodule(ffn).register_forward_hook(keep(f"ffn{index}"))
        layer.get_submodule(out).register_forward_hook(keep(f"head{index}"))
    influence, activation, heads, tokens = np.zeros(folder.layers), [0.0] * folder.layers, [0.0] * folder.layers, 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            with torch.no_grad():
                base_model(model)(input_ids=ids[None, :length], attention_mask=mask[None, :length])
            tokens += length
            for index in range(folder.layers):
                for at in range(length):
                    a, b = (part[0, at].double() for part in seen[f"block{index}"])
                    influence[index] += 1 - float(a @ b / (a.norm() * b.norm()))
                activation[index] += seen[f"ffn{index}"][0][0].abs().double().sum(0).numpy()
                context = seen[f"head{index}"][0][0].double().reshape(length, 4, -1)
                heads[index] += context.norm(dim=-1).sum(0).numpy()
    assert found.tokens == tokens
    np.testing.assert_allclose(found.layers, influence / tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.neurons, np.array(activation) / tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.queries, np.array(heads) / tokens, rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_nothing_has_no_influence_and_dead_neurons_no_activation(tiny_llama, tmp_path, sentences):
    import shutil

    copy = shutil.copytree(tiny_llama, tmp_path / "idle")
    state = load_file(copy / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.2.{name}.weight"].zero_()
    state["model.layers.1.mlp.up_proj.weight"][[3, 70]] = 0
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    folder = open_model(copy)
    for taylor in (False, True):
        found = measure_importance(folder, _text(sentences).batches(folder), taylor=taylor)
        assert int(found.layers.argmin()) == 2
        assert set(np.argsort(found.neurons[1])[:2]) == {3, 70}
        assert found.neurons[1][[3, 70]].max() == 0
    found = measure_importance(folder, _text(sentences).batches(folder))
    assert found.layers[2] == pytest.approx(0, abs=1e-6)


def test_taylor_is_the_first_order_change_of_the_loss(tiny_llama: Path, sentences: list[str]):
    """Scaling a neuron's column by (1 - h) changes the loss by h times its score; likewise a head's columns."""
    folder = open_model(tiny_llama)
    [batch] = _text(sentences, 8).batches(folder)
    found = measure_importance(folder, [batch], taylor=True)
    model = load_torch(tiny_llama).double()

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        valid = batch["attention_mask"][:, 1:].bool()
        return float(torch.nn.functional.cross_entropy(logits[valid], batch["input_ids"][:, 1:][valid]))

    h = 3e-3  # the norms compute in fp32, so a smaller step would measure their rounding
    layer = blocks(model)[1]
    for weight, places, score in (
        (layer.mlp.down_proj.weight, slice(5, 6), found.neurons[1][5]),
        (layer.mlp.down_proj.weight, slice(99, 100), found.neurons[1][99]),
        (layer.self_attn.o_proj.weight, slice(16, 32), found.queries[1][1]),
    ):
        before = weight.detach().clone()
        sides = []
        for sign in (1, -1):
            weight.data[:, places] = before[:, places] * (1 + sign * h)
            sides.append(loss())
            weight.data.copy_(before)
        assert abs(sides[0] - sides[1]) / (2 * h) == pytest.approx(score, rel=5e-3, abs=1e-5)
    gradients = torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][
                batch["attention_mask"][:, 1:].bool()
            ],
            batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:].bool()],
        ),
        list(layer.parameters()),
    )
    total = sum(float((w.detach() * g).abs().sum()) for w, g in zip(layer.parameters(), gradients, strict=True))
    assert found.layers[1] == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("fixture", ["encoder", "tiny_llama", "classifier", "tagger"])
def test_scores_are_the_same_each_time(fixture, taylor, request, sentences):
    folder = open_model(request.getfixturevalue(fixture))
    first, second = (measure_importance(folder, _text(sentences).batches(folder), taylor=taylor) for _ in range(2))
    for name in ("layers", "neurons", "queries"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).min() >= 0
        assert getattr(first, name).max() > 0


def test_padding_counts_for_nothing(encoder: Path, sentences: list[str]):
    folder = open_model(encoder)
    batches = _text(sentences, 8).batches(folder)
    longer = [
        {name: torch.nn.functional.pad(value, (0, 9)) if value.dim() == 2 else value for name, value in batch.items()}
        for batch in batches
    ]
    for batch in longer:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    plain, padded = measure_importance(folder, batches), measure_importance(folder, longer)
    np.testing.assert_allclose(padded.layers, plain.layers, rtol=1e-4)
    np.testing.assert_allclose(padded.neurons, plain.neurons, rtol=1e-4)


def test_text_is_limited_and_missing_text_is_one_clear_line(encoder: Path, sentences: list[str]):
    from edgestill.distill.batches import Examples

    many = Examples(((1, 2, 3),) * 900, (-100,) * 900)
    assert sum(len(batch["index"]) for batch in calibration_batches(many, 0)) == MOST_EXAMPLES
    assert sum(len(batch["index"]) for batch in calibration_batches(many, 0, 30)) == 10
    with pytest.raises(BadInput, match="no text") as caught:
        Calibration((), 8).batches(open_model(encoder))
    assert "calibration" in caught.value.hint


def test_a_broken_teacher_is_one_clear_line(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    import shutil

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    folder = open_model(broken)
    with pytest.raises(BadInput, match="not finite"):
        measure_importance(folder, _text(sentences).batches(folder))
