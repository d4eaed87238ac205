"""The rounding bounds: every quantiser that we ship passes on ordinary and on awkward weights, small faults do not."""

import ctypes

import numpy as np
import pytest

from edgestill.bench.integrity import weight_error
from edgestill.bench.limits import grid_limit
from edgestill.coreml_grids import dequantise_palette, largest_weights, quantise_palette
from edgestill.errors import Unsupported
from edgestill.grids import GGML_GRIDS, dequantise, dequantise_affine, ggml_size, quantise_affine


def weights(kind, shape=(24, 512), seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: rng.normal(size=shape) * 0.02,
        "outliers": lambda: rng.standard_t(3, size=shape) * 0.02,
        "one-sided": lambda: rng.exponential(0.02, size=shape),
        "uneven-rows": lambda: rng.normal(size=shape) * np.geomspace(1e-4, 1, shape[0])[:, None],
        "from-another-grid": lambda: ggml("q4_1", weights("gaussian", shape, seed)),
        "from-q8_0": lambda: ggml("q8_0", weights("gaussian", shape, seed)),
        "some-zero-blocks": lambda: rng.normal(size=shape) * (np.arange(shape[1]) // 32 % 3 > 0),
    }[kind]()
    return values.astype(np.float32)


KINDS = ("gaussian", "from-another-grid", "from-q8_0", "outliers", "one-sided", "uneven-rows", "some-zero-blocks")


def affine(grid, weight):
    bits = int(grid.removeprefix("int")[0])
    if grid == "int8":
        flat = quantise_affine(weight.reshape(1, -1), bits=7)
        return dequantise_affine(flat).reshape(weight.shape)
    return dequantise_affine(quantise_affine(weight, bits=bits, block=32, symmetric=bits == 8))


def ggml(grid, weight):
    pytest.importorskip("llama_cpp")
    from llama_cpp import _ggml

    quantise = _ggml.libggml.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.zeros(ggml_size(grid, weight.shape), np.uint8)
    importance = np.ones(weight.shape[1], np.float32) if grid.startswith("iq") or grid == "q2_k" else None
    pointer = None if importance is None else importance.ctypes.data
    quantise(GGML_GRIDS[grid].number, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, pointer)
    return dequantise(grid, out, weight.shape)


# GGML sorts the neighbours in its large code books before it quantises: half a minute.
SLOW = ("iq1_m", "iq1_s", "iq2_s", "iq2_xs")
SEARCHED = [
    pytest.param(grid, marks=pytest.mark.slow) if grid in SLOW else grid
    for grid in sorted(set(GGML_GRIDS) - {"f32", "f16", "bf16"})
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [*SEARCHED, "int8", "int8-b32", "int4-b32"])
def test_what_the_quantiser_writes_is_within_the_bound(grid, kind):
    weight = weights(kind)
    decoded = ggml(grid, weight) if grid in GGML_GRIDS else affine(grid, weight)
    found = weight_error(grid, weight, decoded)
    if (grid, kind) == ("iq3_s", "some-zero-blocks"):  # llama.cpp halves what stands beside a block of zeros: seen
        assert found.worst > 1
        return
    assert found.worst <= 1, found


@pytest.mark.parametrize("grid", [*SEARCHED, "int8", "int8-b32", "int4-b32"])
def test_faults_are_outside_the_bound(grid):
    weight = weights("gaussian")
    decoded = ggml(grid, weight) if grid in GGML_GRIDS else affine(grid, weight)
    coarse = grid_limit(grid).bits < 4
    shuffled = decoded[::-1]
    assert weight_error(grid, weight, shuffled).worst > 1
    assert weight_error(grid, weight, -decoded).worst > 1
    one_block = decoded.copy()
    one_block[3, 32:64] = 0
    if not coarse:  # in two bits the error of rounding is as large as these
        assert weight_error(grid, weight, decoded * np.float32(1.05)).worst > 1
        assert weight_error(grid, weight, one_block).worst > 1
    assert weight_error(grid, weight, np.full_like(weight, np.nan)).worst == np.inf


def test_floats_are_exact_or_half_an_ulp():
    weight = weights("uneven-rows")
    assert weight_error("float32", weight, weight).worst == 0
    assert weight_error("float32", weight, np.nextafter(weight, np.float32(1))).worst == np.inf
    assert weight_error("float16", weight, weight.astype(np.float16).astype(np.float32)).worst <= 1
    assert weight_error("float16", weight, weight * np.float32(1.001)).worst > 1
    tiny = np.float32([[1e-8, 3e-8, 6e-8, 0]])
    assert weight_error("float16", tiny, tiny.astype(np.float16).astype(np.float32)).worst <= 1


def test_zeros_must_stay_zeros():
    zeros = np.zeros((4, 32), np.float32)
    assert weight_error("q8_0", zeros, zeros).worst == 0
    assert weight_error("q8_0", zeros, zeros + 1e-6).worst == np.inf


def test_columns_that_do_not_fill_a_block():
    weight = weights("gaussian", (8, 48))
    padded = np.pad(weight, ((0, 0), (0, 16)))
    decoded = dequantise_affine(quantise_affine(padded, bits=4, block=32))[:, :48]
    assert weight_error("int4-b32", weight, decoded).worst <= 1


def test_a_vector_is_one_row():
    weight = weights("gaussian", (1, 64))[0]
    decoded = dequantise_affine(quantise_affine(weight[None], bits=8, block=32))[0]
    assert weight_error("int8-b32", weight, decoded).worst <= 1


def test_the_grid_says_its_bits_and_block():
    assert (grid_limit("int8-b64").bits, grid_limit("int8-b64").block) == (8, 64)
    assert (grid_limit("int4-channel").bits, grid_limit("int4-channel").block) == (4, 0)
    assert grid_limit("int9-b32") is grid_limit("fp3") is None
    with pytest.raises(Unsupported, match="fp3"):
        weight_error("fp3", np.ones((1, 2), np.float32), np.ones((1, 2), np.float32))


@pytest.mark.parametrize("to", ["onnx:fp32", "coreml:fp16"])
def test_a_link_inside_an_artifact_is_refused(to, tiny_bert, tmp_path):
    """Even with a fitting sha256: what it leads to may change, and may be anything on this machine."""
    from edgestill.artifact import open_artifact
    from edgestill.errors import BadInput
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to=to))
    largest = max(artifact.manifest.files, key=lambda file: file.size_bytes).path
    (artifact.path / largest).rename(tmp_path / "moved")
    (artifact.path / largest).symlink_to(tmp_path / "moved")
    with pytest.raises(BadInput, match=r"through a link|symbolic link"):
        open_artifact(artifact.path)


def _stored(grid):
    """A weight and what an artifact of Core ML would hold of it."""
    weight = np.random.default_rng(5).standard_t(4, size=(32, 64)).astype(np.float32) * 0.1
    mask = largest_weights(weight, 50) if grid.startswith("sparse") else None
    if "pal" in grid:
        group = int(grid.partition("-g")[2] or 0)
        decoded = dequantise_palette(quantise_palette(weight, bits=4, group=group, mask=mask))
    else:
        decoded = weight.astype(np.float16).astype(np.float32)
    return weight, decoded if mask is None else np.where(mask, decoded, np.float32(0))


@pytest.mark.parametrize("grid", ["pal4", "pal4-g8", "sparse50", "sparse50-pal4", "sparse50-pal4-g16"])
def test_palettes_and_sparse_weights(grid):
    """What is right passes; wrong codes, wrong tables and wrong places do not."""
    weight, decoded = _stored(grid)
    assert weight_error(grid, weight, decoded).worst <= 1
    assert weight_error(grid, weight, decoded * np.float32(1.05)).worst > 1
    assert weight_error(grid, weight, decoded[::-1]).worst > 1
    one = decoded.copy()
    places = np.flatnonzero(one)
    first = one.flat[places[0]]
    one.flat[places[0]] = next(value for value in one.flat[places] if abs(value - first) > 0.05)
    assert weight_error(grid, weight, one).worst > 1
    lost = decoded.copy()
    lost.flat[np.abs(weight).argmax()] = 0
    assert weight_error(grid, weight, lost).worst > 1
