"""The files of a model folder, hostile ones among them: damaged headers, links that lead out."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from edgestill.checkpoints import open_model, read_safetensors_header
from edgestill.errors import BadInput


def test_the_header_agrees_with_the_library(tiny_bert: Path) -> None:
    state = load_file(tiny_bert / "model.safetensors")
    header = read_safetensors_header(tiny_bert / "model.safetensors")
    assert {name: tensor.shape for name, tensor in header.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert open_model(tiny_bert).parameters == sum(tensor.numel() for tensor in state.values())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damaged_header_gets_through(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fuzz: what we accept, the library accepts too; everything else is BadInput and nothing else."""
    dimensions = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, True, None, "3", 1.0]))
    row = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I8", "X", 4]),
            "shape": st.lists(dimensions, max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**40, -4, None]), min_size=1, max_size=3),
        }
    )
    header: Any = data.draw(st.one_of(st.dictionaries(st.text(max_size=3), row, max_size=3), st.just([]), st.just(5)))
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) + data.draw(st.sampled_from([0, 0, 1, 2**60]))) + text + bytes(16))
    try:
        found = read_safetensors_header(path)
    except BadInput:
        return
    assert set(load_file(path)) == set(found)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja", "config.json"])
def test_a_link_that_leaves_a_model_folder_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder, outside = shutil.copytree(tiny_llama, tmp_path / "model"), tmp_path / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(BadInput, match="symbolic link that leaves its folder"):
        open_model(folder)
    (folder / name).unlink()
    (folder / "blobs").mkdir()
    outside.rename(folder / "blobs" / name)
    (folder / name).symlink_to(f"blobs/{name}")
    assert open_model(folder).task == "text-generation"
