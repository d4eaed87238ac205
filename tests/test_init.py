from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgestill.checkpoints import open_model
from edgestill.errors import BadInput, UsageError
from edgestill.init import DEFAULT_VARIANTS, InitConfig, init_recipe
from edgestill.inspection import inspect_model
from edgestill.recipe import load_recipe


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_classifier", "tiny_tagger", "tiny_llama"])
def test_a_recipe_for_any_model(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(model)
    path = init_recipe(InitConfig(folder, out=tmp_path / "r.toml"))
    recipe = load_recipe(path)
    assert recipe.task == open_model(folder).task
    assert tuple(config.to for config in recipe.export) == DEFAULT_VARIANTS[recipe.task]  # type: ignore[index]
    assert Path(recipe.teacher.source) == folder
    assert path.read_text().count("#") >= 5, "it explains itself"


def test_variants_text_and_student_are_taken(tiny_bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "my text.txt"
    text.write_text("a line\n")
    config = InitConfig(tiny_bert, ("onnx:int8", "gguf:q4_k_m"), tmp_path / "r.toml", distill=2, text=text)
    recipe = load_recipe(init_recipe(config))
    assert [export.to for export in recipe.export] == ["onnx:int8", "gguf:q4_k_m"]
    assert recipe.student.layers == 2
    assert recipe.distill is not None
    assert recipe.data.text[0].name == "my-text"


def test_a_wrong_variant_says_what_is_known(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'int8'"):
        init_recipe(InitConfig(tiny_bert, ("onnx:int9",), tmp_path / "r.toml"))
    assert not (tmp_path / "r.toml").exists()


def test_a_file_is_not_overwritten(tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        init_recipe(InitConfig(tiny_bert, out=out))
    assert out.read_text() == "mine"


def test_distilling_needs_text_and_layers_that_exist(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs text"):
        init_recipe(InitConfig(tiny_bert, out=tmp_path / "r.toml", distill=2))
    with pytest.raises(UsageError, match="4 layers"):
        init_recipe(InitConfig(tiny_bert, out=tmp_path / "r.toml", distill=9, text=tiny_bert / "config.json"))


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_classifier", "tiny_tagger", "tiny_llama"])
def test_inspection_agrees_with_the_opened_folder(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    found, opened = inspect_model(folder), open_model(folder)
    for name in ("architecture", "task", "layers", "hidden_size", "vocab_size", "max_length", "parameters", "pooling"):
        assert getattr(found, name) == getattr(opened, name), name
    assert found.student_parameters(found.layers) == found.parameters


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [[0], {}, "0", 0, True, 2**31])
def test_sizes_that_follow_from_others_are_checked_where_they_are_given(
    key: str, value: object, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: None}))
    assert inspect_model(folder).layers == inspect_model(tiny_llama).layers
    path.write_text(json.dumps({**config, key: value}))
    for look in (inspect_model, open_model):
        with pytest.raises(BadInput, match=f"{key} is"):
            look(folder)
