"""Reading GGUF weights back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, StoredTensor
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.payload_gguf import GgufPayload

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny_llama, tmp_path_factory.mktemp("a") / "q4", ExportConfig(to="gguf:q4_0"))


def test_stored_values_are_those_of_the_gguf_package(artifact: Artifact) -> None:
    """The ``gguf`` package has dequantisers of its own: an independent reading."""
    reader = gguf.GGUFReader(artifact.entry)
    theirs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    payload = GgufPayload(artifact)
    tensors = artifact.tensors()
    assert len(tensors) == len(theirs)
    for tensor in tensors:
        np.testing.assert_array_equal(payload.stored(tensor), theirs[tensor.stored], err_msg=tensor.stored)
    payload.close()


def test_the_histogram_is_read_from_the_file(artifact: Artifact) -> None:
    payload = GgufPayload(artifact)
    assert dict(payload.histogram()) == dict(artifact.manifest.dtype_histogram)
    assert payload.histogram()["q4_0"].tensors == 28


def test_a_lying_map_is_refused(artifact: Artifact) -> None:
    payload = GgufPayload(artifact)
    honest = artifact.tensors()[0]
    with pytest.raises(BadInput, match="should be q8_0"):
        payload.stored(dataclasses.replace(honest, stored="blk.0.attn_q.weight", grid="q8_0"))
    with pytest.raises(BadInput, match="no such tensor"):
        payload.stored(StoredTensor("x", "nowhere.weight", "q4_0"))
