from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.artifact import (
    Artifact,
    Histogram,
    Manifest,
    StoredTensor,
    TensorSpec,
    append_verdict,
    artifact_id,
    move_artifact,
    open_artifact,
    seal_artifact,
    write_tensors,
)
from edgestill.errors import BadInput, EdgestillError

MANIFEST = Manifest(
    format="onnx", quantisation="int8", task="feature-extraction", entry="model.onnx",
    inputs=(TensorSpec("input_ids", "int64", ("batch", "length")),),
    outputs=(TensorSpec("sentence_embedding", "float32", ("batch", 32)),),
    shapes="dynamic", max_length=64, vocab_size=137, contents="int8", minimum_runtime={"onnxruntime": "1.20"},
    dtype_histogram={"int8-b32": Histogram(tensors=4, parameters=100, size_bytes=112)},
    lineage={"model_id": "abc"}, license="MIT", pooling="mean", normalize=True, labels=("a", "b"),
)  # fmt: skip
TENSORS = [
    StoredTensor("b", "w2", "float32"),
    StoredTensor("a", "w1", "int8-b32", (("transpose",), ("reshape", 2, 3)), scales="s", zero_points="z"),
]


def make(folder: Path) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "model.onnx.data").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder, TENSORS)
    return seal_artifact(folder, MANIFEST)


def test_what_is_sealed_is_opened(tmp_path: Path) -> None:
    sealed = make(tmp_path / "a")
    opened = open_artifact(tmp_path / "a")
    assert opened == sealed
    assert opened.tensors() == tuple(sorted(TENSORS, key=lambda tensor: tensor.name))
    assert opened.entry.read_bytes() == b"model"
    assert opened.model_bytes == len(b"modelweights")
    assert opened.size_bytes == len(b"modelweights{}")


def test_the_id_names_the_bytes_and_not_the_folder(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b" / "c")
    assert one.manifest.artifact_id == two.manifest.artifact_id == artifact_id(one.manifest.files)
    assert (one.path / "artifact.json").read_bytes() == (two.path / "artifact.json").read_bytes()
    append_verdict(one, {"level": "device_verified"})
    append_verdict(one, {"level": "failed"})
    again = open_artifact(one.path)
    assert again.manifest == one.manifest
    lines = (one.path / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["level"] for line in lines] == ["device_verified", "failed"]


def test_an_artifact_of_another_tool_has_no_weight_map(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.onnx").write_bytes(b"model")
    assert seal_artifact(tmp_path / "a", MANIFEST).tensors() == ()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_change_of_the_payload_is_noticed(tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], Any]] = {
        "does not match its sha256": lambda f: (f / "model.onnx").write_bytes(b"moder"),
        r"model\.onnx is missing": lambda f: (f / "model.onnx").unlink(),
        r"evil\.so is not listed": lambda f: (f / "evil.so").write_bytes(b""),
        "symbolic link": lambda f: (f / "link").symlink_to("/etc/passwd"),
        r"tensors\.json does not match": lambda f: (f / "tensors.json").write_text("[]"),
        "artifact_id does not match": lambda f: change(f / "artifact.json", artifact_id="0" * 64),
        "schema_version 7": lambda f: change(f / "artifact.json", schema_version=7),
        "not an artifact description": lambda f: change(f / "artifact.json", unknown=1),
        "is not valid JSON": lambda f: (f / "artifact.json").write_text("{"),
        r"artifact\.json does not exist": lambda f: (f / "artifact.json").unlink(),
        "unsafe path": lambda f: change(
            f / "artifact.json", files=[{"path": "../../etc/passwd", "sha256": "", "size_bytes": 1}]
        ),
        "name or a dtype that is not text": lambda f: change(
            f / "artifact.json", inputs=[{"name": ["x"], "dtype": "int64", "shape": [1]}]
        ),
        "is not of numbers and names": lambda f: change(
            f / "artifact.json", outputs=[{"name": "x", "dtype": "int64", "shape": [[1]]}]
        ),
        "size_bytes is inf": lambda f: change(
            f / "artifact.json", files=[{"path": "model.onnx", "sha256": "", "size_bytes": math.inf}]
        ),
        "size_bytes is 1.5": lambda f: change(
            f / "artifact.json", files=[{"path": "model.onnx", "sha256": "", "size_bytes": 1.5}]
        ),
    }
    for number, (message, damage) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        make(folder)
        damage(folder)
        with pytest.raises(BadInput, match=message) as caught:
            open_artifact(folder)
        assert caught.value.hint
    with pytest.raises(BadInput, match="is not an artifact folder"):
        open_artifact(tmp_path / "gone")


def test_an_entry_outside_is_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    change(tmp_path / "a" / "artifact.json", entry="../../etc/passwd")
    with pytest.raises(BadInput, match="unsafe path"):
        _ = open_artifact(artifact.path).entry


@pytest.mark.parametrize("content", ["5", "{}", "[5]", '[{"name": "a"}]', '[{"nmae": "a"}]', '[{"layout": 5}]'])
def test_a_damaged_weight_map(content: str, tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    (artifact.path / "tensors.json").write_text(content)
    if content == "{}":
        assert artifact.tensors() == ()
        return
    with pytest.raises(BadInput, match="is not a weight map"):
        artifact.tensors()


def test_moving_to_quarantine_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "quarantine" / "a").mkdir(parents=True)
    (tmp_path / "quarantine" / "a" / "old").write_text("old")
    moved = move_artifact(make(tmp_path / "a"), tmp_path / "quarantine" / "a")
    assert not (tmp_path / "a").exists()
    assert open_artifact(moved.path).manifest == moved.manifest


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_forged_description_raises_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "forged"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    key = data.draw(st.sampled_from([field.name for field in dataclasses.fields(Manifest)]))
    junk: st.SearchStrategy[Any] = st.one_of(
        st.none(), st.integers(), st.text(), st.lists(st.integers() | st.none() | st.text()), st.just({})
    )
    value = data.draw(junk | st.lists(st.dictionaries(st.sampled_from(["path", "sha256", "name", "size_bytes"]), junk)))
    change(folder / "artifact.json", **{key: value})
    try:
        artifact = open_artifact(folder)
        _ = artifact.entry, artifact.size_bytes, artifact.model_bytes
    except EdgestillError:
        return
    assert artifact.manifest.files == MANIFEST.files or artifact.manifest.artifact_id
