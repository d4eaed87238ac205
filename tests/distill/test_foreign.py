"""A student with another tokenizer than its teacher: alignment of windows, what is refused, learning, resuming."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.checkpoints import load_tokenizer, open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.distill.align import encode_spans, universal_logit
from edgestill.distill.batches import collate
from edgestill.distill.foreign import PairedExamples, encode_pairs, is_foreign
from edgestill.distill.losses import LOSSES
from edgestill.distill.objective import Objective, count_items
from edgestill.distill.signal import Dense
from edgestill.distill.teacher import Said
from edgestill.errors import EdgestillError, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig


def _tokenizer(folder: Path, size: int, lower: bool = False) -> int:
    """A byte-level BPE of ``size`` tokens, learnt from other words than the teacher's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["a good film and a bad story, the scene was never bright"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(folder)
    return len(fast)


def _student(folder: Path, *, lower: bool = False, pad_rows: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    size = _tokenizer(folder, 280, lower)
    config = LlamaConfig(
        vocab_size=size + pad_rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=96, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    facts = {"schema_version": 1, "license": "Apache-2.0", "task": "text-generation", "max_length": 96}
    (folder / "edgestill.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _student(tmp_path_factory.mktemp("foreign") / "student", pad_rows=8)


@pytest.fixture(scope="module")
def rounds() -> DataSets:
    """Texts that go round in a circle of words: what comes next can be known."""
    words = "the dull plot of a good film was never bright and no story had one red scene".split()
    texts = [" ".join((words * 3)[start : start + count]) for start in range(len(words)) for count in range(6, 17)]
    return DataSets((TextSet("words", tuple(texts[::2]), (), tuple(texts[1::6]), (), "0" * 64),), ())


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path, rounds: DataSets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_llama after it has learnt them: a teacher that knows something."""
    root = tmp_path_factory.mktemp("teacher")
    config = DistillConfig(loss={"cross_entropy": 1.0}, max_steps=80, batch_size=16, learning_rate=3e-3, threads=1)
    distill(
        tiny_llama, root / "out", student=StudentConfig(), config=config, data=rounds, max_length=64, work=root / "w"
    )
    return root / "out"


def _learn(teacher: Path, student: Path, place: Path, data: DataSets, **settings: Any) -> Any:
    config = {"loss": {"universal_logit": 1.0, "cross_entropy": 0.3}, "max_steps": 60, "batch_size": 8,
              "learning_rate": 5e-3, "threads": 1, "evaluate_every": 20, **settings}  # fmt: skip
    return distill(
        teacher, place / "out", student=StudentConfig(), config=DistillConfig(**config), data=data, max_length=48,
        work=place / "work", start=student,
    )  # fmt: skip


def test_windows_are_the_same_text(student: Path, tiny_llama: Path) -> None:
    ours, theirs = load_tokenizer(student), load_tokenizer(tiny_llama)
    texts = ["a good film, never bright 🎬 and naïve", "the scene " * 40, "x"]
    examples = encode_pairs(texts, ours, theirs, 24)
    assert max(map(len, examples.ids)) <= 24
    assert max(map(len, examples.their_ids)) <= 24
    assert len(examples) > 4
    for mine, other, places in zip(examples.ids, examples.their_ids, examples.aligned, strict=True):
        assert ours.decode(mine) == theirs.decode(other)
        for index, place in enumerate(places):
            if place >= 0:
                assert ours.decode(mine[: index + 1]) == theirs.decode(other[: place + 1])
                assert index + 1 < len(mine)
                assert place + 1 < len(other)
    assert "".join(ours.decode(ids) for ids in examples.ids) == texts[0] + texts[1]  # "x" has nothing to predict
    assert 0.2 < examples.share < 1
    assert is_foreign(open_model(tiny_llama), open_model(student))


def test_loss_is_that_of_the_aligned_places(student: Path, tiny_llama: Path) -> None:
    """The whole objective against a loop over places, padded rows of both vocabularies left out."""
    from transformers import LlamaForCausalLM

    ours, theirs = load_tokenizer(student), load_tokenizer(tiny_llama)
    examples = encode_pairs(["a good film, never bright", "the dull plot of a story"], ours, theirs, 32)
    model, other = LlamaForCausalLM.from_pretrained(student), LlamaForCausalLM.from_pretrained(tiny_llama)
    batch = collate([examples[i] for i in range(len(examples))], 0)
    counts = count_items([batch])
    assert counts["aligned"] == sum(place >= 0 for row in examples.aligned for place in row)
    objective = Objective(model, "text-generation", {"universal_logit": 1.0}, temperature=2.0,
                          vocab_size=len(ours), foreign=True)  # fmt: skip
    with torch.no_grad():
        final = other.model(input_ids=batch["their_ids"], attention_mask=batch["their_mask"]).last_hidden_state
        total, _ = objective(batch, Said(final=final, head=other.lm_head), counts)
        want = 0.0
        for ids, their_ids, places in zip(examples.ids, examples.their_ids, examples.aligned, strict=True):
            mine = model(torch.tensor([ids])).logits[0, :, : len(ours)]
            their = other(torch.tensor([their_ids])).logits[0]
            for index, place in enumerate(places):
                if place >= 0:
                    p, q = (
                        np.sort(torch.softmax(z.double() / 2, -1).numpy())[::-1] for z in (mine[index], their[place])
                    )
                    q = np.pad(q, (0, max(0, len(p) - len(q))))
                    p = np.pad(p, (0, len(q) - len(p)))
                    want += 2 * np.abs(p - q).sum()
    assert float(total) == pytest.approx(want / counts["aligned"], rel=1e-4)


def test_it_learns_across_vocabularies(teacher: Path, student: Path, tmp_path: Path, rounds: DataSets) -> None:
    result = _learn(teacher, student, tmp_path, rounds, max_steps=80)
    print(result.dev_before, result.dev_after)
    before, after = result.dev_before, result.dev_after
    assert after["universal_logit"] < 0.7 * before["universal_logit"]
    assert after["aligned_agreement"] > before["aligned_agreement"] + 0.15
    assert after["cross_entropy"] < before["cross_entropy"]
    assert 0.2 < after["aligned_share"] < 1
    losses = [row["universal_logit"] for row in result.curves if "universal_logit" in row]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    made = open_model(result.path)
    assert load_tokenizer(made.path).get_vocab() == load_tokenizer(student).get_vocab()
    assert made.vocab_size == open_model(student).vocab_size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_ends_with_the_same_bytes(tiny_llama: Path, student: Path, tmp_path: Path, data: DataSets) -> None:
    settings = {"max_steps": 8, "save_every": 3, "evaluate_every": None}
    whole = hash_tree(_learn(tiny_llama, student, tmp_path / "whole", data, **settings).path)
    from edgestill.distill import trainer

    child = os.fork()
    if not child:
        real = trainer.DistillTrainer.log

        def log(self: Any, logs: Any, start_time: Any = None) -> None:
            real(self, logs, start_time)
            if self.state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.DistillTrainer.log = log
        try:
            _learn(tiny_llama, student, tmp_path / "killed", data, **settings)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "killed" / "work" / "checkpoint-3").is_dir()
    assert hash_tree(_learn(tiny_llama, student, tmp_path / "killed", data, **settings).path) == whole


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": {"forward_kl": 1.0}}, "another vocabulary.*'forward_kl' compares token by token"),
        ({"cache": {"top_k": 8}, "loss": {"cross_entropy": 1.0}}, "cache"),
        ({"patience": 2, "evaluate_every": 2}, "patience needs a common one"),
    ],
)
def test_what_needs_one_vocabulary(
    settings: dict[str, Any], words: str, tiny_llama: Path, student: Path, tmp_path: Path, data: DataSets
) -> None:
    with pytest.raises(EdgestillError, match=words) as caught:
        _learn(tiny_llama, student, tmp_path, data, **settings)
    assert isinstance(caught.value, Unsupported | RecipeError)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_loses_text(tiny_llama: Path, tmp_path: Path, data: DataSets) -> None:
    from dataclasses import replace

    lowering = _student(tmp_path / "lowering", lower=True)
    shouting = replace(data.text[0], train=tuple(text.upper() for text in data.text[0].train))
    with pytest.raises(RecipeError, match=r"the student's tokenizer loses text in 150 of 150 .* comes back as"):
        _learn(tiny_llama, lowering, tmp_path, DataSets((shouting,), ()))


def test_nothing_in_common() -> None:
    class Whole:
        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [1], "offset_mapping": [(0, len(text))]}

    with pytest.raises(RecipeError, match="never end at the same place"):
        encode_pairs(["a film"], Whole(), Whole(), 8)
    assert encode_spans(Whole(), "a film").ids.tolist() == [1]
    assert LOSSES["universal_logit"].function is universal_logit
    assert Dense(torch.zeros(1, 2)).vocab_size is None
    assert PairedExamples((), ()).share == 0
    assert sys.version_info >= (3, 11)


def test_a_run_that_would_judge_it_is_refused_before_training(tiny_llama: Path, student: Path, tmp_path: Path) -> None:
    from edgestill.pipeline import RunConfig, run_recipe

    (tmp_path / "text.txt").write_text("\n".join(f"a good film number {number}" for number in range(40)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'schema_version = 1\nname = "foreign"\n[teacher]\nsource = "{tiny_llama}"\n[student]\nsource = "{student}"\n'
        '[distill]\nloss = { universal_logit = 1.0 }\n[[export]]\nto = "onnx:fp32"\n'
        f'[[data.text]]\nname = "films"\nsource = "{tmp_path / "text.txt"}"\ntrain = 20\ndev = 5\n'
    )
    with pytest.raises(Unsupported, match="artifacts of it can't be judged") as caught:
        run_recipe(RunConfig(recipe, tmp_path / "runs"))
    assert "edgestill export" in caught.value.hint
    assert not (tmp_path / "runs/foreign/student").exists()
