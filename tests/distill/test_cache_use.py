from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgestill.checkpoints import open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.distill.batches import Examples, collate
from edgestill.distill.cache_use import check_cache, plan_cache
from edgestill.distill.ensemble import MixedTeacher
from edgestill.distill.losses import predicting, select_losses
from edgestill.distill.teacher import Teacher
from edgestill.distill.token_records import TokenFormat
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_file, hash_tree
from edgestill.recipe import CacheConfig, DistillConfig, StudentConfig
from edgestill.recipe_teaching import OnPolicyConfig


def _use(*names: str, task: str = "text-generation", **changes: object):
    losses = select_losses(dict.fromkeys(names, 1.0), task)
    return plan_cache(CacheConfig(**changes), losses, task, temperature=2.0, vocab_size=1000)


def test_each_loss_says_how_it_takes_the_cache():
    use = _use("forward_kl", "jsd", "alpha_beta:0.5:0.5", "cross_entropy", "hidden_states", temperatures=(1.0,))
    assert use.losses["forward_kl"] == "lower bound: the 64 likeliest tokens and all others as one"
    assert use.losses["jsd:0.5"].startswith("lower bound")
    assert use.losses["alpha_beta:0.5:0.5"].startswith("lower bound")
    assert use.losses["cross_entropy"].startswith("exact")
    assert use.losses["hidden_states"].startswith("exact up to fp16")
    assert use.form.temperatures == (1.0, 2.0)
    assert _use("forward_kl", top_k=1000).losses["forward_kl"].startswith("exact")
    sampled = _use("forward_kl", "reverse_kl", tail_samples=4).losses
    assert sampled["forward_kl"].startswith("unbiased")
    assert sampled["reverse_kl"].startswith("lower bound")


@pytest.mark.parametrize(
    ("name", "reason"), [("logit_mse", "logit of every token"), ("alpha_beta:0.2:0.7", "merging tokens")]
)
def test_what_needs_more_is_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(RecipeError, match=reason) as caught:
        _use("forward_kl", name)
    assert name in caught.value.message
    assert "live" in caught.value.hint


def test_encoders_have_no_token_cache():
    with pytest.raises(RecipeError, match="keeps answers about the next token, and the task is feature-extraction"):
        _use("embedding_cosine", task="feature-extraction")


def _run(teacher: Path, place: Path, data: DataSets, layers: int = 2, seed: int = 0, **cache: object) -> list[str]:
    told: list[str] = []
    config = DistillConfig(
        loss={"forward_kl": 0.9, "cross_entropy": 0.1}, temperature=2.0, batch_size=8, max_steps=4, threads=1,
        seed=seed, cache=CacheConfig(**cache),
    )  # fmt: skip
    distill(
        teacher, place / "out", student=StudentConfig(layers=layers), config=config, data=data, max_length=32,
        work=place / "work", progress=lambda text, fraction=None: told.append(text),
    )  # fmt: skip
    return told


def test_one_cache_serves_many_students(tiny_llama: Path, data: DataSets, tmp_path: Path):
    shared = str(tmp_path / "shared")
    first = _run(tiny_llama, tmp_path / "a", data, path=shared, temperatures=(1.0,))
    assert first[0].startswith("teacher from a cache: forward_kl lower bound: the 64 likeliest")
    assert "tokens of" in first[1]
    assert "teacher reads the texts" in first
    assert first.index("teacher reads the texts") > 1  # what it takes is told before
    second = _run(tiny_llama, tmp_path / "b", data, layers=3, seed=1, path=shared)
    assert "teacher reads the texts" not in second
    assert "100% of it there" in second[1]
    assert len(list((tmp_path / "shared").iterdir())) == 1
    card = json.loads((tmp_path / "b" / "out" / "distillation.json").read_text())
    assert card["teacher_signal"]["source"] == "cache"
    assert card["teacher_signal"]["top_k"] == 64
    assert card["teacher_signal"]["losses"]["forward_kl"].startswith("lower bound")
    assert shared not in json.dumps(card)


def test_where_the_cache_lies_does_not_change_the_student(tiny_llama: Path, data: DataSets, tmp_path: Path):
    _run(tiny_llama, tmp_path / "a", data, top_k=8)
    _run(tiny_llama, tmp_path / "b", data, top_k=8, path=str(tmp_path / "shared"), temperatures=(1.0, 3.0))
    _run(tiny_llama, tmp_path / "c", data, top_k=4)
    assert hash_tree(tmp_path / "a" / "out") == hash_tree(tmp_path / "b" / "out")
    weights = [hash_file(tmp_path / name / "out" / "model.safetensors") for name in "ac"]
    assert weights[0] != weights[1]


def test_a_named_cache_of_another_text_is_refused_and_nothing_lost(tiny_llama: Path, data: DataSets, tmp_path: Path):
    _run(tiny_llama, tmp_path / "a", data)
    named = next((tmp_path / "a" / "work").glob("tokens-*"))
    before = hash_tree(named)
    texts = data.text[0].train
    other = DataSets(text=(TextSet("words", texts[:50], (), (), (), "0" * 64),), tasks=())
    with pytest.raises(BadInput, match="of another corpus"):
        _run(tiny_llama, tmp_path / "b", other, path=str(named))
    assert hash_tree(named) == before
    assert not (tmp_path / "b" / "out").exists()


def test_on_policy_refuses_the_cache(tiny_llama: Path, data: DataSets, tmp_path: Path):
    config = DistillConfig(loss={"reverse_kl": 1.0}, max_steps=1, cache=CacheConfig(), on_policy=OnPolicyConfig())
    with pytest.raises(Unsupported, match="with a cached teacher"):
        distill(tiny_llama, tmp_path / "out", student=StudentConfig(layers=2), config=config, data=data,
                max_length=64, work=tmp_path / "work")  # fmt: skip
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"streaming": True, "max_steps": 2}, "together with streaming"),
        ({"teacher": [{"source": "x"}], "cache": {"temperatures": [1.0, 2.0]}}, "mean is taken at 1 only"),
    ],
)
def test_what_no_cache_can_know_is_refused_first(tiny_llama: Path, changes: dict[str, object], reason: str):
    config = DistillConfig.model_validate({"loss": {"forward_kl": 1.0}, "cache": {}, **changes})
    with pytest.raises(RecipeError, match=reason):
        check_cache(config, open_model(tiny_llama))


def test_several_teachers_are_kept_as_their_mean(tiny_llama: Path, tmp_path: Path):
    described = open_model(tiny_llama)
    examples = Examples(tuple(tuple(range(5 + n, 12 + 2 * n)) for n in range(6)), (-100,) * 6)
    form = TokenFormat(described.vocab_size, 12, (2.0,))
    other = Teacher(described, pad_id=0)  # the same architecture with other weights
    mixed = MixedTeacher([described, described], (0.7, 0.3), 2.0, described.vocab_size)
    model: Any = mixed.model
    with torch.no_grad():
        for weight in model.members[1].parameters():
            weight.mul_(1.3)
        batch = collate([examples[row] for row in (4, 1)], 0)
        logits = [m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in model.members]
    mean = sum(w * torch.softmax(z.double() / 2.0, -1) for w, z in zip((0.7, 0.3), logits, strict=True))
    best = mean[:, :-1][predicting(batch["attention_mask"])].log().topk(12)
    mixed.remember_tokens(examples, tmp_path, form, 2.0)
    found = mixed.say(batch).sparse
    assert found is not None
    torch.testing.assert_close(found.log_probs.double(), best.values, rtol=0, atol=3e-5)
    assert other.identity != mixed.identity
