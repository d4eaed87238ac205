"""`edgestill distill --plan`, and the student's part of a run: what was planned is what is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgestill import cli
from edgestill.checkpoints import open_model
from edgestill.distillation import latency_cost, plan_distillation
from edgestill.errors import BadInput, RecipeError
from edgestill.pipeline import RunConfig, run_recipe
from edgestill.schemas import FOLDER
from edgestill.stages import Observer

RECIPE = """
name = "shape"
[teacher]
source = "{teacher}"
[student]
{student}
[data]
max_length = 32
[[data.text]]
name = "words"
source = "{text}"
train = 40
calibration = 8
dev = 8
[distill]
loss = {loss}
batch_size = 8
max_steps = 6
threads = 1
[bench]
threads = 1
length = 32
"""
LOGITS = "{ forward_kl = 1.0 }"


@pytest.fixture
def recipe(tmp_path: Path, sentences: list[str], tiny_llama: Path) -> Any:
    (tmp_path / "words.txt").write_text("\n".join(sentences))

    def write(student: str, teacher: Path = tiny_llama, loss: str = LOGITS) -> Path:
        path = tmp_path / "shape.toml"
        path.write_text(RECIPE.format(teacher=teacher, student=student, loss=loss, text=tmp_path / "words.txt"))
        return path

    return write


@pytest.mark.parametrize(
    "student",
    ['layers = 2\nchoose = "block_influence"\nffn = 0.5\nkv_heads = 1', "ffn = 64\nlayers = 3\nsteps = 2",
     "target = { fraction = 0.6 }", 'layers = 2\nchoose = "taylor"'],
)  # fmt: skip
def test_what_is_planned_is_what_is_made(recipe: Any, tmp_path: Path, student: str):
    path = recipe(student)
    plan = plan_distillation(path, Observer())
    assert not (tmp_path / "runs").exists()
    run_recipe(RunConfig(path, tmp_path / "runs", "student"))
    made = open_model(tmp_path / "runs/shape/student")
    card = json.loads((made.path / "distillation.json").read_text())
    assert plan.student.parameters == made.parameters == sum(plan.student.parameters_by_group.values())
    assert plan.student.ffn == made.config["intermediate_size"]
    assert plan.student.kv_heads == made.config["num_key_value_heads"]
    assert plan.student.bytes["fp32"] == 4 * made.parameters
    assert plan.teacher.parameters == open_model(tmp_path / "runs/shape/teacher").parameters
    if "steps" not in student:
        assert [layer.index for layer in plan.layers if layer.kept] == card["keep"]
        assert plan.plan_digest == card["plan"]["digest"]
    assert plan.cost is not None
    assert plan.cost.student_tokens == card["tokens_seen"] + sum(part["tokens_seen"] for part in card.get("rounds", []))
    assert plan.cost.teacher_tokens == plan.cost.student_tokens
    assert all(layer.importance is not None and layer.importance >= 0 for layer in plan.layers)


def test_layers_with_the_highest_scores_are_kept(recipe: Any):
    plan = plan_distillation(recipe('layers = 2\nchoose = "block_influence"'), Observer())
    by_score = sorted(plan.layers, key=lambda layer: -(layer.importance or 0.0))
    assert {layer.index for layer in by_score[:2]} == {layer.index for layer in plan.layers if layer.kept}
    assert plan.layer_measure == "block_influence"
    assert plan.measured_tokens > 8


def test_an_encoder_asks_its_teacher_once_for_each_text(recipe: Any, tiny_bert: Path, tmp_path: Path):
    path = recipe("layers = 2\nffn = 32", tiny_bert, "{ embedding_cosine = 1.0 }")
    plan = plan_distillation(path, Observer())
    result = run_recipe(RunConfig(path, tmp_path / "runs", "student"))
    assert result.status
    card = json.loads((tmp_path / "runs/shape/student/distillation.json").read_text())
    assert plan.cost is not None
    assert plan.cost.student_tokens == card["tokens_seen"]
    assert plan.cost.teacher_tokens == card["cost"]["teacher_forward_tokens"]


def test_the_command_shows_it_and_puts_a_document_on_stdout(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    path = recipe("layers = 2\nffn = 0.5")
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["edgestill", "distill", str(path), "--plan", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        out, err = capfd.readouterr()
        if options:
            document = json.loads(out)
            jsonschema.validate(document, json.loads((FOLDER / "distill-plan.json").read_text()))
            assert (document["student"]["layers"], document["student"]["ffn"]) == (2, 64)
        else:
            assert out == ""
            for word in ("FFN neurons", "key-value groups", "embedding", "int4", "importance", "through the student"):
                assert word in err


def test_what_is_not_fetched_is_named(recipe: Any, tmp_path: Path):
    with pytest.raises(BadInput):
        plan_distillation(recipe("layers = 2", tmp_path / "missing"), Observer())
    path = recipe("layers = 2")
    text = path.read_text().replace(str(tmp_path / "words.txt"), "pypi:nothing-like-this==9.9.9!x.txt")
    path.write_text(text)
    with pytest.raises(BadInput, match="not fetched yet") as caught:
        plan_distillation(path, Observer())
    assert "edgestill fetch" in caught.value.hint


def test_impossible_students_are_one_clear_line(recipe: Any):
    for student, words in (
        ("target = { parameters = 10 }", "out of reach"), ("ffn = 4096", "teacher has 128"), ("heads = 3", "shared"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            plan_distillation(recipe(student), Observer())


def test_the_cost_function_measures_and_a_smaller_plan_is_faster(tmp_path: Path, tiny_llama: Path):
    import dataclasses

    from edgestill.distill.student import StudentPlan

    folder = open_model(tiny_llama)
    cost = latency_cost(folder, 1, 64)
    whole = StudentPlan.of_layers(folder)
    one = StudentPlan.of_layers(folder, (0,))
    narrow = dataclasses.replace(whole, ffn=8, neurons=(tuple(range(8)),) * 4)
    assert min(cost(one) for _ in range(3)) < min(cost(whole) for _ in range(3))
    assert cost(narrow) > 0


def test_a_run_to_a_latency_goes_on_with_the_same_plan(recipe: Any, tmp_path: Path, tiny_llama: Path):
    folder = open_model(tiny_llama)
    from edgestill.distill.student import StudentPlan

    cost = latency_cost(folder, 1, 32)
    between = (cost(StudentPlan.of_layers(folder, (0,))) + cost(StudentPlan.of_layers(folder))) / 2
    path = recipe(f"target = {{ latency_ms = {between:.4f} }}")
    run_recipe(RunConfig(path, tmp_path / "runs", "student"))
    first = open_model(tmp_path / "runs/shape/student")
    assert first.parameters < folder.parameters
    kept = json.loads((tmp_path / "runs/shape/work/distill/plan.json").read_text())
    assert kept["plan"]["parameters"] == first.parameters


def test_a_run_from_a_fresh_shape(recipe: Any, tmp_path: Path, tiny_llama: Path):
    shape = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**shape, "num_hidden_layers": 1, "intermediate_size": 40}))
    path = recipe('config = "small.json"\nseed = 3')
    plan = plan_distillation(path, Observer())
    run_recipe(RunConfig(path, tmp_path / "runs", "student"))
    student = open_model(tmp_path / "runs/shape/student")
    assert (student.layers, student.config["intermediate_size"]) == (1, 40)
    assert plan.start is not None
    assert plan.student.parameters == student.parameters
    stages = json.loads((tmp_path / "runs/shape/run.json").read_text())["stages"]
    assert {"start", "student"} <= set(stages)


@pytest.mark.parametrize(
    "keys", [{}, {"ffn": 0.5}, {"ffn": 50}, {"kv_heads": 1}, {"heads": 2}, {"heads": 1, "kv_heads": 1, "ffn": 0.25}]
)
@pytest.mark.parametrize("layers", [2, 4])
def test_what_plan_foresees_is_what_the_student_has(tiny_llama: Path, sentences: list[str], keys: Any, layers: int):
    """`edgestill plan` knows only the config and the headers."""
    from edgestill.distill.planning import Calibration, plan_student
    from edgestill.inspection import inspect_model
    from edgestill.recipe import StudentConfig

    config = StudentConfig.model_validate({"layers": layers, **keys})
    plan = plan_student(open_model(tiny_llama), config, Calibration(tuple(sentences[:8]), 16))
    # The final norm is counted as a part of the layers, so it shrinks with them.
    assert inspect_model(tiny_llama).student_parameters(layers, **keys) == pytest.approx(plan.parameters, abs=64)


def test_plan_speaks_of_targets(recipe: Any):
    from edgestill.plan import plan_recipe

    whole = plan_recipe(recipe("layers = 4")).facts["student"]
    assert "(100%)" in whole
    assert "(60%)" in plan_recipe(recipe("target = { fraction = 0.6 }")).facts["student"]
    assert "planned to 3 ms" in plan_recipe(recipe("target = { latency_ms = 3.0 }")).facts["student"]
    assert "starts from" in plan_recipe(recipe('config = "x.json"')).facts["student"]
