"""The grids in torch against those in numpy and in the C library, and encoders that find their own values again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch

from edgestill.artifact import StoredTensor
from edgestill.coreml_grids import dequantise_blocks, quantise_blocks
from edgestill.distill.fake_quantise import FakeGrid, fake_grid
from edgestill.errors import Unsupported
from edgestill.grids import GGML_GRIDS, dequantise, dequantise_affine, ggml_size, quantise_affine

Floats = np.ndarray
AFFINE = [(4, 16, True), (4, 32, True), (4, 32, False), (8, 32, True), (8, 64, False), (4, 128, False)]
GGML = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def _tensor(grid: str, zero_points: bool = False) -> StoredTensor:
    return StoredTensor("w", "w", grid, (), "s", "z" if zero_points else None)


def _torch(grid: FakeGrid, weight: Floats) -> Floats:
    out = torch.empty(weight.shape)
    grid.quantise(torch.from_numpy(weight), out)
    return out.numpy()


def _affine(bits: int, block: int, symmetric: bool) -> tuple[FakeGrid, Callable[[Floats], Floats]]:
    def encode(weight: Floats) -> Floats:
        padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block)))  # as the ONNX writer does
        grid = quantise_affine(padded, bits=bits, block=block, symmetric=symmetric)
        return dequantise_affine(grid)[:, : weight.shape[1]]

    return fake_grid("onnx", _tensor(f"int{bits}-b{block}", not symmetric)), encode


@pytest.fixture(scope="module")
def ggml() -> Callable[[str], Callable[[Floats], Floats]]:
    """llama.cpp's own encoder of a type, and our decoder (which is tested against its)."""
    pytest.importorskip("llama_cpp")
    from llama_cpp import _ggml

    library = _ggml.libggml
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip

    def encoder(name: str) -> Callable[[Floats], Floats]:
        def encode(weight: Floats) -> Floats:
            weight = np.ascontiguousarray(weight)
            out = np.zeros(ggml_size(name, weight.shape), np.uint8)
            library.ggml_quantize_chunk(
                GGML_GRIDS[name].number, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, None
            )
            return dequantise(name, out, weight.shape)

        return encode

    return encoder


def _blocks(seed: int, columns: int = 256) -> Floats:
    """Rows of every kind: ordinary, heavy-tailed, one sign only, zeros, alone in a zero block, twins of both signs,
    values between two codes, tiny ones (subnormal scales in float16 and float32) and large ones."""
    chooser = np.random.default_rng(seed)
    rows = [chooser.normal(0, 0.05, (64, columns)), chooser.standard_t(2, (64, columns)) * 0.02]
    rows += [np.abs(chooser.normal(0, 1, (8, columns))), -np.abs(chooser.normal(0, 1, (8, columns)))]
    rows += [np.zeros((2, columns)), -np.zeros((1, columns))]
    alone = np.zeros((8, columns))
    alone[np.arange(8), chooser.integers(0, columns, 8)] = chooser.normal(0, 1, 8)
    twins = chooser.normal(0, 0.3, (16, columns)).clip(-0.5, 0.5)  # many reach both ends
    halves = chooser.integers(-30, 31, (64, columns)) / 2.0  # ties, exactly
    steps = chooser.integers(-8, 8, (32, columns)) * 2.0**-6
    sizes = 10.0 ** chooser.uniform(-44, 4, (128, 1))
    mixed = chooser.normal(0, 1, (128, columns)) * sizes
    constant = np.full((4, columns), 0.37) * chooser.choice([-1, 1], (4, 1))
    rows += [alone, twins, halves, steps, mixed, constant]
    return np.concatenate(rows).astype(np.float32)


def _plain(weight: Floats, block: int) -> Floats:
    """The rows without blocks whose scale has no reciprocal in float32: numpy's encoder divides by zero there."""
    tiles = np.abs(np.pad(weight, ((0, 0), (0, -weight.shape[1] % block)))).reshape(len(weight), -1, block).max(axis=2)
    return weight[((tiles == 0) | (tiles > 1e-34)).all(axis=1)]


@pytest.mark.parametrize(("bits", "block", "symmetric"), AFFINE)
@pytest.mark.parametrize("columns", [256, 200, 16])
def test_affine_grids_are_those_of_numpy(bits: int, block: int, symmetric: bool, columns: int) -> None:
    ours, theirs = _affine(bits, block, symmetric)
    weight = _plain(_blocks(1, columns), block)
    got, expected = _torch(ours, weight), theirs(weight)
    if symmetric:
        assert np.array_equal(got, expected)
        return
    # The scale has fewer bits here (24 less those of a code); in a tie the largest takes the code above.
    top = (1 << bits) - 1
    assert np.abs(got - expected).max(initial=0) > 0  # else the tolerance below is there for nothing
    scale = (np.maximum(weight.max(axis=1), 0) - np.minimum(weight.min(axis=1), 0)) / top
    close = np.abs(got - expected) <= np.abs(expected) * 2.0 ** -(23 - bits) + 1e-38
    tie = np.isclose(np.abs(got - weight), np.abs(expected - weight), rtol=1e-2, atol=0)
    assert (close | tie | (scale[:, None] == 0)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "block", "symmetric"), AFFINE)
def test_numpy_finds_affine_values_again(bits: int, block: int, symmetric: bool, seed: int) -> None:
    ours, theirs = _affine(bits, block, symmetric)
    for columns in (256, 200):
        values = _torch(ours, _blocks(seed, columns))
        assert np.array_equal(theirs(values), values)
        assert np.array_equal(_torch(ours, values), values)


def test_plain_rounding_would_not_be_found_again() -> None:
    """Why the asymmetric grid has shorter scales: numpy's own values move when they are rounded once more."""
    _, theirs = _affine(4, 32, False)
    values = theirs(_plain(_blocks(0), 32))
    assert not np.array_equal(theirs(values), values)


@pytest.mark.parametrize("grid", GGML)
def test_ggml_grids_are_those_of_the_c_library(grid: str, ggml: Callable[[str], Callable[[Floats], Floats]]) -> None:
    weight = _plain(_blocks(2), 32)
    assert np.array_equal(_torch(fake_grid("gguf", _tensor(grid)), weight), ggml(grid)(weight))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", GGML)
def test_the_c_library_finds_ggml_values_again(
    grid: str, seed: int, ggml: Callable[[str], Callable[[Floats], Floats]]
) -> None:
    ours = fake_grid("gguf", _tensor(grid))
    values = _torch(ours, _blocks(seed))
    assert np.array_equal(ggml(grid)(values), values)
    assert np.array_equal(_torch(ours, values), values)


def _coreml(weight: Floats) -> Floats:
    """What a float16 program holds of a weight: rounded to float16 before it is encoded and after it is decoded."""
    grid = quantise_blocks(weight.astype(np.float16).astype(np.float32), bits=8)
    assert grid is not None
    return dequantise_blocks(grid).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_core_mls_int8_is_numpys_and_is_found_again(seed: int) -> None:
    ours, rows = fake_grid("coreml", _tensor("int8-channel")), _blocks(seed, 192)
    peak = np.abs(rows).max(axis=1)
    rows = rows[(peak == 0) | ((peak > 0.01) & (peak < 6e4))]  # smaller scales are stored as float16
    values = _torch(ours, rows)
    assert np.array_equal(values, _coreml(rows))
    assert np.array_equal(_coreml(values), values)
    assert np.array_equal(_torch(ours, values), values)
    peaks = np.abs(values).max(axis=1)
    plain = (peaks / 127).astype(np.float16)  # the rule alone would have moved many rows to another scale
    assert (plain.astype(np.float32) * 127 != peaks).mean() > 0.2


@pytest.mark.parametrize(("grid", "dtype"), [("float16", np.float16), ("float32", np.float32)])
def test_float_grids(grid: str, dtype: type) -> None:
    weight = _blocks(3)
    assert np.array_equal(_torch(fake_grid("onnx", _tensor(grid)), weight), weight.astype(dtype).astype(np.float32))


def test_vectors_and_large_matrices_are_quantised_as_a_whole() -> None:
    vector = _blocks(4)[:1, :64]
    grid = fake_grid("onnx", _tensor("int4-b32"))
    assert np.array_equal(_torch(grid, vector[0]), _torch(grid, vector)[0])
    large = np.random.default_rng(0).normal(size=(3000, 96)).astype(np.float32)  # several chunks
    assert np.array_equal(_torch(grid, large), np.concatenate([_torch(grid, part) for part in np.split(large, 6)]))


def test_weights_beyond_the_last_code_are_told() -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.95, 0.9, 0.5] + [0.0] * 27])
    for form, name, last in (("onnx", "int4-b32", 0.875), ("gguf", "q4_0", 0.875), ("gguf", "q5_0", 0.9375)):
        out, beyond = torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.bool)
        fake_grid(form, _tensor(name)).quantise(weight, out, beyond)
        step = 2 * (1 - last)
        assert torch.equal(beyond, weight > last + step / 4), name
        assert out.max() == last


@pytest.mark.parametrize("grid", ["q6_k", "iq4_nl", "int3-b32"])
def test_other_grids_are_refused(grid: str) -> None:
    with pytest.raises(Unsupported, match=grid):
        fake_grid("gguf" if "int" not in grid else "onnx", _tensor(grid))
