"""Ways to train: precision, recomputing, averages, low rank, early stopping, trackers, signals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from edgestill.checkpoints import load_torch, open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import DistillResult, distill
from edgestill.distill.averaging import Average
from edgestill.distill.lora import add_lora, merge_lora
from edgestill.distill.precision import check_precision
from edgestill.distill.recompute import recompute_blocks
from edgestill.distill.stopping import EarlyStopping
from edgestill.distill.trackers import check_trackers
from edgestill.errors import BadInput, MissingDependency, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig
from edgestill.recipe_training import LoraConfig

EMBEDDING = {"embedding_cosine": 1.0, "embedding_gram": 1.0}
GENERATION = {"forward_kl": 0.9, "cross_entropy": 0.1, "hidden_states": 0.1}


def _run(teacher: Path, place: Path, data: DataSets, loss: dict[str, float], **changes: Any) -> DistillResult:
    progress = changes.pop("progress", lambda text, part=None: None)
    plain = {"batch_size": 8, "max_steps": 8, "learning_rate": 2e-3, "save_every": 3, "threads": 1}
    config = DistillConfig(loss=loss, **{**plain, **changes})  # type: ignore[arg-type]
    return distill(
        teacher, place / "out", config=config, student=StudentConfig(layers=2), data=data, max_length=32,
        work=place / "work", progress=progress,
    )  # fmt: skip


def _weights(result: DistillResult) -> dict[str, torch.Tensor]:
    return load_file(result.path / "model.safetensors")


@pytest.mark.parametrize(("kind", "loss"), [("tiny_llama", GENERATION), ("encoder", {**EMBEDDING, "hidden_states": 1})])
def test_gradient_checkpointing_gives_the_same_student_bit_for_bit(kind, loss, request, tmp_path, data):
    teacher = request.getfixturevalue(kind)
    plain, again = (
        _run(teacher, tmp_path / str(flag), data, loss, gradient_checkpointing=flag) for flag in (False, True)
    )
    assert hash_tree(plain.path) == hash_tree(again.path)


def test_a_recomputed_layer_really_runs_twice(tiny_llama: Path):
    model = load_torch(tiny_llama)
    calls = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, inputs: calls.append(id(module)))
    recompute_blocks(model)
    ids = torch.arange(5, 15)[None]
    loss = model(input_ids=ids).logits.square().mean()
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 8
    with torch.no_grad():
        model(input_ids=ids)
    assert len(calls) == 12


def test_bf16_trains_nearly_the_same_student_and_saves_fp32(tiny_llama: Path, tmp_path: Path, data: DataSets):
    fp32, bf16 = (_run(tiny_llama, tmp_path / name, data, GENERATION, precision=name) for name in ("fp32", "bf16"))
    losses = [[row["loss"] for row in result.curves if "loss" in row] for result in (fp32, bf16)]
    assert losses[0] != losses[1]  # it did run in another precision
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert bf16.dev_after["kl"] < bf16.dev_before["kl"]
    assert bf16.dev_before == pytest.approx(fp32.dev_before, rel=1e-4)  # measured in fp32, attention summed otherwise
    assert {tensor.dtype for tensor in _weights(bf16).values()} == {torch.float32}


@pytest.mark.parametrize("cache", [None, {"top_k": 8}])
def test_a_bf16_teacher_teaches_nearly_the_same_and_is_compared_with_in_fp32(
    tiny_llama: Path, tmp_path: Path, data: DataSets, cache: dict[str, object] | None
):
    losses = {"forward_kl": 1.0, "hidden_states": 0.1}
    fp32, bf16 = (
        _run(tiny_llama, tmp_path / name, data, losses, teacher_precision=name, cache=cache)
        for name in ("fp32", "bf16")
    )
    curves = [[row["loss"] for row in result.curves if "loss" in row] for result in (fp32, bf16)]
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)
    assert bf16.dev_before == fp32.dev_before


def test_losses_stay_in_fp32_under_autocast(tiny_llama: Path):
    from edgestill.distill.batches import collate
    from edgestill.distill.objective import Objective, count_items
    from edgestill.distill.teacher import Teacher

    described = open_model(tiny_llama)
    teacher = Teacher(described)
    objective = Objective(load_torch(tiny_llama), described.task, {"forward_kl": 1.0})
    batch = collate([{"index": 0, "ids": tuple(range(5, 25)), "label": -100}], 0)
    hidden = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    objective._hidden = lambda batch: hidden  # the same states, with and without autocast around the loss
    said, counts = teacher.say(batch), count_items([batch])
    plain, _ = objective(batch, said, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, parts = objective(batch, said, counts)
    assert inside.dtype == parts.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_a_device_without_bf16_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    check_precision("fp32", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(Unsupported, match="no bf16") as caught:
        check_precision("bf16", torch.device("cuda"))
    assert "fp32" in caught.value.hint


def test_the_average_is_the_weighted_sum_of_all_steps():
    linear = torch.nn.Linear(3, 2).double()
    average = Average(dict(linear.named_parameters()), 0.9)
    seen = [linear.weight.detach().clone()]
    expected = seen[0].clone()
    for step in range(12):
        with torch.no_grad():
            linear.weight += torch.randn(2, 3, dtype=torch.float64)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * linear.weight.detach()
    torch.testing.assert_close(average.values["weight"], expected, rtol=1e-12, atol=1e-12)
    now = linear.weight.detach().clone()
    with average.applied():
        assert torch.equal(linear.weight, average.values["weight"])
    assert torch.equal(linear.weight, now)
    other = Average(dict(torch.nn.Linear(3, 2).double().named_parameters()), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 12
    assert torch.equal(other.values["weight"], average.values["weight"])


def test_the_average_is_what_is_saved_and_measured(tiny_llama: Path, tmp_path: Path, data: DataSets):
    loss = {"forward_kl": 1.0}
    plain = _run(tiny_llama, tmp_path / "plain", data, loss, evaluate_every=4)
    averaged = _run(tiny_llama, tmp_path / "averaged", data, loss, ema=0.5, evaluate_every=4)
    # The steps are the same, only what is kept of them differs.
    for ours, theirs in zip(plain.curves, averaged.curves, strict=True):
        assert ("dev" in ours and ours["step"] > 0) or ours == theirs
    on_the_way = [row for row in averaged.curves if "waited" in row]
    assert [row["step"] for row in on_the_way] == [4, 8]
    assert on_the_way[-1]["dev"] == averaged.dev_after
    assert averaged.dev_after != plain.dev_after
    before = load_torch(tiny_llama).model.layers[3].mlp.up_proj.weight.detach()
    name = "model.layers.1.mlp.up_proj.weight"
    moved = [float((_weights(result)[name] - before).norm()) for result in (plain, averaged)]
    assert 0 < moved[1] < moved[0]


def test_early_stopping_stops_and_gives_back_the_best(tiny_llama: Path, tmp_path: Path, data: DataSets):
    # A rate this high runs away after some steps.
    settings = {"learning_rate": 0.03, "schedule": "constant", "warmup_ratio": 0.0, "max_steps": 60}
    result = _run(tiny_llama, tmp_path, data, {"forward_kl": 1.0}, evaluate_every=2, patience=2, **settings)
    measured = [row for row in result.curves if "waited" in row]
    best = min(measured, key=lambda row: row["dev"]["kl"])
    assert result.steps < 60
    assert result.steps == measured[-1]["step"] == best["step"] + 4
    assert [row["waited"] for row in measured[-3:]] == [0, 1, 2]
    assert result.dev_after == best["dev"]  # the student is the best one, not the last one
    card = json.loads((result.path / "distillation.json").read_text())
    assert (card["steps"], card["best_step"]) == (result.steps, best["step"])
    assert result.curves[-1] == {"step": result.steps, "tokens": result.tokens_seen, "dev": result.dev_after}


def test_early_stopping_goes_by_kl_or_by_spearman():
    linear = torch.nn.Linear(1, 1)
    cases = (("kl", (3.0, 2.0, 2.0, 5.0), [0, 0, 1, 2]), ("spearman", (0.125, 0.5, 0.25), [0, 0, 1]))
    for metric, values, waited in cases:
        stopping = EarlyStopping(dict(linear.named_parameters()), 2)
        seen = []
        for step, value in enumerate(values):
            with torch.no_grad():
                linear.weight.fill_(value)
            stopping.saw(step, {metric: value, "top1_agreement": 0.0})
            seen.append(stopping.waited)
        assert seen == waited
        assert stopping.exhausted == (waited[-1] == 2)
        stopping.restore()
        assert float(linear.weight.detach()) == values[1]
        assert stopping.best_step == 1
    with pytest.raises(BadInput, match="nothing to go by"):
        stopping.saw(9, {"top1_agreement": 1.0})


def test_patience_needs_measurements_and_measurements_need_text(encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(ValueError, match="evaluate_every"):
        DistillConfig(loss={"forward_kl": 1.0}, patience=2)
    bare = DataSets((TextSet("words", data.text[0].train, (), (), (), "0" * 64),), ())
    with pytest.raises(RecipeError, match="no text to measure on"):
        _run(encoder, tmp_path, bare, EMBEDDING, evaluate_every=2)


@pytest.mark.parametrize("kind", ["tiny_llama", "encoder"])
def test_low_rank_matrices_change_nothing_until_trained_and_are_added_in(kind: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    plain, model = load_torch(folder), load_torch(folder)
    names = list(model.state_dict())
    add_lora(model, LoraConfig(rank=2, alpha=6.0), seed=1)
    ids = torch.arange(5, 15)[None]
    mask = torch.ones_like(ids)

    def answer(which: Any) -> torch.Tensor:
        with torch.no_grad():
            output = which(input_ids=ids, attention_mask=mask)
        return output if isinstance(output, torch.Tensor) else output.logits

    assert torch.equal(answer(model), answer(plain))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    expected = {}
    chooser = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        with torch.no_grad():
            parameter.normal_(0, 0.1, generator=chooser)
    for name, parameter in trained.items():
        if "lora_A" in name:
            other = trained[name.replace("lora_A", "lora_B")]
            expected[name.split(".lora_A")[0] + ".weight"] = 3.0 * other.detach() @ parameter.detach()  # alpha / rank
    wanted = answer(model)
    merge_lora(model)
    assert list(model.state_dict()) == names
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor + expected.get(name, 0.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-3, atol=1e-4)


def test_a_low_rank_student_is_a_plain_model(tiny_llama: Path, tmp_path: Path, data: DataSets):
    lora = LoraConfig(rank=4, targets=("q_proj", "mlp.up_proj"))
    result = _run(tiny_llama, tmp_path, data, GENERATION, lora=lora, gradient_checkpointing=True)
    assert result.dev_after["kl"] < result.dev_before["kl"]
    start = load_file(tiny_llama / "model.safetensors")
    weights = _weights(result)
    origin = {name: name.replace("layers.1", "layers.3") for name in weights}
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, start[origin[name]])}
    assert {name.split(".", 3)[-1] for name in moved} == {"self_attn.q_proj.weight", "mlp.up_proj.weight"}
    assert open_model(result.path).layers == 2
    with pytest.raises(RecipeError, match="no linear layer is called 'qproj'") as caught:
        _run(tiny_llama, tmp_path / "other", data, GENERATION, lora=LoraConfig(targets=("qproj",)))
    assert "q_proj" in caught.value.hint


def test_a_tracker_that_is_missing_is_said_before_any_work(encoder: Path, tmp_path: Path, data: DataSets):
    missing = next((name for name in ("mlflow", "trackio") if importlib.util.find_spec(name) is None), None)
    if missing is None:
        pytest.skip("all of them are installed")
    with pytest.raises(MissingDependency, match=missing) as caught:
        _run(encoder, tmp_path, data, EMBEDDING, report_to=(missing,))
    assert caught.value.hint.startswith(f"pip install {missing}")
    assert not (tmp_path / "work").exists()
    check_trackers(())


def test_callbacks_get_every_raw_component(tiny_llama: Path, tmp_path: Path, data: DataSets, monkeypatch):
    from edgestill.distill import run

    seen: list[dict[str, float]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            seen.append({"at": state.global_step, **(logs or {})})

    class Listened(run.DistillTrainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.add_callback(Listener())

    monkeypatch.setattr(run, "DistillTrainer", Listened)
    result = _run(tiny_llama, tmp_path, data, GENERATION, max_steps=3, evaluate_every=3)
    rows = [row for row in result.curves if "loss" in row]
    assert [row["at"] for row in seen] == [1, 2, 3, 3]
    for heard, row in zip(seen, rows, strict=False):
        assert all(heard[name] == row[name] for name in ("loss", *GENERATION, "learning_rate", "grad_norm"))
    assert seen[-1]["eval_kl"] == result.dev_after["kl"]


def test_tensorboard_gets_the_curves_in_the_work_folder(tiny_llama: Path, tmp_path: Path, data: DataSets):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = _run(tiny_llama, tmp_path, data, GENERATION, report_to=("tensorboard",), evaluate_every=4)
    events = EventAccumulator(str(tmp_path / "work" / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/forward_kl")]
    assert found == pytest.approx([row["forward_kl"] for row in result.curves if "loss" in row])
    assert [event.step for event in events.Scalars("eval/kl")] == [4, 8]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


@pytest.mark.parametrize(("number", "in_step", "ends_after"), [(signal.SIGINT, 4, 5), (signal.SIGTERM, 4, 5),
                                                              (signal.SIGINT, 8, 8)])  # fmt: skip
def test_an_interrupted_run_goes_on_where_it_stopped(
    number: int, in_step: int, ends_after: int, tiny_llama: Path, tmp_path: Path, data: DataSets
):
    told: list[str] = []

    def interrupt(text: str, part: float | None = None) -> None:
        told.append(text)
        if text.startswith(f"step {in_step} "):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_llama, tmp_path / "cut", data, GENERATION, save_every=1000, progress=interrupt)
    assert signal.getsignal(number) is before
    assert "stopping after this step; once more stops at once" in told
    assert [path.name for path in (tmp_path / "cut" / "work").glob("checkpoint-*")] == [f"checkpoint-{ends_after}"]
    assert not (tmp_path / "cut" / "out").exists()
    steps: list[str] = []
    again = _run(tiny_llama, tmp_path / "cut", data, GENERATION, save_every=1000,
                 progress=lambda text, part=None: steps.append(text))  # fmt: skip
    assert next((text for text in steps if text.startswith("step ")), "step 9 ").startswith(f"step {ends_after + 1} ")
    whole = _run(tiny_llama, tmp_path / "whole", data, GENERATION)
    assert hash_tree(again.path) == hash_tree(whole.path)
