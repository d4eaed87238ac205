from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from edgestill.distill.ensemble import mixture
from edgestill.distill.sampling import Writer, choose
from edgestill.errors import BadInput
from edgestill.recipe_teaching import Writing

PROMPTS = [(5, 6, 7, 8, 9), (3,), (11, 12, 13), (30, 2), (1, 1, 1, 1, 1, 1, 1), (17, 18)]
KEYS = [(0, number) for number in range(len(PROMPTS))]


def _writer(model: Any, stop: tuple[int, ...] = (), **settings: Any) -> Writer:
    plain = {"new_tokens": 12, "sampling_temperature": 0.0}
    return Writer([model], Writing(**{**plain, **settings}), vocab_size=40, stop=stop)


def _slowly(model: Any, prompt: tuple[int, ...], count: int, stop: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Greedy, one text at a time, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen2", "qwen3"])
def test_a_batch_is_continued_as_its_texts_one_by_one(build: Callable[[str], Any], family: str):
    model = build(family)
    slowly = [_slowly(model, prompt, 12) for prompt in PROMPTS]
    stop = (slowly[0][4], slowly[2][0])  # so that some texts end early, at different places
    found = _writer(model, stop).write(PROMPTS, KEYS)
    assert [item.ids for item in found] == [_slowly(model, prompt, 12, stop) for prompt in PROMPTS]
    assert [item.ended for item in found] == [item.ids[-1] in stop for item in found]
    assert len({len(item.ids) for item in found}) > 1
    assert found[2].ended


def test_a_sampled_text_does_not_depend_on_its_company(build: Callable[[str], Any]):
    model = build("llama")
    writer = _writer(model, sampling_temperature=1.3, top_p=0.9, top_k=20)
    together = writer.write(PROMPTS, KEYS)
    alone = [writer.write([prompt], [key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    assert together == alone
    assert writer.write(PROMPTS, [(1, n) for n in range(len(PROMPTS))]) != together


def test_ids_that_only_pad_the_embedding_are_never_drawn(build: Callable[[str], Any]):
    model = build("llama")
    writer = Writer([model], Writing(new_tokens=30, sampling_temperature=5.0), vocab_size=23, stop=())
    drawn = [token for item in writer.write(PROMPTS, KEYS) for token in item.ids]
    assert max(drawn) == 22


def test_choose_draws_with_the_probabilities_it_is_given():
    probabilities = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    rows = torch.from_numpy(np.log(np.maximum(probabilities, 1e-300)))[None].expand(len(uniforms), -1)
    counts = torch.bincount(choose(rows, uniforms), minlength=5).numpy()
    assert counts[1] == 0
    kept = [0, 2, 3, 4]
    assert stats.chisquare(counts[kept], 20_000 * probabilities[kept]).pvalue > 1e-3
    # 0.5 + 0.3 reach 0.7, so of the nucleus only these two are left, in their proportion.
    nucleus = torch.bincount(choose(rows, uniforms, top_p=0.7), minlength=5).numpy()
    assert stats.chisquare(nucleus[[0, 2]], 20_000 * np.array([0.625, 0.375])).pvalue > 1e-3
    assert nucleus[[1, 3, 4]].sum() == 0
    three = torch.bincount(choose(rows, uniforms, top_k=3), minlength=5).numpy()
    assert stats.chisquare(three[[0, 2, 3]], 20_000 * np.array([0.5, 0.3, 0.15]) / 0.95).pvalue > 1e-3
    assert three[[1, 4]].sum() == 0
    # top_p is taken of what top_k left: 0.5 / 0.8 is under 0.7, so two are needed.
    assert set(choose(rows, uniforms, top_p=0.7, top_k=2).tolist()) == {0, 2}
    assert set(choose(rows, uniforms, top_p=0.6, top_k=2).tolist()) == {0}


def test_choose_at_the_ends():
    rows = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert choose(rows, uniforms).tolist() == [1, 2, 2]


def test_a_mixture_is_the_mean_of_softmaxes():
    chooser = np.random.default_rng(1)
    logits = [chooser.normal(size=(7, 23)) * 4 for _ in range(3)]
    weights = (0.5, 0.2, 0.3)
    expected = np.zeros((7, 23))
    for z, weight in zip(logits, weights, strict=True):
        soft = np.exp(z / 1.7 - (z / 1.7).max(-1, keepdims=True))
        expected += weight * soft / soft.sum(-1, keepdims=True)
    found = mixture([torch.from_numpy(z) for z in logits], weights, 1.7).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_mixture_writes_what_its_mean_says(build: Callable[[str], Any]):
    one, two = build("llama"), build("qwen3")
    both = Writer([one, two], Writing(new_tokens=6, sampling_temperature=0.0), vocab_size=40, stop=(),
                  weights=(0.3, 0.7))  # fmt: skip
    for prompt, found in zip(PROMPTS, both.write(PROMPTS, KEYS), strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                soft = [torch.softmax(m(input_ids=torch.tensor([ids])).logits[0, -1], -1) for m in (one, two)]
            ids.append(int((0.3 * soft[0] + 0.7 * soft[1]).argmax()))
        assert found.ids == tuple(ids[len(prompt) :])


def test_nan_is_one_clear_line(build: Callable[[str], Any]):
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="the student's output is not finite"):
        _writer(model).write(PROMPTS, KEYS)
