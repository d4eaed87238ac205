"""Weights read back from an ONNX file: exactly on the grid that the exporter wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, StoredTensor
from edgestill.errors import BadInput, Unsupported
from edgestill.export import export
from edgestill.export.writer import Weights
from edgestill.grids import dequantise_affine, quantise_affine
from edgestill.quantisation import QUANTISATIONS
from edgestill.recipe import ExportConfig
from edgestill.runtimes.payload_onnx import OnnxPayload


def _student(payload: OnnxPayload, tensor: StoredTensor) -> np.ndarray:
    """The array in the student's layout, by the steps that StoredTensor documents."""
    array = payload.stored(tensor)
    for step in tensor.layout:
        match step:
            case ["transpose"]:
                array = array.T
            case ["slice", axis, start, stop]:
                array = np.take(array, range(start, stop), axis)
            case other:
                raise AssertionError(other)
    return array


def _want(weight: np.ndarray, grid: str, quantisation: str) -> np.ndarray:
    """The reference: one call of grids.py on the student's own matrix."""
    match grid:
        case "float32":
            return weight
        case "float16":
            return weight.astype(np.float16).astype(np.float32)
        case "int8" | "int8-static":
            bits = 8 if quantisation.endswith("per-channel") else 7
            return dequantise_affine(quantise_affine(weight, bits=bits))
    bits, block = int(grid[3]), int(grid.partition("-b")[2])
    return dequantise_affine(quantise_affine(weight, bits=bits, block=block, symmetric=bits == 8))


@pytest.mark.parametrize("quantisation", QUANTISATIONS["onnx"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_every_weight_of_the_student_comes_back(
    model: str, quantisation: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    artifact = export(folder, tmp_path / "a", ExportConfig(to=f"onnx:{quantisation}"))
    weights, payload = Weights(folder), OnnxPayload(artifact)
    tensors = artifact.tensors()
    assert {tensor.name for tensor in tensors} == set(weights)
    for tensor in tensors:
        weight = weights[tensor.name]
        np.testing.assert_array_equal(_student(payload, tensor), _want(weight, tensor.grid, quantisation), tensor.name)


def test_histogram_counts_what_is_there(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = export(tiny_llama, tmp_path / "a", ExportConfig(to="onnx:int8"))
    rows = OnnxPayload(artifact).histogram()
    assert rows == artifact.manifest.dtype_histogram
    matrices = [tensor for tensor in artifact.tensors() if tensor.grid == "int8-b32"]
    parameters = sum(int(np.prod(Weights(tiny_llama).shape(tensor.name))) for tensor in matrices)
    assert rows["int8-b32"].parameters == parameters
    assert rows["int8-b32"].size_bytes == parameters + 4 * parameters // 32  # a code each, a float scale a block
    assert sum(row.size_bytes for row in rows.values()) < artifact.entry.stat().st_size


def test_broken_files_and_maps_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    payload = OnnxPayload(artifact)
    name = artifact.tensors()[0].stored
    with pytest.raises(BadInput, match="no tensor 'nothing'"):
        payload.stored(StoredTensor("x", "nothing", "float32"))
    with pytest.raises(Unsupported, match="q4_0"):
        payload.stored(StoredTensor("x", name, "q4_0"))
    broken = Artifact(shutil.copytree(artifact.path, tmp_path / "b"), artifact.manifest)
    broken.entry.write_bytes(artifact.entry.read_bytes()[:5000])
    with pytest.raises(BadInput, match="not a whole ONNX file"):
        OnnxPayload(broken)
