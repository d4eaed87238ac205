"""Losses over attention, relations and similarities against double loops in Python's floats."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from edgestill.distill.feature_losses import attention_maps, attention_relations, contrastive_scores
from edgestill.distill.signal import Attention, Embedding, Relations
from edgestill.errors import RecipeError, Unsupported

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
PLACES = [(b, t) for b in range(2) for t in range(4) if MASK[b, t]]


def _maps(seed: int, heads: int = 3, causal: bool = False) -> torch.Tensor:
    """Attention maps of padded texts: nobody looks at padding, or ahead."""
    scores = torch.randn(2, heads, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores.masked_fill(~MASK.bool()[:, None, None, :], -math.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_maps_is_a_double_loop(causal: bool) -> None:
    ours, theirs = ([_maps(seed + step, causal=causal) for step in (0, 1)] for seed in (0, 10))
    found = attention_maps(ours, Attention(tuple(theirs)), MASK)
    expected = [
        np.mean(
            [_kl(t[b, h, i].numpy(), s[b, h, i].numpy()) for s, t in zip(ours, theirs, strict=True) for h in range(3)]
        )
        for b, i in PLACES
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert float(attention_maps(theirs, Attention(tuple(theirs)), MASK).abs().max()) < 1e-15


def test_attention_of_zero_is_finite_where_only_the_student_has_it() -> None:
    ours, theirs = (_maps(seed) for seed in (0, 10))
    ours = ours.float()
    ours[0, 0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    ours.requires_grad_()
    value = attention_maps([ours], Attention((theirs.float(),)), MASK)
    assert 10 < float(value.detach().max()) < 100
    value.sum().backward()
    assert bool(torch.isfinite(ours.grad).all())


def test_attention_in_bf16_adds_up_to_one_before_it_is_compared() -> None:
    maps = _maps(0).to(torch.bfloat16)
    value = attention_maps([maps.float() * 0.99], Attention((maps,)), MASK)
    assert float(value.abs().max()) < 1e-6


def test_unequal_heads_are_refused_with_a_way_out() -> None:
    with pytest.raises(Unsupported, match="3 heads of the student with 4 of the teacher") as caught:
        attention_maps([_maps(0)], Attention((_maps(1, heads=4),)), MASK)
    assert "attention_relations" in caught.value.hint
    with pytest.raises(RecipeError, match="no layer"):
        attention_maps([], Attention(()), MASK)


def _vectors(seed: int, width: int, groups: int, heads: int = 2) -> Relations:
    chooser = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 4, size, generator=chooser, dtype=torch.float64) for size in (width, groups, groups))
    return Relations(q, k, v, heads)


def _relation_loop(ours: np.ndarray, theirs: np.ndarray, heads: int, b: int, i: int, real: list[int]) -> float:
    values = []
    for h in range(heads):
        rows = []
        for side in (theirs, ours):
            size = side.shape[-1] // heads
            x = side[b, :, h * size : (h + 1) * size]
            rows.append(softmax([sum(x[i] * x[j]) / math.sqrt(size) for j in real]))
        values.append(_kl(rows[0], rows[1]))
    return float(np.mean(values))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_double_loops_for_any_widths_and_grouped_heads(heads: int) -> None:
    ours, theirs = _vectors(0, 8, 4), _vectors(1, 16, 8, heads=4)
    found = attention_relations(ours, theirs, MASK, heads)
    expected = [
        sum(
            _relation_loop(getattr(ours, part).numpy(), getattr(theirs, part).numpy(), heads, b, i,
                           [t for t in range(4) if MASK[b, t]])
            for part in ("queries", "keys", "values")
        )
        for b, i in PLACES
    ]  # fmt: skip
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    if heads == 4:
        assert torch.equal(attention_relations(ours, theirs, MASK), found)  # the teacher's own number


def test_relations_of_learnt_tokens_look_at_all_real_ones() -> None:
    ours, theirs = _vectors(0, 8, 4), replace(_vectors(1, 16, 8), real=MASK)
    learnt = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]])
    everywhere = attention_relations(ours, theirs, MASK, 2)
    chosen = [place for place, (b, t) in enumerate(PLACES) if learnt[b, t]]
    torch.testing.assert_close(attention_relations(ours, theirs, learnt, 2), everywhere[chosen])


def test_relation_heads_must_divide() -> None:
    with pytest.raises(Unsupported, match="can't cut queries of 8 numbers into 3 relation heads"):
        attention_relations(_vectors(0, 8, 4), _vectors(1, 12, 6), MASK, 3)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_contrastive_scores_is_a_double_loop(temperature: float) -> None:
    chooser = np.random.default_rng(0)
    ours, theirs = chooser.normal(size=(5, 8)), chooser.normal(size=(5, 12))

    def scores(x: np.ndarray, i: int) -> np.ndarray:
        cosines = [x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for j in range(5) if j != i]
        return softmax(np.array(cosines) / temperature)

    found = contrastive_scores(torch.from_numpy(ours), Embedding(torch.from_numpy(theirs)), torch.ones(5), temperature)
    np.testing.assert_allclose(found.numpy(), [_kl(scores(theirs, i), scores(ours, i)) for i in range(5)], rtol=1e-9)


@pytest.mark.parametrize("texts", [0, 1, 2])
def test_few_texts_have_nothing_to_rank(texts: int) -> None:
    ours = torch.randn(texts, 8, requires_grad=True)
    value = contrastive_scores(ours, Embedding(torch.randn(texts, 8)), torch.ones(texts))
    assert value.shape == (texts,)
    value.sum().backward()
    assert float(value.detach().abs().sum()) == 0.0
    assert float(ours.grad.abs().sum()) < 1e-6


def test_gradients_are_those_of_differences() -> None:
    theirs = _vectors(1, 16, 8)

    def relations(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_relations(Relations(q, k, v, 2), theirs, MASK, 2)

    ours = _vectors(0, 8, 4)
    assert torch.autograd.gradcheck(
        relations, tuple(x.requires_grad_() for x in (ours.queries, ours.keys, ours.values))
    )
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    maps = Attention((_maps(10),))
    assert torch.autograd.gradcheck(
        lambda x: attention_maps([x.masked_fill(~MASK.bool()[:, None, None, :], -math.inf).softmax(-1)], maps, MASK),
        scores,
    )
    texts = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    signal = Embedding(torch.randn(5, 12, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: contrastive_scores(x, signal, torch.ones(5), 0.5), texts)


def test_what_stands_in_the_padding_changes_nothing_bit_for_bit() -> None:
    pad = ~MASK.bool()
    ours, theirs = _vectors(0, 8, 4), _vectors(1, 16, 8)
    maps = [_maps(0)], Attention((_maps(10),))
    before = attention_relations(ours, theirs, MASK, 2), attention_maps(*maps, MASK)

    def soiled(side: Relations) -> Relations:
        q, k, v = (x.masked_fill(pad.unsqueeze(-1), 1e6) for x in (side.queries, side.keys, side.values))
        return replace(side, queries=q, keys=k, values=v)

    dirty = [[x.masked_fill(pad[:, None, :, None], 0.25) for x in side] for side in (maps[0], maps[1].maps)]
    after = (attention_relations(soiled(ours), soiled(theirs), MASK, 2),
             attention_maps(dirty[0], Attention(tuple(dirty[1])), MASK))  # fmt: skip
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)
    for nothing in (torch.zeros_like(MASK),):
        q = ours.queries.clone().requires_grad_()
        value = attention_relations(replace(ours, queries=q), theirs, nothing, 2)
        assert value.shape == (0,)
        value.sum().backward()
        assert float(q.grad.abs().sum()) == 0.0
