from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model, prepare_model
from edgestill.data import DataSets
from edgestill.distill import DistillResult, distill
from edgestill.distill.fresh import fresh_student
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig

SHAPE = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "vocab_size": 7, "torch_dtype": "bfloat16", "initializer_range": 0.2,
}  # fmt: skip


def _shape(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    return folder


def _learn(
    teacher: Path, start: Path, place: Path, data: DataSets, loss: dict[str, float], **more: Any
) -> DistillResult:
    config = DistillConfig.model_validate(
        {"loss": loss, "batch_size": 8, "max_steps": 30, "learning_rate": 3e-3, "threads": 1, **more}
    )
    return distill(teacher, place / "out", student=StudentConfig(), config=config, data=data, max_length=32,
                   work=place / "work", start=start)  # fmt: skip


def test_a_fresh_shape_has_the_teachers_vocabulary_and_its_seed_decides_it(tiny_llama: Path, tmp_path: Path):
    teacher = open_model(tiny_llama)
    first = fresh_student(_shape(tmp_path / "shape"), teacher, tmp_path / "a", seed=1)
    again = fresh_student(tmp_path / "shape" / "config.json", teacher, tmp_path / "b", seed=1)
    other = fresh_student(tmp_path / "shape", teacher, tmp_path / "c", seed=2)
    assert hash_tree(first.path) == hash_tree(again.path) != hash_tree(other.path)
    assert (first.architecture, first.layers, first.vocab_size) == ("qwen3", 2, teacher.vocab_size)
    assert first.max_length == 64
    assert (first.named.name, first.origin.base_models) == ("llama 169K student", (teacher.named,))
    assert load_tokenizer(first.path).get_vocab() == load_tokenizer(tiny_llama).get_vocab()
    assert float(load_torch(first.path).get_input_embeddings().weight.detach().std()) == pytest.approx(0.2, rel=0.05)


def test_drawing_leaves_the_random_state_alone(tiny_llama: Path, tmp_path: Path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    fresh_student(_shape(tmp_path / "shape"), open_model(tiny_llama), tmp_path / "a", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_fresh_decoder_learns(tiny_llama: Path, tmp_path: Path, data: DataSets):
    start = fresh_student(_shape(tmp_path / "shape"), open_model(tiny_llama), tmp_path / "start", seed=0)
    result = _learn(tiny_llama, start.path, tmp_path, data, {"forward_kl": 1.0})
    assert result.dev_after["kl"] < 0.9 * result.dev_before["kl"]
    student = open_model(result.path)
    assert (student.architecture, student.hidden_size) == ("qwen3", 32)
    card = json.loads((result.path / "distillation.json").read_text())
    assert card["start_id"] == start.model_id
    assert card["plan"]["parameters"] == student.parameters


def test_a_fresh_encoder_of_another_family_learns(encoder: Path, tmp_path: Path, data: DataSets):
    shape = {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
             "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    start = fresh_student(tmp_path / "config.json", open_model(encoder), tmp_path / "start")
    assert (start.pooling, start.normalize, start.task) == ("mean", True, "feature-extraction")
    result = _learn(encoder, start.path, tmp_path, data, {"embedding_gram": 1.0}, layer_map="last", epochs=3.0)
    assert result.dev_after["spearman"] > result.dev_before["spearman"]


def test_another_trained_model_is_a_start_and_can_be_cut(tiny_llama: Path, tmp_path: Path, data: DataSets):
    made = fresh_student(_shape(tmp_path / "shape"), open_model(tiny_llama), tmp_path / "start", seed=0)
    prepared = prepare_model(made.path, tmp_path / "prepared", task="text-generation")
    config = DistillConfig.model_validate({"loss": {"forward_kl": 1.0}, "batch_size": 8, "max_steps": 2, "threads": 1})
    result = distill(tiny_llama, tmp_path / "out", student=StudentConfig(layers=1, ffn=20), config=config, data=data,
                     max_length=32, work=tmp_path / "work", start=prepared.path)  # fmt: skip
    student = open_model(result.path)
    assert (student.layers, student.config["intermediate_size"]) == (1, 20)


def test_a_start_that_can_not_learn_from_the_teacher_is_one_clear_line(
    encoder: Path, classifier: Path, tiny_llama: Path, tmp_path: Path, data: DataSets
):
    with pytest.raises(RecipeError, match="feature-extraction"):
        _learn(tiny_llama, encoder, tmp_path, data, {"forward_kl": 1.0})
    shape = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    narrow = fresh_student(tmp_path / "config.json", open_model(encoder), tmp_path / "narrow")
    with pytest.raises(RecipeError, match="of 16 and 32 numbers"):
        _learn(encoder, narrow.path, tmp_path, data, {"embedding_cosine": 1.0})
    with pytest.raises(RecipeError, match="layer_map = 'kept'"):
        _learn(encoder, narrow.path, tmp_path, data, {"embedding_gram": 1.0, "hidden_states": 1.0})


def test_another_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path, data: DataSets):
    made = fresh_student(_shape(tmp_path / "shape"), open_model(tiny_llama), tmp_path / "start", seed=0)
    path = made.path / "tokenizer.json"
    spec = json.loads(path.read_text())
    one, two = sorted(spec["model"]["vocab"])[40:42]
    spec["model"]["vocab"][one], spec["model"]["vocab"][two] = spec["model"]["vocab"][two], spec["model"]["vocab"][one]
    path.write_text(json.dumps(spec))
    with pytest.raises(Unsupported, match="another vocabulary"):
        _learn(tiny_llama, made.path, tmp_path, data, {"forward_kl": 1.0})


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("[1]", BadInput, "not an object"),
        (json.dumps({**SHAPE, "model_type": "gpt-x"}), Unsupported, "unsupported architecture"),
        (json.dumps({**SHAPE, "model_type": "bert"}), Unsupported, "text-generation"),
        (json.dumps({**SHAPE, "num_attention_heads": 0}), BadInput, "makes no model|config"),
    ],
)
def test_a_bad_shape_is_one_clear_line(tiny_llama: Path, tmp_path: Path, text: str, error: type[Exception], words: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(error, match=words) as caught:
        fresh_student(path, open_model(tiny_llama), tmp_path / "out")
    assert getattr(caught.value, "hint", "")
    assert not (tmp_path / "out").exists()


def test_a_missing_shape_is_one_clear_line(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="does not exist"):
        fresh_student(tmp_path / "nothing", open_model(tiny_llama), tmp_path / "out")
