from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr
from torch import Tensor

from edgestill.distill.losses import forward_kl
from edgestill.distill.signal import Dense, Sparse
from edgestill.distill.token_records import TokenFormat, capture, decode
from edgestill.errors import BadInput
from edgestill.recipe_cache import CacheConfig


def _logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.5) -> Tensor:
    """Zipf-like: a few likely tokens, a long tail, in another order for each token."""
    chooser = torch.Generator().manual_seed(seed)
    base = -1.1 * torch.log(torch.arange(1, vocabulary + 1))
    order = torch.stack([torch.randperm(vocabulary, generator=chooser) for _ in range(rows)])
    return scale * (base[order] + 1.2 * torch.randn(rows, vocabulary, generator=chooser)) + 7.0


def _buckets(logits: Tensor, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, log-probabilities and tail from the definition, in fp64 and by sorting."""
    log_probs = log_softmax(logits.double().numpy() / temperature, axis=-1)
    ids = np.argsort(-log_probs, axis=-1, kind="stable")[:, :k]
    top = np.take_along_axis(log_probs, ids, -1)
    rest = log_probs.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    return ids, top, logsumexp(rest, axis=-1)


def test_a_token_of_a_vocabulary_of_49152_takes_272_bytes_at_k_64():
    assert TokenFormat(49152).dtype.itemsize == 272
    assert TokenFormat(49152, temperatures=(1.0, 2.0)).dtype.itemsize == 276
    assert TokenFormat(151665).dtype.itemsize == 144 + 106  # ids no longer fit 16 bits: they are coded
    assert TokenFormat(262144).dtype.itemsize <= 300
    assert TokenFormat(151665, plain_ids=True).dtype.itemsize == 272 + 128
    assert TokenFormat(49152, tail_samples=4).dtype.itemsize == 272 + 4 * 6
    assert TokenFormat(49152, layers=(3, 7), width=576).dtype.itemsize == 272 + 2 * 2 * 576
    records = capture(_logits(3, 49152), TokenFormat(49152, temperatures=(1.0, 2.0)))
    assert len(records.tobytes()) / 3 <= 300


@pytest.mark.parametrize("vocabulary", [40, 49152, 1 << 16, 151665])
@pytest.mark.parametrize("samples", [0, 3])
def test_the_recipe_knows_the_size_without_torch(vocabulary: int, samples: int):
    config = CacheConfig(tail_samples=samples, temperatures=(1.0, 4.0))
    form = TokenFormat(vocabulary, 64, (1.0, 2.0, 4.0), samples)
    assert config.row_bytes(vocabulary, 2.0) == form.dtype.itemsize


@pytest.mark.parametrize("samples", [0, 2])
def test_coded_ids_say_what_plain_ones_say(samples: int):
    logits = _logits(20, 70_001)
    logits[3, 100:] = -math.inf  # ruled out, nearly everything
    said = []
    for plain in (True, False):
        form = TokenFormat(70_001, 64, (1.0, 2.0), samples, plain_ids=plain)
        generators = tuple(torch.Generator().manual_seed(seed) for seed in (1, 2))
        said.append(decode(capture(logits, form, generators), form, 2.0))
    ours, theirs = said[1], said[0]
    order = theirs.ids.argsort(-1)
    assert torch.equal(ours.ids, theirs.ids.gather(-1, order))
    torch.testing.assert_close(ours.log_probs, theirs.log_probs.gather(-1, order), rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.tail, theirs.tail, rtol=1e-6, atol=0)
    if samples:
        assert torch.equal(ours.sampled_ids, theirs.sampled_ids)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_buckets_are_those_of_the_full_logits_at_that_temperature(temperature: float, k: int):
    logits = _logits(40, 3000)
    form = TokenFormat(3000, k, (0.5, 1.0, 2.0, 4.0))
    sparse = decode(capture(logits, form), form, temperature)
    ids, top, tail = _buckets(logits, k, temperature)
    assert np.array_equal(sparse.ids.numpy(), ids)
    np.testing.assert_allclose(sparse.tail.numpy(), tail, rtol=1e-5, atol=2e-6)
    span = float((logits.max(-1).values - logits.gather(-1, torch.from_numpy(ids[:, -1:].copy()))[:, 0]).max())
    np.testing.assert_allclose(sparse.log_probs.numpy(), top, atol=2 * span / 131068 / temperature + 3e-6)
    total = sparse.log_probs.double().exp().sum(-1) + sparse.tail.double().exp()
    np.testing.assert_allclose(total.numpy(), 1.0, atol=1e-6)


def test_tails_at_two_can_not_come_from_masses_at_one():
    # One likely token and a hundred unlikely ones: at T = 2 the others weigh far more.
    logits = torch.zeros(1, 101)
    logits[0, 0] = 8.0
    form = TokenFormat(101, 1, (1.0, 2.0))
    records = capture(logits, form)
    exact = math.log(100 / (100 + math.exp(4.0)))
    assert decode(records, form, 2.0).tail.item() == pytest.approx(exact, rel=1e-6)
    at_one = decode(records, form, 1.0)
    top, tail = at_one.log_probs[0, 0].item() / 2, at_one.tail.item() / 2  # what a cache of T = 1 would have to guess
    guessed = tail - math.log(math.exp(top) + math.exp(tail))
    assert abs(guessed - exact) > 0.5


def test_a_missing_temperature_is_refused():
    form = TokenFormat(20, 4, (1.0,))
    with pytest.raises(BadInput, match="holds temperature 1, not 2"):
        decode(capture(_logits(2, 20), form), form, 2.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kl_error_of_the_stored_precision_is_what_the_docstring_says(temperature: float):
    teacher = _logits(60, 49152)
    student = teacher + 0.7 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(3))
    form = TokenFormat(49152, 64, (1.0, 2.0))
    sparse = decode(capture(teacher, form), form, temperature)
    ids, top, tail = _buckets(teacher, 64, temperature)
    theirs = log_softmax(student.double().numpy() / temperature, axis=-1)
    chosen = np.take_along_axis(theirs, ids, -1)
    np.put_along_axis(theirs, ids, -np.inf, -1)
    other = np.exp(np.concatenate([chosen, logsumexp(theirs, axis=-1, keepdims=True)], -1))
    exact = rel_entr(np.exp(np.concatenate([top, tail[:, None]], -1)), other).sum(-1)
    kept = torch.cat([sparse.log_probs, sparse.tail[:, None]], -1).double().exp().numpy()
    found = rel_entr(kept, other).sum(-1)
    assert exact.mean() > 0.03
    error = np.abs(found - exact)
    assert error.max() < (5e-5 if temperature == 1.0 else 1e-5)
    assert error.mean() < 5e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_dense_loss(temperature: float):
    teacher, student = _logits(30, 50), _logits(30, 50, seed=9)
    form = TokenFormat(50, 64, (temperature,), tail_samples=3)
    assert (form.kept, form.samples) == (50, 0)
    sparse = decode(capture(teacher, form), form, temperature)
    assert bool(torch.isneginf(sparse.tail).all())
    everywhere = torch.ones(30, dtype=torch.bool)
    dense = forward_kl(student, Dense(teacher, temperature, 50), everywhere)
    torch.testing.assert_close(forward_kl(student, sparse, everywhere), dense, rtol=2e-4, atol=1e-5)


def test_buckets_are_a_lower_bound_that_rises_with_k():
    teacher, student = _logits(50, 500, scale=1.0), _logits(50, 500, seed=9, scale=1.0)
    everywhere = torch.ones(50, dtype=torch.bool)
    values = []
    for k in (1, 4, 16, 64, 256):
        form = TokenFormat(500, k)
        values.append(forward_kl(student, decode(capture(teacher, form), form, 1.0), everywhere))
    values.append(forward_kl(student, Dense(teacher, 1.0, 500), everywhere))
    for less, more in pairwise(values):
        assert bool((less <= more + 1e-4).all())
    assert float(values[0].mean()) < 0.9 * float(values[-1].mean())


def test_padding_behind_the_vocabulary_is_not_seen():
    logits = _logits(5, 60)
    form = TokenFormat(50, 8)
    loud = logits.clone()
    loud[:, 50:] = 1e4
    assert capture(loud, form).tobytes() == capture(logits[:, :50], form).tobytes()


def test_a_teacher_may_rule_tokens_out_but_not_say_nan():
    logits = torch.full((2, 30), -math.inf)
    logits[:, 3], logits[:, 4] = 1.0, 2.0
    form = TokenFormat(30, 5, tail_samples=2)
    sparse = decode(capture(logits, form, (torch.Generator().manual_seed(0),)), form, 1.0)
    assert sparse.ids[0, :2].tolist() == [4, 3]
    assert sparse.log_probs[0, :2].exp().sum().item() == pytest.approx(1.0)
    assert bool(torch.isneginf(sparse.log_probs[:, 2:]).all())
    assert bool(torch.isneginf(sparse.tail).all())
    assert isinstance(sparse, Sparse)
    assert sparse.sampled_log_probs is not None
    assert bool(torch.isneginf(sparse.sampled_log_probs).all())
    for bad in (math.nan, math.inf):
        logits[1, 17] = bad
        with pytest.raises(BadInput, match="not finite"):
            capture(logits, form, (torch.Generator(),))


def test_a_dominant_token_keeps_a_tiny_tail():
    logits = torch.zeros(1, 1000)
    logits[0, 5] = 60.0
    form = TokenFormat(1000, 1)
    sparse = decode(capture(logits, form), form, 1.0)
    assert sparse.tail.item() == pytest.approx(math.log(999) - 60.0, rel=1e-6)
    assert sparse.log_probs.item() == 0.0


def test_sampled_tail_tokens_make_the_kl_unbiased():
    teacher, student = _logits(1, 80, scale=0.8), _logits(1, 80, seed=9, scale=0.8)
    form = TokenFormat(80, 4, (1.0, 2.0), tail_samples=5000)
    generators = (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    records = capture(teacher, form, generators)
    for temperature in form.temperatures:
        sparse = decode(records, form, temperature)
        assert sparse.sampled_ids is not None
        assert sparse.sampled_log_probs is not None
        log_probs = log_softmax(teacher.double().numpy() / temperature, axis=-1)[0]
        np.testing.assert_allclose(sparse.sampled_log_probs[0].numpy(), log_probs[sparse.sampled_ids[0]], atol=1e-5)
        assert not set(sparse.sampled_ids[0].tolist()) & set(sparse.ids[0].tolist())
        theirs = log_softmax(student.double().numpy() / temperature, axis=-1)[0]
        ids = sparse.ids[0].numpy()
        terms = np.exp(log_probs) * (log_probs - theirs)
        drawn = sparse.sampled_ids[0].numpy()
        samples = math.exp(sparse.tail.item()) * (log_probs - theirs)[drawn]
        error = samples.std() / math.sqrt(len(samples))
        assert abs(terms[ids].sum() + samples.mean() - terms.sum()) < 4 * error
        assert error < 0.05 * terms.sum()


def test_a_temperature_keeps_its_draws_whatever_else_is_kept():
    logits = _logits(6, 200)
    one = TokenFormat(200, 4, (2.0,), tail_samples=8)
    two = TokenFormat(200, 4, (1.0, 2.0), tail_samples=8)
    alone = decode(capture(logits, one, (torch.Generator().manual_seed(7),)), one, 2.0)
    both = capture(logits, two, (torch.Generator().manual_seed(3), torch.Generator().manual_seed(7)))
    for name, value in vars(decode(both, two, 2.0)).items():
        ours = getattr(alone, name)
        assert torch.equal(ours, value) if isinstance(value, Tensor) else ours == value, name


def test_the_absolute_logits_can_be_had_back():
    logits = _logits(4, 300)
    records = capture(logits, TokenFormat(300, 16))
    np.testing.assert_allclose(records["log_normaliser"], logsumexp(logits.double().numpy(), axis=-1), rtol=1e-6)
    found = records["top"][:, None] - records["offsets"] * (records["range"][:, None] / 65534)
    np.testing.assert_allclose(found, logits.topk(16).values.numpy(), atol=1e-3)


def test_hidden_states_are_kept_as_halves_and_must_fit():
    form = TokenFormat(30, 4, layers=(0, 2), width=6)
    states = (torch.randn(5, 6), torch.randn(5, 6) * 100)
    records = capture(_logits(5, 30), form, (), states)
    for number, state in enumerate(states):
        assert np.array_equal(records["hidden"][:, number], state.half().numpy())
    with pytest.raises(BadInput, match="does not fit fp16"):
        capture(_logits(5, 30), form, (), (states[0], states[1] * 1e4))
