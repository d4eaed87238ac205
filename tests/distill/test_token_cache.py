from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.checkpoints import open_model
from edgestill.distill import token_cache
from edgestill.distill.batches import Examples, collate
from edgestill.distill.losses import predicting
from edgestill.distill.objective import Objective, count_items
from edgestill.distill.student import StudentPlan, make_student
from edgestill.distill.teacher import Teacher
from edgestill.distill.token_cache import TokenCache
from edgestill.distill.token_records import TokenFormat, capture, decode
from edgestill.errors import BadInput

KEY = {"teacher": "t", "tokenizer": "v", "corpus": "c"}
LENGTHS = np.array([5, 2, 9, 3, 3, 12, 4])
VOCABULARY = 90


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 8)


def _said(example: int, places: int) -> torch.Tensor:
    chooser = torch.Generator().manual_seed(example)
    return 2 * torch.randn(places, VOCABULARY, generator=chooser)


class Asked:
    """A teacher whose logits are a function of the example's number; it remembers what it was asked."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, rows: list[int]) -> Any:
        self.rows += rows
        logits = torch.cat([_said(row, int(LENGTHS[row]) - 1) for row in rows])
        return [(logits[begin : begin + 3], ()) for begin in range(0, len(logits), 3)]


def _cache(place: Path, form: TokenFormat, **key: str) -> TokenCache:
    return TokenCache(place, {**KEY, **key}, form, LENGTHS)


def _filled(place: Path, form: TokenFormat, **key: str) -> tuple[TokenCache, list[int]]:
    asked = Asked()
    cache = _cache(place, form, **key)
    cache.fill(asked)
    return cache, asked.rows


def test_tokens_come_back_by_example_at_each_temperature(tmp_path: Path):
    form = TokenFormat(VOCABULARY, 8, (2.0, 1.0, 0.5))
    cache, asked = _filled(tmp_path, form)
    assert asked == [1, 3, 4, 6, 0, 2, 5]  # by length, each once
    wanted = np.array([5, 1, 0, 5])
    logits = torch.cat([_said(row, int(LENGTHS[row]) - 1) for row in wanted.tolist()])
    for temperature in form.temperatures:
        direct = decode(capture(logits, form), form, temperature)
        found = cache.sparse(wanted, temperature)
        for name in ("ids", "log_probs", "tail"):
            assert torch.equal(getattr(found, name), getattr(direct, name))
    chosen = torch.rand(len(logits)) < 0.4
    some = cache.sparse(wanted, 2.0, chosen.numpy())
    assert torch.equal(some.ids, cache.sparse(wanted, 2.0).ids[chosen])


def test_a_lost_shard_is_answered_again_with_the_same_draws(tmp_path: Path):
    form = TokenFormat(VOCABULARY, 8, (1.0, 2.0), tail_samples=5)
    cache, _ = _filled(tmp_path, form)
    shards = sorted(cache.store.folder.glob("shard-*"))
    before = [path.read_bytes() for path in shards]
    assert len(shards) > 2
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-40])
    again, asked = _filled(tmp_path, form)
    assert again.store.folder == cache.store.folder
    assert 0 < len(asked) < len(LENGTHS)
    assert [path.read_bytes() for path in shards] == before


def test_a_cache_with_more_temperatures_serves_too(tmp_path: Path):
    many = TokenFormat(VOCABULARY, 8, (1.0, 2.0, 4.0), tail_samples=5)
    two = TokenFormat(VOCABULARY, 8, (2.0,), tail_samples=5)
    _filled(tmp_path / "shared", many)
    shared, asked = _filled(tmp_path / "shared", two)
    assert asked == []
    own, asked = _filled(tmp_path / "own", two)
    assert len(asked) == len(LENGTHS)
    every = np.arange(7)
    for name, value in vars(own.sparse(every, 2.0)).items():
        ours = getattr(shared.sparse(every, 2.0), name)
        assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value, name
    other, asked = _filled(tmp_path / "shared", TokenFormat(VOCABULARY, 8, (3.0,), tail_samples=5))
    assert len(asked) == len(LENGTHS)
    assert other.store.folder != shared.store.folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": "other"}, "another teacher"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"corpus": "other"}, "another corpus"),
        ({"top_k": 9}, "another top_k"),
        ({"temperatures": (1.0, 3.0)}, "other temperatures"),
        ({"tail_samples": 2}, "other tail samples"),
        ({"vocab_size": 80}, "another vocabulary"),
    ],
)
def test_a_named_cache_must_be_the_right_one(tmp_path: Path, change: dict[str, Any], said: str):
    settings = {"vocab_size": VOCABULARY, "top_k": 8, "temperatures": (1.0, 2.0)}
    named = _filled(tmp_path, TokenFormat(**settings))[0].store.folder
    assert _filled(named, TokenFormat(**{**settings, "temperatures": (2.0,)}))[1] == []
    key = {name: value for name, value in change.items() if name in KEY}
    form = TokenFormat(**{**settings, **{name: value for name, value in change.items() if name not in KEY}})
    with pytest.raises(BadInput, match="does not fit: it is of") as caught:
        _cache(named, form, **key)
    assert caught.value.message.endswith(f"it is of {said}")
    assert "path" in caught.value.hint
    # In the folder above it, it is simply another one.
    assert _cache(tmp_path, form, **key).store.folder.parent == tmp_path
    assert _cache(tmp_path, form, **key).store.folder != named


def test_a_named_cache_of_an_older_format_or_without_sense_is_refused(tmp_path: Path):
    form = TokenFormat(VOCABULARY, 8)
    named = _filled(tmp_path, form)[0].store.folder
    header = named / "cache.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 0}))
    with pytest.raises(BadInput, match="another version of edgestill"):
        _cache(named, form)
    for text in ("[1]", "{", '{"temperatures": 3}'):
        header.write_text(text)
        with pytest.raises(BadInput):
            _cache(named, form)


def test_a_cache_from_before_ids_were_coded_is_still_read(tmp_path: Path):
    lengths = np.array([4, 3])

    def fill(place: Path, form: TokenFormat) -> tuple[TokenCache, list[int]]:
        asked: list[int] = []

        def answer(rows: list[int]) -> Any:
            asked.extend(rows)
            chooser = torch.Generator().manual_seed(0)
            yield torch.randn(int((lengths[rows] - 1).sum()), 66_000, generator=chooser), ()

        cache = TokenCache(place, KEY, form, lengths)
        cache.fill(answer)
        return cache, asked

    old, asked = fill(tmp_path / "shared", TokenFormat(66_000, 8, plain_ids=True))
    assert asked
    for place in (tmp_path / "shared", old.store.folder):
        found, asked = fill(place, TokenFormat(66_000, 8))
        assert (asked, found.store.folder) == ([], old.store.folder)
    new, asked = fill(tmp_path / "own", TokenFormat(66_000, 8))
    assert asked
    assert new.store.plan().row_bytes < found.store.plan().row_bytes
    ours, theirs = (cache.sparse(np.arange(2), 1.0) for cache in (new, found))
    order = theirs.ids.argsort(-1)
    assert torch.equal(ours.ids, theirs.ids.gather(-1, order))
    torch.testing.assert_close(ours.log_probs, theirs.log_probs.gather(-1, order), rtol=0, atol=2e-6)


def test_the_plan_is_the_size_on_disk(tmp_path: Path):
    form = TokenFormat(49152, 64)
    plan = TokenCache(tmp_path, KEY, form, LENGTHS).plan()
    assert (plan.rows, plan.row_bytes, plan.size_bytes) == (31, 272, 31 * 272)
    small = TokenFormat(VOCABULARY, 8)
    cache, _ = _filled(tmp_path, small)
    on_disk = sum(path.stat().st_size - 32 for path in cache.store.folder.glob("shard-*"))
    assert cache.plan().size_bytes == cache.plan().there_bytes == on_disk
    assert "31 tokens of" in cache.plan().line


def test_a_teacher_that_answers_too_little_is_found_out(tmp_path: Path):
    with pytest.raises(ValueError, match="answers for"):
        _cache(tmp_path, TokenFormat(VOCABULARY, 8)).fill(lambda rows: [(_said(0, 1), ())])


# ---- with a model -----------------------------------------------------------------------------------------------


def _examples(vocabulary: int, prompts: bool = False) -> Examples:
    chooser = torch.Generator().manual_seed(5)
    lengths = [3, 9, 5, 2, 7, 4, 11, 6]
    ids = tuple(tuple(torch.randint(5, vocabulary, (n,), generator=chooser).tolist()) for n in lengths)
    return Examples(ids, (-100,) * 8, tuple(n // 3 for n in lengths) if prompts else ())


def _remembering(folder: Path, place: Path, form: TokenFormat, temperature: float, examples: Examples) -> Teacher:
    teacher = Teacher(open_model(folder), form.layers, pad_id=0)
    teacher.remember_tokens(examples, place, form, temperature)
    return teacher


def _form(folder: Path, k: int, **changes: Any) -> TokenFormat:
    described = open_model(folder)
    return TokenFormat(described.vocab_size, k, **{"width": described.hidden_size, **changes})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_cache_says_is_what_the_teacher_says(tiny_llama: Path, tmp_path: Path, temperature: float):
    examples = _examples(320)
    form = _form(tiny_llama, 8, temperatures=(1.0, 2.0))
    teacher = _remembering(tiny_llama, tmp_path, form, temperature, examples)
    batch = collate([examples[row] for row in (6, 1, 3)], 0)
    found = teacher.say(batch).sparse
    assert found is not None
    model: Any = teacher.model
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = torch.log_softmax(logits[predicting(batch["attention_mask"])].double() / temperature, -1)
    best = log_probs.topk(8)
    assert torch.equal(found.ids, best.indices)
    torch.testing.assert_close(found.log_probs.double(), best.values, rtol=0, atol=2e-5)
    tail = torch.log1p(-best.values.exp().sum(-1))
    torch.testing.assert_close(found.tail.double(), tail, rtol=0, atol=1e-5)


def test_with_all_tokens_kept_the_step_is_that_of_the_live_teacher(tiny_llama: Path, tmp_path: Path):
    described = open_model(tiny_llama)
    examples = _examples(320, prompts=True)
    weights = {"forward_kl": 0.5, "jsd": 0.3, "reverse_kl": 0.2, "cross_entropy": 0.1, "hidden_states": 0.5}
    form = _form(tiny_llama, 1 << 20, temperatures=(2.0,), layers=(0, 3))
    cached = _remembering(tiny_llama, tmp_path, form, 2.0, examples)
    live = Teacher(described, (0, 3), pad_id=0)
    batch = collate(list(examples), 0)
    found = []
    for teacher in (cached, live):
        student = make_student(described, StudentPlan.of_layers(described, (0, 3)))
        objective = Objective(student, described.task, weights, temperature=2.0, vocab_size=described.vocab_size)
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        loss, parts = objective(batch, teacher.say(batch), count_items([batch]))
        loss.backward()
        found.append((loss.detach(), parts, [p.grad for p in objective.parameters() if p.grad is not None]))
    assert float(found[1][0]) > 0.01
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        assert float((ours - theirs).norm()) <= 2e-3 * float(theirs.norm()) + 1e-7


def test_block_outputs_come_back_in_place(tiny_llama: Path, tmp_path: Path):
    examples = _examples(320)
    cached = _remembering(tiny_llama, tmp_path, _form(tiny_llama, 4, layers=(2, 0)), 1.0, examples)
    live = Teacher(open_model(tiny_llama), (2, 0), pad_id=0)
    batch = collate([examples[row] for row in (3, 6, 0)], 0)
    ours, theirs = cached.say(batch).blocks, live.say(batch).blocks
    assert ours is not None
    assert theirs is not None
    real = batch["attention_mask"].bool()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape
        torch.testing.assert_close(mine[real], reference[real], rtol=1e-3, atol=1e-3)
        assert bool((mine[~real] == 0).all())


def test_a_whole_cache_needs_no_teacher(tiny_llama: Path, tmp_path: Path):
    examples, form = _examples(320), _form(tiny_llama, 8)
    first = _remembering(tiny_llama, tmp_path, form, 1.0, examples)
    first.release()
    second = _remembering(tiny_llama, tmp_path, form, 1.0, examples)
    batch = collate(list(examples), 0)
    for teacher in (first, second):
        assert teacher.say(batch).sparse is not None
        assert teacher._model is None


def test_a_batch_of_other_tokens_is_not_mixed_up(tiny_llama: Path, tmp_path: Path):
    examples = _examples(320)
    teacher = _remembering(tiny_llama, tmp_path, _form(tiny_llama, 8), 1.0, examples)
    with pytest.raises(ValueError, match="other tokens"):
        teacher.say(collate([{"index": 1, "ids": (5, 6, 7), "label": -100}], 0))
