"""What all exporters share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.checkpoints import open_model
from edgestill.errors import BadInput, ResourceExhausted
from edgestill.export.writer import Weights, check_room, copy_companions, versions


def test_weights_are_read_as_float32(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    value = torch.tensor([[1.5, -2.25], [0.0, 3.0]])
    save_file({"a": value, "b": value.bfloat16(), "c": value.half()}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert list(weights) == ["a", "b", "c"]
    assert weights.shape("b") == (2, 2)
    for name in weights:
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], value.numpy())


def test_missing_things_are_named(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        Weights(tmp_path)
    with pytest.raises(BadInput, match="'nothing'"):
        Weights(tiny_bert)["nothing"]
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(BadInput, match="not a whole safetensors"):
        Weights(tmp_path)


def test_companions(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_companions(open_model(tiny_llama), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= names
    assert "model.safetensors" not in names


def test_room(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ResourceExhausted, match="MB are free"):
        check_room(tmp_path / "out", 1 << 60)


def test_versions() -> None:
    assert versions("numpy", "no-such-package-here") == {"numpy": np.__version__}
