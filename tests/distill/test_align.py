"""Two tokenisations of one text against double loops, and the loss between different vocabularies."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edgestill.bench.sample_text import SAMPLE_TEXT
from edgestill.distill.align import Encoded, align_positions, chunks, encode_spans, relate, universal_logit
from edgestill.distill.coverage import measure_coverage
from edgestill.distill.signal import Dense
from edgestill.errors import RecipeError

TEXTS = (
    *SAMPLE_TEXT[:6], "🚀 lift-off 😶\u200d🌫️!", "one\r\ntwo\r\n\r\nthree", "   leading and trailing  ",
    "señor naïve Köln", "中文文本，你好。", "a", "", "x🦙y🦙🦙z", "\t\tcode = {'a': [1, 2]}\n",
)  # fmt: skip


def _byte_level(size: int, **how: Any) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **how)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SAMPLE_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _wordpiece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([*SAMPLE_TEXT, "🚀🦙中文señor!\t"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


TOKENIZERS = {"small": _byte_level(300), "large": _byte_level(600), "words": _byte_level(280, use_regex=False),
              "wordpiece": _wordpiece()}  # fmt: skip


def _loop(first: Encoded, second: Encoded) -> list[tuple[list[int], list[int]]]:
    """The same chunks, by the definition: cut wherever on both sides everything before ends and everything after
    begins, looking at each character of the text."""
    sides = []
    for side in (first, second):
        spans, reached = [], 0
        for start, end in zip(side.starts.tolist(), side.ends.tolist(), strict=True):
            start = start if end > start else max(reached, end)
            reached = max(reached, end)
            spans.append((start, reached))
        sides.append(spans)
    length = max((end for spans in sides for _, end in spans), default=0)
    found, begin = [], [0, 0]
    for cut in range(length + 1):
        counts = []
        for spans in sides:
            before = [n for n, (_, end) in enumerate(spans) if end <= cut]
            after = [n for n in range(len(spans)) if n not in before]
            clean = any(spans[n][1] == cut for n in before) and all(spans[n][0] >= cut for n in after)
            counts.append(len(before) if clean else -1)
        if min(counts) >= 0 and all(count > start for count, start in zip(counts, begin, strict=True)):
            found.append(tuple(list(range(s, c)) for s, c in zip(begin, counts, strict=True)))
            begin = counts
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("one", TOKENIZERS)
@pytest.mark.parametrize("two", TOKENIZERS)
def test_chunks_are_those_of_a_loop_over_characters(one: str, two: str):
    lengths = set()
    for text in TEXTS:
        first, second = encode_spans(TOKENIZERS[one], text), encode_spans(TOKENIZERS[two], text)
        found = [(list(range(a.start, a.stop)), list(range(b.start, b.stop))) for a, b in chunks(first, second)]
        assert found == _loop(first, second), text
        lengths |= {(len(a), len(b)) for a, b in found}
    assert (1, 1) in lengths
    assert one == two or len(lengths) > 2  # the comparison saw chunks of several tokens


def test_random_spans_are_those_of_a_loop():
    chooser = random.Random(1)
    for _ in range(300):
        sides = []
        for _side in range(2):
            starts, ends, at = [], [], 0
            while at < 12:
                size = chooser.randint(1, 3)
                pieces = chooser.choice((1, 1, 1, 2, 3))  # several tokens share these characters
                starts += [at] * pieces
                ends += [min(at + size, 12)] * pieces
                at += size
                if chooser.random() < 0.2:  # a token that covers nothing
                    starts.append(min(at, 12))
                    ends.append(min(at, 12))
            sides.append(Encoded(np.arange(len(starts)), np.array(starts), np.array(ends)))
        found = [(list(range(a.start, a.stop)), list(range(b.start, b.stop))) for a, b in chunks(*sides)]
        assert found == _loop(*sides)
        assert found[-1][0][-1] == len(sides[0].ids) - 1  # the end of the text is common


@pytest.mark.parametrize("name", ["small", "large", "words"])
def test_equal_tokenizers_give_the_identity(name: str):
    """Every token is paired with itself, but for the first bytes of a character of several tokens, and the last."""
    for text in TEXTS:
        encoded = encode_spans(TOKENIZERS[name], text)
        pairs = align_positions(encoded, encoded)
        assert (pairs[:, 0] == pairs[:, 1]).all()
        shared = {
            at for at in range(len(encoded.ids) - 1) if encoded.starts[at + 1] < encoded.ends[at]
        }  # fmt: skip
        assert sorted({*pairs[:, 0].tolist(), *shared}) == list(range(len(encoded.ids) - 1))


def test_aligned_places_have_read_the_same_text():
    small, large = TOKENIZERS["small"], TOKENIZERS["large"]
    paired = 0
    for text in TEXTS:
        ours, theirs = encode_spans(small, text), encode_spans(large, text)
        for i, j in align_positions(ours, theirs):
            assert small.backend_tokenizer.decode(ours.ids[: i + 1].tolist()) is not None
            assert text[: ours.ends[i]] == text[: theirs.ends[j]]
            assert ours.starts[i + 1] >= ours.ends[i]
            paired += 1
    assert paired > 50


def test_a_character_of_several_tokens_is_one_place():
    encoded = encode_spans(TOKENIZERS["small"], "x🦙y")
    assert encoded.boundaries.tolist() == [1, 2, 3]
    assert len(encoded.ids) == 6  # four bytes between the letters
    assert [(a.start, a.stop) for a, _ in chunks(encoded, encoded)] == [(0, 1), (1, 5), (5, 6)]


def test_special_tokens_stand_where_the_text_is_by_then():
    framed = Encoded(np.array([0, 5, 6, 1]), np.array([0, 0, 3, 0]), np.array([0, 3, 7, 0]))
    plain = Encoded(np.array([5, 6]), np.array([0, 3]), np.array([3, 7]))
    assert chunks(framed, plain) == [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]
    assert framed.boundaries.tolist() == [0, 3, 7]


# ---- the loss ---------------------------------------------------------------------------------------------------


def _by_hand(ours: list[float], theirs: list[float], temperature: float) -> float:
    sides = []
    for logits in (ours, theirs):
        powers = [2.718281828459045 ** (z / temperature) for z in logits]
        sides.append(sorted((p / sum(powers) for p in powers), reverse=True))
    width = max(map(len, sides))
    padded = [side + [0.0] * (width - len(side)) for side in sides]
    return temperature * sum(abs(a - b) for a, b in zip(*padded, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("ours", "theirs"), [(7, 7), (5, 9), (9, 5), (1, 4)])
def test_universal_logit_is_the_loop(ours: int, theirs: int, temperature: float):
    torch.manual_seed(ours * theirs)
    student, teacher = torch.randn(2, 3, ours), 2 * torch.randn(2, 3, theirs)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = universal_logit(student, Dense(teacher, temperature), mask)
    expected = [
        _by_hand(student[b, t].tolist(), teacher[b, t].tolist(), temperature)
        for b in range(2) for t in range(3) if mask[b, t]
    ]  # fmt: skip
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


def test_universal_logit_asks_how_sure_and_not_of_what():
    teacher = torch.randn(4, 11)
    student = teacher[:, torch.randperm(11)].clone().requires_grad_()
    mask = torch.ones(4)
    assert universal_logit(student, Dense(teacher), mask).detach().abs().max() < 1e-6
    wrong = torch.randn(4, 11, requires_grad=True)
    universal_logit(wrong, Dense(teacher), mask).sum().backward()  # type: ignore[no-untyped-call]
    assert wrong.grad is not None
    assert bool(torch.isfinite(wrong.grad).all())
    assert float(wrong.grad.abs().sum()) > 0
    double = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    signal = Dense(torch.randn(3, 8, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda logits: universal_logit(logits, signal, torch.ones(3)), (double,))
    assert len(universal_logit(wrong, Dense(teacher), torch.zeros(4))) == 0


# ---- whether they mean the same ----------------------------------------------------------------------------------


def test_different_vocabularies_are_refused_with_the_reason():
    with pytest.raises(RecipeError, match="normalizers differ"):
        relate(TOKENIZERS["large"], 600, TOKENIZERS["wordpiece"], 300)
    assert relate(TOKENIZERS["large"], 600, TOKENIZERS["large"], 640).relation == "padded"


def test_coverage_is_that_of_a_loop():
    teacher, student = TOKENIZERS["large"], TOKENIZERS["small"]  # 300 tokens are the first 300 of 600
    theirs = teacher.get_vocab()
    keep = [theirs[token] for token, _ in sorted(student.get_vocab().items(), key=lambda item: item[1])]
    found = measure_coverage(teacher, student, keep, TEXTS)
    tokens = kept = same = ours = alike = 0
    for text in TEXTS:
        a, b = encode_spans(teacher, text), encode_spans(student, text)
        tokens, ours = tokens + len(a.ids), ours + len(b.ids)
        kept += sum(index in keep for index in a.ids)
        for first, second in _loop(a, b):
            if [a.ids[i] for i in first] == [keep[b.ids[j]] for j in second]:
                same += len(first)
        alike += a.ids.tolist() == [keep[index] for index in b.ids]
    assert found is not None
    assert (found.texts, found.characters, found.tokens) == (len(TEXTS), sum(map(len, TEXTS)), tokens)
    assert (found.kept, found.coinciding) == pytest.approx((kept / tokens, same / tokens))
    assert (found.same_texts, found.growth) == pytest.approx((alike / len(TEXTS), ours / tokens))
    assert 0 < found.coinciding <= found.kept < 1 < found.growth
    assert measure_coverage(teacher, student, keep, [""]) is None
