"""The GGUF header reader: agrees with the ``gguf`` package on good files, and gives one clear line on bad ones."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.errors import EdgestillError
from edgestill.runtimes.gguf_file import GgufFile

gguf = pytest.importorskip("gguf")


def _write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.words", ["x", "yé", ""])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("h", np.ones((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("gguf") / "good.gguf")


def test_reads_what_the_gguf_package_wrote(good: Path) -> None:
    with GgufFile(good) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["llama.block_count"] == 2
        assert file.metadata["a.float"] == 0.5
        assert file.metadata["a.bool"] is True
        assert file.metadata["a.words"] == ["x", "yé", ""]
        assert list(file.metadata["a.numbers"]) == [1, 2, 3]
        assert file.tensors["w"].shape == (3, 4)
        np.testing.assert_array_equal(file.raw("w").view(np.float32), np.arange(12))
        rows = {name: (row.tensors, row.parameters, row.size_bytes) for name, row in file.histogram().items()}
        assert rows == {"f16": (1, 64, 128), "f32": (1, 12, 48)}


def test_a_file_cut_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in [0, 1, 3, 4, 7, 20, 40, *range(60, len(data) - 32, 37)]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(EdgestillError) as caught:
            GgufFile(path)
        assert "\n" not in caught.value.message
        assert caught.value.hint


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_reads_or_is_refused_but_never_crashes(good: Path, at: int, value: int) -> None:
    data = bytearray(good.read_bytes())
    data[at % len(data)] = value
    path = good.with_name(f"changed-{at}-{value}.gguf")
    path.write_bytes(data)
    with contextlib.suppress(EdgestillError), GgufFile(path) as file:
        for name, tensor in file.tensors.items():
            assert len(file.raw(name)) == tensor.size_bytes
    path.unlink()


@pytest.mark.parametrize(("tensors", "pairs"), [(2**63, 0), (0, 2**63), (1 << 40, 1 << 40), (10_000, 0), (0, 10_000)])
def test_forged_counts_are_refused_before_anything_is_allocated(tmp_path: Path, tensors: int, pairs: int) -> None:
    path = tmp_path / "forged.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + bytes(200))
    with pytest.raises(EdgestillError, match="damaged"):
        GgufFile(path)


def test_other_files_and_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(EdgestillError, match="not a GGUF"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(EdgestillError, match="version 1"):
        GgufFile(path)
    with pytest.raises(EdgestillError, match="does not exist"):
        GgufFile(tmp_path / "none.gguf")
