"""Quantisation-aware distillation: trained on the grid, shipped bit for bit, nearer to the teacher than rounding."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill.artifact import Artifact
from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import DistillResult, distill
from edgestill.distill.evaluate import HeldOut
from edgestill.distill.fake_quantise import fake_grid
from edgestill.distill.quantized import QuantisedWeights, check_shipped, shipped_grids
from edgestill.distill.trainer import DistillTrainer
from edgestill.errors import EdgestillError, RecipeError, Unsupported, UsageError
from edgestill.export import export
from edgestill.files import hash_tree
from edgestill.pipeline import RunConfig, run_recipe
from edgestill.recipe import DistillConfig, ExportConfig, StudentConfig, parse_recipe
from edgestill.runtimes.payload import open_payload
from edgestill.runtimes.session import SessionOptions, open_session

WORDS = "ship phone board model small large fast quiet loud red blue green".split()
FORMATS = ["onnx:int4", "gguf:q4_0"]
GRIDS = {
    "onnx:int4": {"int4-b32": 18, "int8-b32": 4},
    "gguf:q4_0": {"q4_0": 21, "q8_0": 1},
    "coreml:int8": {"float16": 13, "int8-channel": 16},
}
KL = {"forward_kl": 1.0}


def _ship(to: str, model: Path, out: Path) -> Artifact:
    return export(model, out, ExportConfig(to=to))


def _skip_without(to: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "gguf": "llama_cpp", "coreml": "coremltools"}[to.partition(":")[0]])


def _walks(seed: int, count: int) -> list[str]:
    """Each word has two that may follow it: something that a tiny decoder can learn."""
    chooser, texts = random.Random(seed), []
    for _ in range(count):
        place, words = chooser.randrange(len(WORDS)), []
        for _ in range(10):
            words.append(WORDS[place])
            place = (5 * place + chooser.choice((1, 4))) % len(WORDS)
        texts.append(" ".join(words))
    return texts


@pytest.fixture(scope="module")
def walks() -> DataSets:
    return DataSets((TextSet("walks", tuple(_walks(0, 300)), (), tuple(_walks(1, 40)), (), "0" * 64),), ())


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, walks: DataSets) -> Path:
    """tiny_llama, trained on the walks: two layers would do."""
    folder = tmp_path_factory.mktemp("trained") / "decoder"
    shutil.copytree(tiny_llama, folder)
    distilled = distill(
        folder, folder.with_name("taught"), student=StudentConfig(keep=(0, 1, 2)), data=walks, max_length=64,
        config=DistillConfig(loss={"cross_entropy": 1.0}, max_steps=120, batch_size=16, learning_rate=3e-3, threads=1),
        work=folder.with_name("work"),
    )  # fmt: skip
    assert distilled.dev_after["cross_entropy"] < 0.6  # of 2.5 nats, if it had learned nothing
    return distilled.path


def _train(teacher: Path, place: Path, data: DataSets, to: str | None, **changes: Any) -> DistillResult:
    ship, loss = changes.pop("ship", partial(_ship, to)), changes.pop("loss", KL)
    student = StudentConfig(**changes.pop("student", {}))
    plain = {"batch_size": 8, "max_steps": 8, "learning_rate": 1e-3, "save_every": 3, "threads": 1}
    config = DistillConfig(loss=loss, quantized=to and {"to": to}, **{**plain, **changes})  # type: ignore[arg-type]
    return distill(
        teacher, place / "out", config=config, student=student, data=data, max_length=64, work=place / "work",
        ship=ship if to else None,
    )  # fmt: skip


def _decoded(artifact: Artifact) -> dict[str, torch.Tensor]:
    payload = open_payload(artifact)
    return {tensor.name: torch.from_numpy(payload.decode(tensor)) for tensor in artifact.tensors()}


def _kl(artifact: Artifact, teacher: Path, texts: list[str]) -> float:
    """KL(teacher || artifact) of the artifact in its own runtime, nats a predicted token."""
    tokenizer, model = load_tokenizer(teacher), load_torch(teacher)
    session = open_session(artifact.path, SessionOptions(threads=1))
    found = []
    try:
        for text in texts:
            ids = np.array([tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                theirs = torch.log_softmax(model(torch.from_numpy(ids)).logits.double(), -1)
            ours = torch.log_softmax(torch.from_numpy(session.forward(ids, np.ones_like(ids))).double(), -1)
            found.append((theirs.exp() * (theirs - ours)).sum(-1).flatten())
    finally:
        session.close()
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("to", [*FORMATS, pytest.param("coreml:int8", marks=pytest.mark.whole)])
def test_what_was_trained_is_what_ships(
    to: str, decoder: Path, tmp_path: Path, walks: DataSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    _skip_without(to)
    forwards: list[dict[str, torch.Tensor]] = []
    measure = HeldOut.measure

    def seen(self: HeldOut, student: torch.nn.Module) -> dict[str, float]:
        forwards.append({name: weight.detach().clone() for name, weight in student.named_parameters()})
        return measure(self, student)

    monkeypatch.setattr(HeldOut, "measure", seen)
    result = _train(decoder, tmp_path, walks, to)
    artifact = _ship(to, result.path, tmp_path / "artifact")
    last, saved, decoded = forwards[-1], load_file(result.path / "model.safetensors"), _decoded(artifact)
    assert set(last) == set(saved) == set(decoded)
    for name, weight in last.items():
        assert torch.equal(saved[name], weight), name
        assert torch.equal(decoded[name], weight), name
    before, start = forwards[0], load_torch(decoder).state_dict()
    moved = [name for name in last if not torch.equal(last[name], before[name])]
    assert any("mlp.up_proj" in name for name in moved)  # codes did change
    assert "model.embed_tokens.weight" in moved  # the tied ones too
    assert not torch.equal(before[moved[0]], start[moved[0]])  # and the first measurement was of the grid already
    card = json.loads((result.path / "distillation.json").read_text())
    assert card["grids"] == GRIDS[to]
    assert card["config"]["quantized"] == {"to": to}
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if "ship" in path.name) == []


@pytest.mark.whole
@pytest.mark.parametrize("to", FORMATS)
def test_it_is_nearer_to_its_teacher_than_what_is_rounded_afterwards(
    to: str, decoder: Path, tmp_path: Path, walks: DataSets
) -> None:
    """The whole model on its own: the float student is the teacher, so all of the KL comes from the grid."""
    _skip_without(to)
    dev = walks.split("dev")
    plain = _kl(_ship(to, decoder, tmp_path / "rounded"), decoder, dev)
    for seed in range(3):
        result = _train(decoder, tmp_path / str(seed), walks, to, seed=seed, max_steps=60)
        trained = _kl(_ship(to, result.path, tmp_path / f"trained-{seed}"), decoder, dev)
        assert trained < 0.7 * plain
        assert result.dev_after["kl"] < 0.7 * result.dev_before["kl"]


@pytest.mark.whole
def test_a_cut_student_is_nearer_too(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    """Same cut, same steps: once trained as floats and rounded then, once trained on the grid."""
    _skip_without("onnx:int4")
    dev = walks.split("dev")
    for seed in range(2):
        kl = {}
        for to in (None, "onnx:int4"):
            place = tmp_path / f"{seed}-{to and 'q'}"
            result = _train(
                decoder, place, walks, to, seed=seed, max_steps=80, learning_rate=2e-3, student={"layers": 2}
            )
            kl[to] = _kl(_ship("onnx:int4", result.path, place / "artifact"), decoder, dev)
        assert kl["onnx:int4"] < 0.9 * kl[None]


def test_an_encoder_learns_on_its_grid(encoder: Path, tmp_path: Path, data: DataSets) -> None:
    """Names of a sentence encoder's parameters differ in the folder; rows of 32, and an int8 position table."""
    _skip_without("onnx:int4")
    loss = {"embedding_cosine": 1.0, "embedding_gram": 1.0}
    result = _train(encoder, tmp_path, data, "onnx:int4", loss=loss, max_steps=30)
    decoded = _decoded(_ship("onnx:int4", result.path, tmp_path / "artifact"))
    saved = load_file(result.path / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in decoded.items())
    assert 1 - result.dev_after["cosine"] < 0.8 * (1 - result.dev_before["cosine"])


@pytest.mark.whole
def test_gradient_accumulation_and_recomputing_change_nothing(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    _skip_without("onnx:int4")
    whole = _train(decoder, tmp_path / "whole", walks, "onnx:int4")
    parts = _train(decoder, tmp_path / "parts", walks, "onnx:int4", batch_size=4, gradient_accumulation=2)
    again = _train(decoder, tmp_path / "again", walks, "onnx:int4", gradient_checkpointing=True)
    assert hash_tree(whole.path) == hash_tree(again.path)
    losses = [[row["loss"] for row in result.curves if "loss" in row] for result in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.whole
def test_what_is_kept_is_on_the_grid_whoever_chooses_it(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    """The moving average is of the masters, and quantised; early stopping gives back the masters of its best step."""
    _skip_without("onnx:int4")
    students = {}
    for name, more in (("plain", {}), ("ema", {"ema": 0.9}), ("patience", {"patience": 1})):
        changes = {"evaluate_every": 2, "max_steps": 8, "learning_rate": 3e-3, **more}
        result = _train(decoder, tmp_path / name, walks, "onnx:int4", **changes)
        decoded = _decoded(_ship("onnx:int4", result.path, tmp_path / name / "artifact"))
        students[name] = load_file(result.path / "model.safetensors")
        assert all(torch.equal(students[name][key], weight) for key, weight in decoded.items()), name
        measured = [row["dev"]["kl"] for row in result.curves if "dev" in row]
        if name == "patience":
            assert result.steps == 4  # the rate is too high at first: stopped, and back to step 2
            assert result.dev_after["kl"] == measured[1] < measured[2]
        else:
            assert result.dev_after["kl"] == measured[-2]  # measured in training as it is in the end
    assert not torch.equal(students["plain"]["model.norm.weight"], students["ema"]["model.norm.weight"])


def test_a_weight_beyond_the_codes_is_only_pulled_back() -> None:
    linear = torch.nn.Linear(32, 2, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0], linear.weight[:, 1] = -1.0, 1.0  # 1.0 is stored as 0.875
        linear.weight[:, 2] = 0.9375  # half a step beyond: still rounded, not cut
    from edgestill.artifact import StoredTensor

    quantised = QuantisedWeights(linear, {"weight": fake_grid("gguf", StoredTensor("weight", "w", "q4_0"))})
    assert linear.weight[0, :3].tolist() == [-1.0, 0.875, 0.875]
    linear.weight.grad = torch.ones(2, 32)
    linear.weight.grad[1] = -1.0  # descent would raise every weight of the second row
    quantised.limit_gradients()
    assert linear.weight.grad[0].tolist() == [1.0] * 32
    assert linear.weight.grad[1].tolist() == [-1.0, 0.0, *[-1.0] * 30]
    quantised.before_step()
    assert linear.weight[0, :3].tolist() == [-1.0, 1.0, 0.9375]
    with torch.no_grad():
        linear.weight[:, 0] = -2.0
    quantised.after_step()
    assert linear.weight[0, :3].tolist() == [-2.0, 1.0, 1.0]
    assert quantised.masters["weight"][0, :3].tolist() == [-2.0, 1.0, 0.9375]


def test_the_trainer_limits_gradients_and_steps_on_masters(
    decoder: Path, tmp_path: Path, walks: DataSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary: the hooks of the Trainer that this stands on are called, in this order."""
    _skip_without("onnx:int4")
    calls: list[str] = []
    for name in ("limit_gradients", "before_step", "after_step"):
        method = getattr(QuantisedWeights, name)

        def noted(self: QuantisedWeights, method: Any = method, name: str = name) -> None:
            calls.append(name)
            method(self)

        monkeypatch.setattr(QuantisedWeights, name, noted)
    _train(decoder, tmp_path, walks, "onnx:int4", max_steps=3, batch_size=4, gradient_accumulation=2)
    assert calls == ["limit_gradients", "before_step", "after_step"] * 3
    assert "_clip_grad_norm" in vars(DistillTrainer)


def test_an_exporter_that_stores_something_else_is_noticed_before_training(
    decoder: Path, tmp_path: Path, walks: DataSets
) -> None:
    _skip_without("onnx:int4")
    calls = []

    def careless(model: Path, out: Path) -> Artifact:
        """Exports the second time what it was not given."""
        calls.append(model)
        if len(calls) == 2:
            state = load_file(model / "model.safetensors")
            state["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
            save_file(state, model / "model.safetensors", metadata={"format": "pt"})
        return _ship("onnx:int4", model, out)

    with pytest.raises(EdgestillError, match=r"onnx:int4 would store model\.layers\.1\.mlp\.up_proj\.weight"):
        _train(decoder, tmp_path, walks, "onnx:int4", ship=careless)
    assert len(calls) == 2
    assert not (tmp_path / "out").exists()


def test_grids_are_read_from_an_export(decoder: Path, tmp_path: Path) -> None:
    _skip_without("onnx:int4")
    model = load_torch(decoder)
    grids = shipped_grids(model, decoder, tmp_path, partial(_ship, "onnx:int4"))
    assert {name: grid.name for name, grid in grids.items() if "layers.0.mlp" in name or "embed" in name} == {
        "model.layers.0.mlp.gate_proj.weight": "int4-b32", "model.layers.0.mlp.up_proj.weight": "int4-b32",
        "model.layers.0.mlp.down_proj.weight": "int8-b32", "model.embed_tokens.weight": "int8-b32",
    }  # fmt: skip
    with pytest.raises(EdgestillError, match=r"with \d+ of \d+ weights other than the trained ones"):
        check_shipped(model, decoder, tmp_path, partial(_ship, "onnx:int4"))  # floats are on no grid
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Unsupported, match="there is no grid"):
        shipped_grids(model, decoder, tmp_path, partial(_ship, "onnx:fp32"))
    with pytest.raises(Unsupported, match="int8, which a student can't be trained through"):
        shipped_grids(model, decoder, tmp_path, partial(_ship, "onnx:int8-dynamic"))


def test_half_precision_is_a_grid_too(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    _skip_without("onnx:fp16")
    result = _train(decoder, tmp_path, walks, "onnx:fp16", max_steps=2)
    saved = load_file(result.path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(saved, saved.half().float())


def test_what_it_can_not_do_is_one_line(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    with pytest.raises(UsageError, match="nothing here exports"):
        _train(decoder, tmp_path, walks, "onnx:int4", ship=None)
    recipe = 'name = "x"\n[teacher]\nsource = "t"\n[[data.text]]\nname = "w"\nsource = "w.txt"\ntrain = 9\n'
    recipe += "[distill]\nloss = { forward_kl = 1.0 }\n{}\n".replace("{}", "%s")
    quantized = '[distill.quantized]\nto = "onnx:int4"\n'
    for more, message in (
        (quantized + "[distill.lora]\nrank = 4", "leave one out"),
        (quantized + '[[export]]\nto = "gguf:q4_0"', r"no \[\[export\]\] ships the student so"),
        (quantized + '[[export]]\nto = "onnx:int4"\nof = "teacher"', r"no \[\[export\]\] ships the student so"),
        (quantized.replace("int4", "int5"), "unknown quantisation"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(recipe % more, Path("r.toml"))
    assert parse_recipe(recipe % quantized, Path("r.toml")).distill is not None  # only trained, shipped by hand
    assert parse_recipe(recipe % (quantized + '[[export]]\nto = "onnx:int4"'), Path("r.toml")).export


def test_rounds_before_the_last_stay_float(decoder: Path, tmp_path: Path, walks: DataSets) -> None:
    """What is pruned further does not ship: only the last round sees the grid."""
    _skip_without("onnx:int4")
    result = _train(decoder, tmp_path, walks, "onnx:int4", student={"layers": 1, "steps": 2}, max_steps=6)
    cards = [tmp_path / "work/round-1/student/distillation.json", result.path / "distillation.json"]
    assert ["grids" in json.loads(card.read_text()) for card in cards] == [False, True]
    assert open_model(result.path).layers == 1


def test_a_recipe_trains_ships_and_verifies(decoder: Path, tmp_path: Path) -> None:
    _skip_without("onnx:int4")
    (tmp_path / "walks.txt").write_text("\n".join(dict.fromkeys(_walks(0, 300))))
    (tmp_path / "r.toml").write_text(f"""
name = "quantized"
[teacher]
source = "{decoder}"
[[data.text]]
name = "walks"
source = "walks.txt"
train = 150
calibration = 8
dev = 16
test = 24
[distill]
loss = {{ forward_kl = 1.0 }}
batch_size = 8
max_steps = 8
threads = 1
[distill.quantized]
to = "onnx:int4"
[[export]]
to = "onnx:int4"
[bench]
tokens = 200
window = 16
""")
    result = run_recipe(RunConfig(tmp_path / "r.toml", tmp_path / "runs", until="verify"))
    assert result.exit_code == 0
    saved = load_file(tmp_path / "runs/quantized/student/model.safetensors")
    from edgestill.artifact import open_artifact

    decoded = _decoded(open_artifact(tmp_path / "runs/quantized/artifacts/onnx-int4"))
    assert all(torch.equal(saved[name], weight) for name, weight in decoded.items())
