"""The grids against independent references: the C library for GGML types, closed forms for affine ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from edgestill.errors import BadInput, Unsupported
from edgestill.grids import (
    GGML_GRIDS,
    dequantise,
    dequantise_affine,
    ggml_size,
    quantise,
    quantise_affine,
)


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    pytest.importorskip("llama_cpp")
    from llama_cpp import _ggml

    libggml: ctypes.CDLL = _ggml.libggml
    libggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    libggml.ggml_fp16_to_fp32_row.restype = None
    return libggml


def _c_quantise(ggml: ctypes.CDLL, grid: str, weight: np.ndarray) -> np.ndarray:
    kind = GGML_GRIDS[grid]
    out = np.zeros(ggml_size(grid, weight.shape), np.uint8)
    importance = np.ones(weight.shape[1], np.float32)
    written = ggml.ggml_quantize_chunk(
        kind.number, weight.ctypes.data, out.ctypes.data, 0, *weight.shape,
        None if grid in ("q8_0", "q4_0") else importance.ctypes.data,
    )  # fmt: skip
    assert written == out.size
    return out


def _c_dequantise(ggml: ctypes.CDLL, grid: str, raw: np.ndarray, count: int) -> np.ndarray:
    traits = ggml.ggml_get_type_traits(GGML_GRIDS[grid].number).contents
    assert traits.type_name.decode().lower() == grid
    assert (traits.blck_size, traits.type_size) == (GGML_GRIDS[grid].elements, GGML_GRIDS[grid].size_bytes)
    out = np.empty(count, np.float32)
    traits.to_float(raw.ctypes.data, out.ctypes.data, count)
    return out


PACKED = [name for name in GGML_GRIDS if name not in ("f32", "f16", "bf16")]


# GGML sorts the neighbours in its large code books before it quantises: half a minute.
SLOW = ("iq1_m", "iq1_s", "iq2_s", "iq2_xs")


@pytest.mark.parametrize("grid", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PACKED])
def test_dequantise_is_bit_equal_to_llama_cpp(ggml: ctypes.CDLL, grid: str) -> None:
    weight = np.random.default_rng(1).normal(0, 0.7, (5, 512)).astype(np.float32)
    weight[2] = 0
    weight[3, 7] = 300
    raw = _c_quantise(ggml, grid, weight)
    ours = dequantise(grid, raw, weight.shape)
    np.testing.assert_array_equal(
        ours.reshape(-1).view(np.uint32), _c_dequantise(ggml, grid, raw, 2560).view(np.uint32)
    )
    ordinary = [0, 1, 4]
    assert np.corrcoef(ours[ordinary].reshape(-1), weight[ordinary].reshape(-1))[0, 1] > (
        0.4 if grid[:2] == "tq" else 0.75
    )


@pytest.mark.parametrize("grid", PACKED)
def test_dequantise_of_any_bytes_is_bit_equal_to_llama_cpp(ggml: ctypes.CDLL, grid: str) -> None:
    """Random codes reach every bit of every field; only the scales are kept finite."""
    kind = GGML_GRIDS[grid]
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (300, kind.size_bytes), np.uint8)
    halves = {
        "q2_k": (80, 82),
        "tq1_0": (52,),
        "tq2_0": (64,),
        "q3_k": (108,),
        "q6_k": (208,),
        "q4_1": (0, 2),
        "q5_1": (0, 2),
        "q4_k": (0, 2),
        "q5_k": (0, 2),
    }
    for at in halves.get(grid, (0,)) if grid != "iq1_m" else ():
        raw[:, at : at + 2] = rng.normal(0, 0.1, (300, 1)).astype(np.float16).view(np.uint8)
    if grid == "iq1_m":  # its scale lies in the upper nibbles of four words
        scale = rng.normal(0, 0.1, 300).astype(np.float16).view(np.uint16)
        words = raw[:, 48:].view("<u2")
        for part in range(4):
            words[:, part] = (words[:, part] & 0x0FFF) | (((scale >> (4 * part)) & 15) << 12)
    count = 300 * kind.elements
    ours = dequantise(grid, raw, (300, kind.elements)).reshape(-1)
    np.testing.assert_array_equal(ours, _c_dequantise(ggml, grid, raw, count))


@pytest.mark.parametrize("grid", ["f16", "bf16"])
def test_half_floats_are_bit_equal_to_llama_cpp(ggml: ctypes.CDLL, grid: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    ours = dequantise(grid, every.view(np.uint8), (1 << 16,))
    theirs = np.empty(1 << 16, np.float32)
    row: Callable[..., None] = getattr(ggml, f"ggml_{'fp16' if grid == 'f16' else grid}_to_fp32_row")
    row(ctypes.c_void_p(every.ctypes.data), ctypes.c_void_p(theirs.ctypes.data), ctypes.c_int64(1 << 16))
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


@pytest.mark.parametrize("grid", ["q8_0", "q4_0"])
def test_quantise_is_byte_equal_to_llama_cpp(ggml: ctypes.CDLL, grid: str) -> None:
    weight = np.random.default_rng(3).normal(0, 1, (64, 320)).astype(np.float32)
    weight[5] = 0
    weight[6] = np.arange(320) / 2 - 80  # ties of the rounding
    weight[7, ::2] = -1  # ties of the extreme
    weight[7, 1::2] = 1
    np.testing.assert_array_equal(quantise(grid, weight).reshape(-1), _c_quantise(ggml, grid, weight))


def test_floats_go_through_unchanged() -> None:
    weight = np.random.default_rng(4).normal(size=(3, 7)).astype(np.float32)
    np.testing.assert_array_equal(dequantise("f32", quantise("f32", weight), (3, 7)), weight)
    np.testing.assert_array_equal(
        dequantise("f16", quantise("f16", weight), (3, 7)), weight.astype(np.float16).astype(np.float32)
    )


def test_large_tensors_are_decoded_in_chunks_alike() -> None:
    raw = np.tile(quantise("q8_0", np.linspace(-1, 1, 32, dtype=np.float32)[None]), (20_000, 1))
    whole = dequantise("q8_0", raw, (20_000, 32))
    assert (whole == whole[0]).all()


def test_wrong_sizes_and_unknown_grids_are_refused() -> None:
    with pytest.raises(BadInput, match="33 bytes"):
        dequantise("q8_0", np.zeros(33, np.uint8), (32,))
    with pytest.raises(BadInput, match="whole q4_k blocks"):
        ggml_size("q4_k", (2, 576))
    with pytest.raises(Unsupported, match="q9_9"):
        dequantise("q9_9", b"", (0,))
    with pytest.raises(Unsupported, match="q4_k"):
        quantise("q4_k", np.zeros((1, 256), np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [None, 32])
def test_affine_error_is_within_half_a_step(bits: int, symmetric: bool, block: int | None) -> None:
    weight = np.random.default_rng(5).normal(size=(6, 70)).astype(np.float32)
    grid = quantise_affine(weight, bits=bits, block=block, symmetric=symmetric)
    error = np.abs(dequantise_affine(grid) - weight)
    step = np.abs(np.repeat(grid.scales, grid.block, axis=1)[:, :70])
    edge = 1.0 if symmetric else 0.5  # the symmetric grid has one code less on one side
    assert (error <= step * (edge + 1e-3)).all()


def test_affine_keeps_zero_and_the_extreme() -> None:
    weight = np.array([[0.0, -3.0, 1.5, 0.75]], np.float32)
    symmetric = dequantise_affine(quantise_affine(weight, bits=4))
    np.testing.assert_allclose(symmetric, [[0, -3, 1.5, 0.75]])
    asymmetric = dequantise_affine(quantise_affine(weight, bits=8, symmetric=False))
    assert asymmetric[0, 0] == 0
    np.testing.assert_allclose(asymmetric, weight, atol=4.5 / 255 / 2 + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(-3.2, 5.5), (0.0, 7.0), (-2.0, 0.0), (1.5, 9.0), (0.0, 0.0)])
def test_input_grids_are_those_of_onnxruntime(low: float, high: float) -> None:
    """QuantizeLinear and DequantizeLinear to the bit, values on the edge between two levels and beyond the ends too."""
    import onnxruntime
    from onnx import TensorProto, helper

    from edgestill.grids import input_grid

    grid = input_grid(low, high)
    assert 0.0 in grid.rounded(np.zeros(1, np.float32))
    edges = (np.arange(-300, 560) / 2 - grid.zero_point).astype(np.float32) * grid.scale
    x = np.concatenate([edges, np.random.default_rng(0).normal(size=500).astype(np.float32) * 4])
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]  # fmt: skip
    constants = [helper.make_tensor("s", TensorProto.FLOAT, [], [grid.scale]),
                 helper.make_tensor("z", TensorProto.UINT8, [], [grid.zero_point])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, None),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    levels, values = session.run(["q", "y"], {"x": x})
    np.testing.assert_array_equal(grid.levels(x), levels)
    np.testing.assert_array_equal(grid.rounded(x), values)
