"""What runtimes do to activations, against the runtimes' own operators."""

import numpy as np
import pytest
import torch

from edgestill.artifact import StoredTensor
from edgestill.bench.dequantised import head_of_tied, jitter, quantise_activation, simulate_activations
from edgestill.bench.limits import Faithful, Noise, activation_of, ceiling_for
from edgestill.grids import dequantise, quantise


@pytest.mark.parametrize("low", [-3.0, 0.5])
def test_dynamic_uint8_is_what_onnx_runtime_computes(low):
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    x = np.random.default_rng(0).uniform(low, 4, size=(5, 40)).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, 40]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    got = quantise_activation(torch.from_numpy(x), "uint8-tensor").numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_q8_blocks_are_what_the_grid_computes():
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    expected = dequantise("q8_0", quantise("q8_0", x), x.shape)
    got = quantise_activation(torch.from_numpy(x), "q8_0").numpy()
    # codes come from the scale before it is rounded to fp16, as in the reference
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["int8-b32", "int8-b64", "q8_k"])
def test_symmetric_blocks_by_a_double_loop(kind):
    x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    width = {"int8-b32": 32, "int8-b64": 64, "q8_k": 256}[kind]
    expected = np.zeros_like(x)
    for row in range(2):
        for start in range(0, 300, width):
            block = x[row, start : start + width].astype(np.float64)
            step = np.abs(block).max() / 127
            expected[row, start : start + width] = np.rint(block / step) * step
    got = quantise_activation(torch.from_numpy(x), kind).numpy()
    assert np.mean(np.abs(got - expected) < 1e-5) > 0.99  # a value halfway between two codes may go either way
    np.testing.assert_allclose(got, x, atol=np.abs(x).max() / 127)


@pytest.mark.parametrize("kind", ["none", "float16", "uint8-tensor", "int8-b32", "q8_0", "q8_k"])
def test_zeros_stay_zeros(kind):
    assert not quantise_activation(torch.zeros(2, 64), kind).any()


def test_the_input_of_every_named_linear_is_quantised():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = torch.nn.functional.linear(quantise_activation(x, "q8_0"), model[0].weight, model[0].bias)
        expected = model[1](hidden)
        assert simulate_activations(model, {"0.weight": "q8_0"}) == {"q8_0"}
        torch.testing.assert_close(model(x), expected)


def test_jitter_is_small_and_seeded():
    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).eval()

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain, first, second = build(), build(), build()
    jitter(first)
    jitter(second)
    with torch.inference_mode():
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
        difference = (first(x) - plain(x)).abs().max()
    assert 0 < difference < 1e-5


def test_limits_widen_with_the_noise_of_the_model_but_not_without_end():
    limits = Faithful(1e-3, 0.97, 2e-3, 2e-2, "why")
    assert limits.for_noise(Noise(1e-6, 1e-5, 0)) is limits
    wider = limits.for_noise(Noise(1e-3, 4e-3, 0.02))
    assert wider.divergence == pytest.approx(3e-3)
    assert wider.parity == pytest.approx(1.2e-2)
    assert wider.agreement == pytest.approx(0.94)
    assert "0.001" in wider.reason
    widest = limits.for_noise(Noise(5.0, 50.0, 1.0))
    assert widest.divergence == 2e-2
    assert widest.agreement == 0.75


def test_a_tied_head_that_is_stored_apart_is_found():
    embedding = StoredTensor("e.weight", "e", "int8-b32")
    head = StoredTensor("e.weight", "e.int8", "int8", (("transpose",),))
    assert head_of_tied([embedding, head]) == head
    assert head_of_tied([head, embedding]) == head
    assert head_of_tied([embedding]) is None


@pytest.mark.parametrize(
    ("form", "grid", "kind"),
    [
        ("onnx", "int8", "uint8-tensor"), ("onnx", "int4-b32", "int8-b32"),
        ("onnx", "int8-b64", "int8-b64"), ("onnx", "float32", "none"),
        ("onnx", "float16", "float16-maybe"), ("gguf", "q4_k", "q8_k"), ("gguf", "q4_0", "q8_0"),
        ("gguf", "f16", "float16-in"), ("gguf", "bf16", "bfloat16-in"), ("gguf", "iq3_xxs", "q8_k"),
        ("gguf", "tq1_0", "q8_k"), ("gguf", "q1_0", "q8_0"),
        ("gguf", "f32", "none"), ("coreml", "int8-channel", "float16"),
    ],
)  # fmt: skip
def test_activation_of_each_runtime(form, grid, kind):
    assert activation_of(form, StoredTensor("w", "w", grid)) == kind


def test_every_quantisation_of_a_recipe_has_a_ceiling():
    from edgestill.quantisation import QUANTISATIONS

    for names in QUANTISATIONS.values():
        for name in names:
            assert "unknown" not in ceiling_for(name).reason, name
    assert "unknown" in ceiling_for("q1_x").reason
    assert ceiling_for("q4_0-imatrix") == ceiling_for("q4_0")
