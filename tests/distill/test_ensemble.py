from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill.checkpoints import load_torch, open_model
from edgestill.data import DataSets
from edgestill.distill import DistillResult, distill
from edgestill.distill.batches import Examples, collate
from edgestill.distill.ensemble import MixedTeacher
from edgestill.distill.evaluate import HeldOut
from edgestill.distill.objective import Objective, count_items
from edgestill.distill.student import StudentPlan, make_student
from edgestill.distill.teacher import Teacher
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig


def _other(folder: Path, copy: Path, seed: int = 7) -> Path:
    """The same architecture and tokenizer with other weights."""
    shutil.copytree(folder, copy)
    chooser = torch.Generator().manual_seed(seed)
    state = load_file(copy / "model.safetensors")
    for tensor in state.values():
        if tensor.dim() == 2:
            tensor.normal_(0, tensor.shape[1] ** -0.5, generator=chooser)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def llama2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _other(tiny_llama, tmp_path_factory.mktemp("second") / "llama")


@pytest.fixture(scope="session")
def classifier2(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _other(classifier, tmp_path_factory.mktemp("second") / "classifier")


def _config(count: int = 1, weights: tuple[float, ...] = (), **changes: Any) -> DistillConfig:
    teachers = [{"source": "x", "weight": w} for w in weights or (1.0,) * count]
    plain = {"loss": {"forward_kl": 1.0}, "batch_size": 8, "max_steps": 12, "learning_rate": 2e-3, "threads": 1}
    return DistillConfig.model_validate({**plain, "teacher": teachers, **changes})


def _run(
    teacher: Path, place: Path, data: DataSets, config: DistillConfig, others: tuple[Path, ...] = (), **changes: Any
) -> DistillResult:
    arguments = {"student": StudentConfig(layers=2), "data": data, "max_length": 32, "work": place / "work", **changes}
    return distill(teacher, place / "out", config=config, others=others, **arguments)


def _batch(rows: int = 5) -> dict[str, torch.Tensor]:
    chooser = torch.Generator().manual_seed(2)
    ids = tuple(tuple(torch.randint(5, 320, (n,), generator=chooser).tolist()) for n in (4, 9, 6, 3, 11)[:rows])
    return collate(list(Examples(ids, (-100,) * rows)), 2)


def _softmax(logits: Any, temperature: float) -> Any:
    scaled = logits.astype(np.float64) / temperature
    soft = np.exp(scaled - scaled.max(-1, keepdims=True))
    return soft / soft.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_against_the_mean_of_softmaxes(tiny_llama: Path, llama2: Path, temperature: float):
    folders = [open_model(path) for path in (tiny_llama, llama2)]
    weights = (0.3, 0.7)
    teacher = MixedTeacher(folders, weights, temperature, 300, pad_id=2)
    student = make_student(folders[0], StudentPlan.of_layers(folders[0], (0, 3)))
    objective = Objective(student, "text-generation", {"forward_kl": 1.0}, temperature=temperature, vocab_size=300)
    batch = _batch()
    _, parts = objective(batch, teacher.say(batch), count_items([batch]))

    found = []
    with torch.no_grad():
        all_logits = [
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., :300].numpy()
            for m in (load_torch(tiny_llama), load_torch(llama2), student)
        ]
    for row, mask in enumerate(batch["attention_mask"]):
        for place in range(int(mask.sum()) - 1):
            one, two, ours = (_softmax(logits[row, place], temperature) for logits in all_logits)
            mean = weights[0] * one + weights[1] * two
            found.append(temperature**2 * (mean * (np.log(mean) - np.log(ours))).sum())
    assert float(parts[0]) == pytest.approx(np.mean(found), rel=1e-5)


def test_teachers_with_padded_embeddings_of_other_sizes_and_widths(tiny_llama: Path):
    """The heads are taken apart by width, and rows behind the tokenizer's ids are cut before the softmax."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgestill.distill.ensemble import MixedModel

    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=340, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=16, initializer_range=0.3)).eval()  # fmt: skip
    narrow = load_torch(tiny_llama)
    mixed = MixedModel([narrow, wide], (0.4, 0.6), 310)
    batch = _batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        states = mixed.base_model(**inputs).last_hidden_state
        assert states.shape[-1] == 64 + 32
        ours = torch.softmax(mixed.get_output_embeddings()(states), -1)
        one, two = (torch.softmax(m(**inputs).logits[..., :310].double(), -1) for m in (narrow, wide))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real].double(), (0.4 * one + 0.6 * two)[real], rtol=1e-4, atol=1e-8)


def test_no_further_teacher_is_todays_path_bit_for_bit(tiny_llama: Path, tmp_path: Path, data: DataSets):
    one = _run(tiny_llama, tmp_path / "one", data, _config(0))
    weighted = _run(tiny_llama, tmp_path / "two", data, _config(0, teacher_weight=3.0))
    assert load_file(one.path / "model.safetensors").keys()
    for name, tensor in load_file(one.path / "model.safetensors").items():
        assert torch.equal(tensor, load_file(weighted.path / "model.safetensors")[name])


@pytest.mark.parametrize("kind", ["tiny_llama", "classifier"])
def test_two_equal_teachers_are_one(kind: str, tmp_path: Path, data: DataSets, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    student = StudentConfig(layers=1)
    config = {"temperature": 2.0, "learning_rate": 5e-4}
    one = _run(folder, tmp_path / "one", data, _config(0, **config), student=student)
    two = _run(folder, tmp_path / "two", data, _config(weights=(2.0,), **config), (folder,), student=student)
    first, last = one.curves[1], two.curves[1]
    assert last["forward_kl"] == pytest.approx(first["forward_kl"], rel=1e-4)
    for name, value in one.dev_after.items():
        assert two.dev_after[name] == pytest.approx(value, rel=2e-2, abs=2e-3), name
    start = load_torch(folder).state_dict()
    moved = 0.0
    for name, tensor in load_file(one.path / "model.safetensors").items():
        torch.testing.assert_close(load_file(two.path / "model.safetensors")[name], tensor, rtol=2e-2, atol=5e-4)
        moved = max(moved, float((tensor - start.get(name, tensor)).abs().max()))
    assert moved > 2e-3  # so the students have really been trained


def test_classes_are_averaged_at_the_temperature_of_the_loss(
    classifier: Path, classifier2: Path, tmp_path: Path, data: DataSets
):
    result = _run(
        classifier, tmp_path, data, _config(weights=(3.0,), temperature=2.0, batch_size=150, max_steps=1),
        (classifier2,), student=StudentConfig(layers=1),
    )  # fmt: skip
    from edgestill.checkpoints import load_tokenizer

    batch = load_tokenizer(classifier)(data.split("train"), padding=True, return_tensors="pt")
    student = make_student(open_model(classifier), StudentPlan.of_layers(open_model(classifier), (0,)))
    with torch.no_grad():
        ours, one, two = (
            _softmax(m(**batch).logits.numpy(), 2.0) for m in (student, load_torch(classifier), load_torch(classifier2))
        )
    mean = 0.25 * one + 0.75 * two
    expected = 4.0 * (mean * (np.log(mean) - np.log(ours))).sum(-1).mean()
    assert result.curves[1]["forward_kl"] == pytest.approx(expected, rel=1e-4)
    assert result.cost["teacher_forward_tokens"] == 2 * result.tokens_seen
    card = json.loads((result.path / "distillation.json").read_text())
    ids = [open_model(path).model_id for path in (classifier, classifier2)]
    assert card["teachers"] == [{"model_id": ids[0], "weight": 0.25}, {"model_id": ids[1], "weight": 0.75}]


def test_held_out_text_is_measured_against_the_mean_at_1(tiny_llama: Path, llama2: Path):
    folders = [open_model(path) for path in (tiny_llama, llama2)]
    teacher = MixedTeacher(folders, (0.5, 0.5), 3.0, 320, pad_id=2)
    batch = _batch()
    examples = Examples(
        tuple(
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ),
        (-100,) * 5,
    )
    found = HeldOut(examples, teacher, 320).measure(load_torch(tiny_llama))["kl"]
    alone = HeldOut(examples, Teacher(folders[0], pad_id=2), 320).measure(load_torch(tiny_llama))["kl"]
    values = []
    with torch.no_grad():
        one, two = (m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
                    for m in (load_torch(tiny_llama), load_torch(llama2)))  # fmt: skip
    for row, mask in enumerate(batch["attention_mask"]):
        for place in range(int(mask.sum()) - 1):
            ours, theirs = _softmax(one[row, place], 1.0), _softmax(two[row, place], 1.0)
            mean = (ours + theirs) / 2
            values.append((mean * np.log(mean / ours)).sum())
    assert found == pytest.approx(np.mean(values), rel=1e-4)
    assert alone == 0.0


@pytest.mark.whole
def test_two_teachers_write_and_judge_and_a_run_goes_on(tiny_llama: Path, llama2: Path, tmp_path: Path, data: DataSets):
    writing = {"prompt_tokens": 3, "new_tokens": 4}
    config = _config(
        loss={"forward_kl": 1.0, "hidden_states": 0.1, "attention_maps": 0.1},
        on_policy={**writing, "ratio": 0.5, "replay": 16},
        sequence={**writing, "share": 0.5}, save_every=2,
    )  # fmt: skip
    whole = _run(tiny_llama, tmp_path / "whole", data, config, (llama2,))

    class Killed(Exception):
        pass

    def progress(message: str, part: float | None = None) -> None:
        if message.startswith("step 7 "):
            raise Killed

    with pytest.raises(Killed):
        _run(tiny_llama, tmp_path / "cut", data, config, (llama2,), progress=progress)
    again = _run(tiny_llama, tmp_path / "cut", data, config, (llama2,))
    assert hash_tree(again.path) == hash_tree(whole.path)
    assert dict(again.cost) == dict(whole.cost)
    # Another second teacher is another job, the same one from another place is not.
    moved = _config(
        loss=config.loss, on_policy={**writing, "ratio": 0.5, "replay": 16}, sequence={**writing, "share": 0.5},
        save_every=2, teacher=[{"source": "elsewhere"}],
    )  # fmt: skip
    told: list[str] = []
    listen = lambda text, part=None: told.append(text)  # noqa: E731
    assert _run(tiny_llama, tmp_path / "cut", data, moved, (llama2,), progress=listen) == again
    assert told == []
    other = _run(tiny_llama, tmp_path / "cut", data, config, (tiny_llama,), progress=listen)
    assert told
    assert dict(other.dev_after) != dict(again.dev_after)


def test_what_can_not_be_averaged_is_refused_with_the_reason(
    tiny_llama: Path, llama2: Path, encoder: Path, classifier: Path, tmp_path: Path, data: DataSets
):
    with pytest.raises(Unsupported, match="different spaces"):
        _run(encoder, tmp_path, data, _config(loss={"embedding_cosine": 1.0}), (encoder,))
    with pytest.raises(RecipeError, match="is for text-classification, the first one for text-generation"):
        _run(tiny_llama, tmp_path, data, _config(), (classifier,))
    with pytest.raises(RecipeError, match="names 2 further teachers, 1 were given"):
        _run(tiny_llama, tmp_path, data, _config(2), (llama2,))
    with pytest.raises(Unsupported, match="raw logits have no common zero"):
        _run(tiny_llama, tmp_path, data, _config(loss={"logit_mse": 1.0}), (llama2,))
    for change, reason in (("vocab", "with other tokens"), ("cut", "cuts texts in another way")):
        strange = shutil.copytree(llama2, tmp_path / change)
        written = json.loads((strange / "tokenizer.json").read_text())
        if change == "vocab":  # two tokens change their places
            vocab = written["model"]["vocab"]
            one, two = list(vocab)[100:102]
            vocab[one], vocab[two] = vocab[two], vocab[one]
        else:
            written["pre_tokenizer"]["add_prefix_space"] = True
        (strange / "tokenizer.json").write_text(json.dumps(written))
        with pytest.raises(Unsupported, match=reason):
            _run(tiny_llama, tmp_path, data, _config(), (strange,))
    labels = shutil.copytree(classifier, tmp_path / "labels")
    config = json.loads((labels / "config.json").read_text())
    config["id2label"] = {"0": "good", "1": "fair", "2": "bad"}
    (labels / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="has the labels good, fair, bad, not bad, fair, good"):
        _run(classifier, tmp_path, data, _config(), (labels,), student=StudentConfig(layers=1))


def test_nan_in_the_second_teacher_is_one_clear_line(tiny_llama: Path, llama2: Path, tmp_path: Path, data: DataSets):
    broken = shutil.copytree(llama2, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="not finite"):
        _run(tiny_llama, tmp_path, data, _config(), (broken,))
