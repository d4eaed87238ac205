"""Models that label tokens, as teachers and students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model, prepare_model
from edgestill.data import DataSets, TaggedSet
from edgestill.distill import DistillResult, distill
from edgestill.errors import RecipeError
from edgestill.recipe import DistillConfig, StudentConfig
from edgestill.recipe_cache import CacheConfig


def _config(loss: dict[str, float], **changes: Any) -> DistillConfig:
    plain = {"batch_size": 8, "epochs": 2.0, "learning_rate": 2e-3, "save_every": 10, "threads": 1}
    return DistillConfig(loss=loss, **{**plain, **changes})  # type: ignore[arg-type]


def _run(teacher: Path, place: Path, data: DataSets, config: DistillConfig, **changes: Any) -> DistillResult:
    arguments = {"student": StudentConfig(layers=2), "data": data, "max_length": 32, "work": place / "work", **changes}
    return distill(teacher, place / "out", config=config, **arguments)


def _cut(teacher: Path, place: Path, data: DataSets) -> Path:
    return distill(teacher, place / "cut", student=StudentConfig(layers=2), config=None, data=data, max_length=32,
                   work=place / "w").path  # fmt: skip


def _row_by_row(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """Logits [T, C] of each text alone, with no padding anywhere."""
    model, tokenizer = load_torch(folder), load_tokenizer(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].double() for text in texts]


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("forward_kl", lambda p, q: p.exp() * (p - q)),
        ("reverse_kl", lambda p, q: q.exp() * (q - p)),
        ("total_variation", lambda p, q: (p.exp() - q.exp()).abs() / 2),
    ],
)
def test_the_first_loss_is_the_mean_over_all_real_tokens(
    loss: str, by_hand: Any, tagger: Path, tmp_path: Path, data: DataSets
):
    """Against a loop over texts that are never padded: padding neither adds to it nor counts."""
    texts = data.split("train")
    result = _run(tagger, tmp_path, data, _config({loss: 1.0}, batch_size=75, gradient_accumulation=2, max_steps=1))
    total, tokens = 0.0, 0
    cut = _cut(tagger, tmp_path, data)
    for ours, theirs in zip(_row_by_row(cut, texts), _row_by_row(tagger, texts), strict=True):
        total += float(by_hand(theirs.log_softmax(-1), ours.log_softmax(-1)).sum())
        tokens += len(ours)
    assert result.curves[1][loss] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        {"forward_kl": 1.0},
        {"jsd": 1.0, "logit_mse": 0.1},
        {"forward_kl": 1.0, "hidden_states": 0.1, "attention_maps": 0.1, "attention_relations": 0.1},
    ],
)
def test_a_tagger_learns(loss: dict[str, float], tagger: Path, tmp_path: Path, data: DataSets):
    result = _run(tagger, tmp_path, data, _config(loss, epochs=3.0))
    assert result.dev_after["kl"] < 0.7 * result.dev_before["kl"]
    assert result.dev_after["top1_agreement"] > result.dev_before["top1_agreement"]
    student = open_model(result.path)
    assert (student.task, student.labels, student.layers) == ("token-classification", ("O", "B-PER", "I-PER"), 2)
    ours, theirs = (_row_by_row(folder, data.split("dev")) for folder in (result.path, tagger))
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    assert result.dev_after["top1_agreement"] == pytest.approx(float(same.double().mean()), abs=1e-9)


@pytest.fixture
def tagged(data: DataSets) -> DataSets:
    """Every sentence's words with a rule that can be learnt: a film is a person, a movie too, what follows goes on."""
    rows = []
    for text in data.split("train"):
        words = tuple(text.split())
        tags = [2 if word in ("film", "movie") else 0 for word in words]  # O 2 in sorted order: B-PER, I-PER, O
        labels = tuple({0: 2, 2: 0}[tag] for tag in tags)
        rows.append((words, labels))
    tags_of = TaggedSet("people", ("B-PER", "I-PER", "O"), tuple(rows[:100]), tuple(rows[100:]), "1" * 64)
    return DataSets(data.text, (), (tags_of,))


def test_cross_entropy_counts_labelled_words_only(tagger: Path, tmp_path: Path, tagged: DataSets):
    """Against a loop over sentences that are never padded: one label a word, on its first token."""
    result = _run(tagger, tmp_path, tagged, _config({"forward_kl": 0.5, "cross_entropy": 0.5}, batch_size=250,
                                                    max_steps=1))  # fmt: skip
    cut = _cut(tagger, tmp_path, tagged)
    model, tokenizer = load_torch(cut), load_tokenizer(cut)
    total, words = 0.0, 0
    for text, labels in tagged.tagged[0].train:
        encoded = tokenizer(list(text), is_split_into_words=True, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            logits = model(**encoded).logits[0].double().log_softmax(-1)
        seen = set()
        for place, word in enumerate(encoded.word_ids()):
            if word is not None and word not in seen:
                seen.add(word)
                total -= float(logits[place, {0: 1, 1: 2, 2: 0}[labels[word]]])  # the model's order: O, B-PER, I-PER
                words += 1
    assert result.curves[1]["cross_entropy"] == pytest.approx(total / words, rel=1e-4)


def test_labels_are_learnt(tagger: Path, tmp_path: Path, tagged: DataSets):
    from edgestill.bench.tasks import make_task_reference, task_estimates
    from edgestill.runtimes.scoring import score
    from edgestill.runtimes.session import SessionOptions
    from edgestill.runtimes.torch_session import TorchSession

    result = _run(tagger, tmp_path, tagged, _config({"cross_entropy": 1.0}, epochs=6.0, learning_rate=1e-2))
    reference = make_task_reference(tagger, tmp_path / "said", tagged.tagged[0], max_length=32, threads=1)
    found = {}
    for name, folder in (("teacher", tagger), ("student", result.path)):
        session = TorchSession(folder, SessionOptions(1))
        estimates = task_estimates(score(session, reference)["logits"], reference)
        found[name] = {estimate.metric: estimate.summary.value for estimate in estimates}
    labelled = load_tokenizer(tagger)([" ".join(words) for words, _ in tagged.tagged[0].train])["input_ids"]
    assert result.tokens_seen == pytest.approx(6 * sum(map(len, labelled)), rel=0.1)  # no text without a label
    assert found["student"]["f1"] > 0.9 > found["teacher"]["f1"]
    assert found["student"]["accuracy"] > 0.95 > found["teacher"]["accuracy"]


def test_a_folder_of_transformers_becomes_a_teacher(tiny_tagger: Path, tmp_path: Path):
    (source := tmp_path / "source").mkdir()
    for file in tiny_tagger.iterdir():
        if file.name != "edgestill.json":
            (source / file.name).write_bytes(file.read_bytes())
    found = prepare_model(source, tmp_path / "out")
    assert (found.task, found.labels, found.pooling) == ("token-classification", ("O", "B-PER", "I-PER"), None)
    ours, theirs = (_row_by_row(folder, ["the cat sat"])[0] for folder in (found.path, tiny_tagger))
    assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_one_clear_line(tagger: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="'embedding_cosine' does not fit the task token-classification"):
        _run(tagger, tmp_path, data, _config({"embedding_cosine": 1.0}))
    with pytest.raises(RecipeError, match="'cross_entropy' needs words labelled O, B-PER, I-PER"):
        _run(tagger, tmp_path, data, _config({"forward_kl": 0.5, "cross_entropy": 0.5}))
    with pytest.raises(RecipeError, match="next token, and the task is token-classification") as error:
        _run(tagger, tmp_path, data, _config({"forward_kl": 1.0}, cache=CacheConfig()))
    assert "asked live" in str(error.value.hint)
