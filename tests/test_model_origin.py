"""What a model is called and made of: read from cards, kept in model folders, handed on to students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgestill.checkpoints import ModelFolder, load_tokenizer, load_torch, open_model, prepare_model, save_model
from edgestill.errors import BadInput
from edgestill.model_origin import (
    Named,
    Origin,
    named_by,
    origin_from_json,
    origin_to_json,
    source_origin,
    student_origin,
)

gguf = pytest.importorskip("gguf")

CARD = """---
language:
- en
- no
license: other
license_name: llama3.2
license_link: https://example.org/terms
base_model:
- HuggingFaceTB/SmolLM2-135M
- https://huggingface.co/Qwen/Qwen3-0.6B
datasets: HuggingFaceTB/smoltalk
tags: [chat, edge]
pipeline_tag: text-generation
---
# Title
"""


def _card(folder: Path, text: str = CARD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


def test_a_card_says_what_llama_cpp_reads_in_it(tmp_path: Path) -> None:
    """Against gguf's own reading of the same folder; it titles names ("Qwen3 0.6B"), we leave them as they are."""
    folder = _card(tmp_path / "model")
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    ours, theirs = source_origin(folder, {}), gguf.Metadata.load(None, folder)
    assert list(ours.languages) == theirs.languages
    assert list(ours.tags) == theirs.tags
    assert (ours.license_name, ours.license_link) == (theirs.license_name, theirs.license_link)
    assert [model.repo_url for model in ours.base_models] == [model["repo_url"] for model in theirs.base_models]
    assert [model.repo_url for model in ours.datasets] == [
        model["repo_url"].replace(".co/", ".co/datasets/")
        for model in theirs.datasets  # a data set lives there
    ]
    assert {**ours.sampling, "penalty_repeat": None} == {  # newer ones read it as well
        "temp": theirs.sampling_temp, "top_k": theirs.sampling_top_k, "top_p": theirs.sampling_top_p,
        "penalty_repeat": theirs.sampling_penalty_repeat,
    }  # fmt: skip


def test_a_model_that_samples_nothing_recommends_nothing(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert source_origin(tmp_path, {}).sampling == {}


@pytest.mark.parametrize("front", ["a: [", "- a\n- b", "x: " + "[" * 3000, "license: {a: b}", "base_model: 3", "\t:"])
def test_a_broken_card_says_nothing(front: str, tmp_path: Path) -> None:
    origin = source_origin(_card(tmp_path / "m", f"---\n{front}\n---\n"), {})
    assert origin.license_name is None
    assert origin.languages == ()


@pytest.mark.parametrize(
    ("loaded_from", "bases"),
    [
        ("nreimers/MiniLM-L6-H384-uncased",
         (Named("MiniLM-L6-H384-uncased", "nreimers", "https://huggingface.co/nreimers/MiniLM-L6-H384-uncased"),)),
        ("/home/me/model", ()), ("./out/model", ()), ("a/b/c", ()), ("checkpoint", ()), (7, ()),
        ("org/itself", ()),
    ],
)  # fmt: skip
def test_what_it_was_loaded_from_is_a_base_model_and_no_path(
    loaded_from: object, bases: tuple[Named, ...], tmp_path: Path
) -> None:
    address = "hf:org/itself@0123456789012345678901234567890123456789"
    origin = source_origin(tmp_path, {"_name_or_path": loaded_from}, address)
    assert origin.base_models == bases
    assert origin.itself == named_by("org/itself")


def test_an_imported_folder_keeps_it_and_says_it_again(tiny_llama: Path, tmp_path: Path) -> None:
    source = _card(Path(shutil.copytree(tiny_llama, tmp_path / "source")))
    (source / "edgestill.json").unlink()
    first = prepare_model(source, tmp_path / "first")
    assert first.origin == source_origin(source, {})
    assert first.license == "other"
    assert prepare_model(first.path, tmp_path / "again").model_id == first.model_id


def test_a_model_without_an_origin_keeps_its_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    folder = open_model(tiny_llama)
    assert folder.origin == Origin()
    saved = save_model(load_torch(tiny_llama), load_tokenizer(tiny_llama), tmp_path / "out", folder)
    assert "origin" not in json.loads((saved.path / "edgestill.json").read_text())
    assert folder.named == Named("llama 169K")


def _described(folder: Path, origin: Origin, to: Path) -> ModelFolder:
    shutil.copytree(folder, to)
    facts = json.loads((to / "edgestill.json").read_text())
    (to / "edgestill.json").write_text(json.dumps({**facts, "origin": origin_to_json(origin)}))
    return open_model(to)


def test_a_student_is_based_on_its_teachers_once(tiny_llama: Path, tmp_path: Path) -> None:
    taught = Origin(Named("Big", "org"), languages=("de",), tags=("x",), sampling={"temp": 0.5}, datasets=(Named("d"),))
    teacher = _described(tiny_llama, taught, tmp_path / "teacher")
    other, unnamed = _described(tiny_llama, Origin(Named("Other")), tmp_path / "other"), open_model(tiny_llama)
    student = student_origin(teacher, teacher, [other, unnamed])
    assert student.itself == Named("Big student")
    assert student.base_models == (Named("Big", "org"), Named("Other"), Named("llama 169K"))
    assert (student.languages, student.sampling, student.tags, student.datasets) == (("de",), {"temp": 0.5}, (), ())
    between = _described(tiny_llama, student_origin(teacher, teacher), tmp_path / "round-1")
    assert student_origin(teacher, between) == student_origin(teacher, teacher)
    assert student_origin(teacher, other).base_models == (Named("Other"), Named("Big", "org"))


@pytest.mark.parametrize(
    "value",
    ["x", 3, [1], {"itself": {}}, {"itself": {"name": 3}}, {"itself": {"name": "a", "path": "b"}}, {"x": 1},
     {"languages": [None]}, {"base_models": [{"name": ""}]}, {"sampling": {"temp": "hot"}}, {"sampling": {"top_q": 1}},
     {"license_name": None}, {"tags": ["a"] * 300}],
)  # fmt: skip
def test_a_forged_origin_is_one_clear_line(value: object, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="origin"):
        origin_from_json(value, tmp_path / "edgestill.json")


def test_json_and_back() -> None:
    origin = Origin(
        Named("a", "b", "c"), "n", "l", ("en",), ("t",), (Named("x"),), (Named("y", None, "u"),), {"top_k": 3}
    )
    assert origin_from_json(json.loads(json.dumps(origin_to_json(origin))), Path("f")) == origin
