from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill.checkpoints import load_tokenizer, load_torch, open_model, save_model
from edgestill.distill.anatomy import count_parameters
from edgestill.distill.importance import measure_importance
from edgestill.distill.planning import Calibration, find_plan, plan_student
from edgestill.distill.student import StudentPlan, make_student
from edgestill.errors import BadInput, RecipeError
from edgestill.recipe import StudentConfig

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture
def text(sentences: list[str]) -> Calibration:
    return Calibration(tuple(sentences[:12]), 32)


def _config(**keys: Any) -> StudentConfig:
    return StudentConfig.model_validate(keys)


def _parameters(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("fixture", ["encoder", "classifier", "tiny_llama"])
def test_keeping_everything_is_the_teacher_bit_for_bit(fixture, request):
    folder = open_model(request.getfixturevalue(fixture))
    plan = plan_student(folder, _config(layers=folder.layers, ffn=1.0))
    assert plan == StudentPlan.of_layers(folder)
    assert (plan.parameters, plan.size_bytes) == (folder.parameters, 4 * folder.parameters)
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=IDS, attention_mask=MASK) for model in (make_student(folder, plan), load_torch(folder.path))
        )
    assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.logits for x in (ours, theirs)))


@pytest.mark.parametrize(
    ("fixture", "keys"),
    [
        ("encoder", {"layers": 3, "ffn": 17}),
        ("classifier", {"layers": 1, "ffn": 0.5}),
        ("tiny_llama", {"keep": [0, 3], "ffn": 0.3, "kv_heads": 1}),
        ("tiny_llama", {"layers": 3, "heads": 2, "choose": "block_influence"}),
        ("tiny_llama", {"layers": 2, "ffn": 40, "choose": "taylor", "kv_heads": 1, "heads": 1}),
    ],
)
def test_a_plan_counts_what_the_student_has(fixture, keys, request, text):
    folder = open_model(request.getfixturevalue(fixture))
    plan = plan_student(folder, _config(**keys), text)
    student = make_student(folder, plan)
    assert plan.parameters == _parameters(student)
    assert sum(plan.groups_of(folder).values()) == plan.parameters
    assert plan == plan_student(folder, _config(**keys), text)
    assert bool(torch.isfinite(student(input_ids=IDS, attention_mask=MASK)[0]).all())


def test_parameters_by_group(tiny_llama: Path):
    folder = open_model(tiny_llama)
    found = count_parameters(folder, (0, 2), StudentPlan.of_layers(folder).widths)
    assert found == {
        "embedding": folder.vocab_size * 64, "ffn": 2 * 3 * 64 * 128, "attention": 2 * (2 * 64 * 64 + 2 * 64 * 32),
        "other": 2 * 2 * 64 + 64,
    }  # fmt: skip


def test_the_most_important_parts_stay(tiny_llama: Path, text: Calibration):
    folder = open_model(tiny_llama)
    for choose in ("block_influence", "taylor"):
        scores = measure_importance(folder, text.batches(folder), taylor=choose == "taylor")
        plan = plan_student(folder, _config(layers=2, ffn=50, kv_heads=1, choose=choose), text)
        assert set(plan.keep) == set(np.argsort(scores.layers)[-2:].tolist())
        for layer, neurons, queries in zip(plan.keep, plan.neurons, plan.queries, strict=True):
            assert set(neurons) == set(np.argsort(scores.neurons[layer])[-50:].tolist())
            groups = scores.queries[layer].reshape(2, 2).sum(1)
            assert queries == ((0, 1) if groups[0] > groups[1] else (2, 3))


@pytest.mark.parametrize("choose", ["even", "taylor"])
def test_faint_neurons_go_first_and_are_hardly_missed(tiny_llama: Path, tmp_path: Path, text: Calibration, choose):
    copy = shutil.copytree(tiny_llama, tmp_path / "faint")
    state = load_file(copy / "model.safetensors")
    faint = [sorted(np.random.default_rng(layer).permutation(128)[:64].tolist()) for layer in range(4)]
    for layer, rows in enumerate(faint):
        state[f"model.layers.{layer}.mlp.up_proj.weight"][rows] *= 0.01
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    folder = open_model(copy)
    plan = plan_student(folder, _config(ffn=64, choose=choose), text)
    overlap = [len(set(kept) & set(rows)) for kept, rows in zip(plan.neurons, faint, strict=True)]
    assert max(overlap) <= (0 if choose == "even" else 6)  # Taylor looks at the loss, and some loud ones don't matter
    teacher = load_torch(copy)
    distances = []
    for neurons in (plan.neurons, tuple(tuple(rows) for rows in faint)):
        student = make_student(folder, dataclasses.replace(plan, neurons=neurons))
        with torch.no_grad():
            logs = [torch.log_softmax(m(input_ids=IDS, attention_mask=MASK).logits[0], -1) for m in (teacher, student)]
        distances.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()))
    assert distances[0] < 0.05 * distances[1]


def test_a_target_takes_width_to_half_and_then_depth(tiny_llama: Path, text: Calibration):
    folder = open_model(tiny_llama)
    whole = folder.parameters
    neuron = 3 * 64 * 4  # parameters that one neuron fewer in each of four layers saves

    def plan(limit: int) -> StudentPlan:
        return plan_student(folder, _config(target={"parameters": limit}), text)

    assert (len(plan(whole).keep), plan(whole).ffn) == (4, 128)
    assert (len(plan(whole - 1).keep), plan(whole - 1).ffn) == (4, 127)
    assert (len(plan(whole - 10 * neuron).keep), plan(whole - 10 * neuron).ffn) == (4, 118)
    assert (len(plan(whole - 64 * neuron).keep), plan(whole - 64 * neuron).ffn) == (4, 64)
    deeper = plan(whole - 64 * neuron - 1)
    assert len(deeper.keep) == 3
    assert 64 <= deeper.ffn < 128
    # Every limit is kept, and one neuron more would break it: compared with all plans there are.
    for limit in range(whole // 2, whole, 9973):
        found = plan(limit)
        sizes = {
            (depth, ffn): sum(count_parameters(folder, tuple(range(depth)),
                                               dataclasses.replace(found.widths, ffn=ffn)).values())
            for depth in range(1, 5) for ffn in range(64, 129)
        }  # fmt: skip
        assert (len(found.keep), found.ffn) == max(shape for shape, size in sizes.items() if size <= limit)


def test_targets_in_other_units(tiny_llama: Path, text: Calibration):
    folder = open_model(tiny_llama)
    half = plan_student(folder, _config(target={"fraction": 0.5}), text)
    assert 0.45 * folder.parameters < half.parameters <= 0.5 * folder.parameters
    assert plan_student(folder, _config(target={"parameters": folder.parameters // 2}), text) == half
    stored = plan_student(folder, _config(target={"bytes": 2 * folder.parameters}), text)
    assert stored == half
    assert plan_student(folder, _config(target={"bytes": folder.parameters, "precision": "fp16"}), text) == half
    # An own unit of cost: 3 a layer and 1 for each 16 neurons.
    asked: list[StudentPlan] = []

    def cost(plan: StudentPlan) -> float:
        asked.append(plan)
        make_student(folder, plan)  # a cost function may build what it is asked about
        return 3 * len(plan.keep) + plan.ffn / 16

    found = plan_student(folder, _config(target={"latency_ms": 15.0}), text, cost)
    assert (len(found.keep), found.ffn) == (3, 96)
    assert len(asked) < 12
    fixed = plan_student(folder, _config(layers=2, target={"latency_ms": 7.0}), text, cost)
    assert (fixed.keep, fixed.ffn) == ((0, 3), 16)
    fixed = plan_student(folder, _config(ffn=32, target={"latency_ms": 9.0}), text, cost)
    assert (len(fixed.keep), fixed.ffn) == (2, 32)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target": {"parameters": 1000}}, "1000 parameters is out of reach: 1 layers with FFNs of 64"),
        ({"target": {"bytes": 1000, "precision": "int4"}}, "1000 bytes at int4 is out of reach"),
        ({"layers": 4, "ffn": 128, "target": {"fraction": 0.5}}, "out of reach: 4 layers"),
        ({"target": {"latency_ms": 1.0}}, "machine to measure on"),
        ({"ffn": 129}, "ffn = 129, but the teacher has 128"),
        ({"layers": 5}, "layers = 5"),
        ({"keep": [0, 4]}, "0 to 3"),
        ({"kv_heads": 3}, "2 groups"),
        ({"heads": 3}, "can't be shared"),
    ],
)
def test_what_can_not_be_is_one_clear_line(tiny_llama: Path, text: Calibration, keys, words):
    with pytest.raises(RecipeError, match=words) as caught:
        plan_student(open_model(tiny_llama), _config(**keys), text)
    assert caught.value.hint
    assert "\n" not in str(caught.value.message)


def test_importance_without_text_is_one_clear_line(tiny_llama: Path):
    with pytest.raises(BadInput, match="no text"):
        plan_student(open_model(tiny_llama), _config(ffn=0.5))


def test_a_measured_plan_is_kept_for_the_next_life(tiny_llama: Path, tmp_path: Path, text: Calibration):
    folder = open_model(tiny_llama)
    noisy = iter([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0] * 9)

    def cost(plan: StudentPlan) -> float:
        return next(noisy) + len(plan.keep)

    config = _config(target={"latency_ms": 6.0}, choose="block_influence")
    first = find_plan(folder, config, text, cost, tmp_path)
    assert find_plan(folder, config, text, None, tmp_path) == first
    other = _config(ffn=0.5)
    assert find_plan(folder, other, text, None, tmp_path) == plan_student(folder, other, text)
    fewer = Calibration(text.texts[:3], 32)
    assert find_plan(folder, other, fewer, None, tmp_path) == plan_student(folder, other, fewer)


def test_nothing_measured_leaves_no_file(tiny_llama: Path, tmp_path: Path, text: Calibration):
    find_plan(open_model(tiny_llama), _config(layers=2), text, None, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("keys", [{"ffn": 48}, {"kv_heads": 1}, {"heads": 2, "ffn": 0.5, "layers": 3}])
def test_a_narrow_student_is_saved_and_read_back(tiny_llama: Path, tmp_path: Path, text: Calibration, keys):
    folder = open_model(tiny_llama)
    student = make_student(folder, plan_student(folder, _config(**keys), text))
    saved = save_model(student, load_tokenizer(tiny_llama), tmp_path / "student", folder)
    again = load_torch(saved.path)
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS, attention_mask=MASK).logits for model in (again, student))
    assert torch.equal(ours, theirs)
    assert again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr()
