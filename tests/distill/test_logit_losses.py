"""Losses over logits, dense and sparse: what k tokens and their tail can say, and what stays exact."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, rel_entr, softmax

from edgestill.distill.logit_losses import cross_entropy, forward_kl, logit_mse, total_variation
from edgestill.distill.losses import LOSSES, Loss, select_losses, shift
from edgestill.distill.rows import student_buckets
from edgestill.distill.signal import Dense, Labels, Sparse
from edgestill.errors import BadInput

V = 23
NAMES = ("forward_kl", "reverse_kl", "jsd:0.1", "jsd:0.5", "skew_kl:0.1", "skew_reverse_kl:0.1", "total_variation",
         "alpha_beta:0.3:0.7", "alpha_beta:0.5:0.5")  # fmt: skip


def _loss(name: str) -> Loss:
    [loss] = select_losses({name: 1.0}, "text-generation").values()
    return loss


def _logits(seed: int = 3, rows: int = 6, size: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    chooser = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(rows, size, generator=chooser, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def _sparse(teacher: torch.Tensor, k: int, temperature: float = 1.0) -> Sparse:
    """What a cache would hold, computed with numpy."""
    rows = teacher.numpy() / temperature
    log = rows - logsumexp(rows, axis=-1, keepdims=True)
    order = np.argsort(-log, axis=-1, kind="stable")
    ids, others = order[:, :k], order[:, k:]
    tail = logsumexp(np.take_along_axis(log, others, -1), axis=-1) if k < V else np.full(len(log), -np.inf)
    return Sparse(
        torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(log, ids, -1)), torch.from_numpy(tail),
        temperature, rows.shape[-1],
    )  # fmt: skip


ALL = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sparse_with_every_token_is_dense(name: str, temperature: float) -> None:
    student, teacher = _logits()
    ours = [student.clone().requires_grad_() for _ in range(2)]
    dense = _loss(name).values(ours[0], Dense(teacher, temperature), ALL)
    sparse = _loss(name).values(ours[1], _sparse(teacher, V, temperature), ALL)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
    for value in (dense, sparse):
        value.sum().backward()
    torch.testing.assert_close(ours[1].grad, ours[0].grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_is_a_lower_bound_that_rises_with_k(name: str) -> None:
    student, teacher = _logits()
    dense = _loss(name).values(student, Dense(teacher), ALL)
    before = torch.zeros_like(dense)
    for k in range(1, V + 1):
        found = _loss(name).values(student, _sparse(teacher, k), ALL)
        assert bool((found >= before - 1e-12).all()), k
        assert bool((found <= dense + 1e-12).all()), k
        before = found


def test_why_alpha_beta_refuses_sparse_signals_elsewhere() -> None:
    """With alpha + beta other than 1 a merged bucket can be worth more than its tokens, so nothing is bounded."""
    student, teacher = _logits()
    function = LOSSES["alpha_beta"].function
    dense = function(student, Dense(teacher), ALL, 1.0, 1.0)
    assert any(bool((function(student, _sparse(teacher, k), ALL, 1.0, 1.0) > dense).any()) for k in range(1, V))


@pytest.mark.parametrize("k", [1, 4, 22])
def test_buckets_are_k_tokens_and_the_others_together(k: int) -> None:
    student, teacher = _logits()
    sparse = _sparse(teacher, k, 2.0)
    p, q = (softmax(x.numpy() / 2.0, axis=-1) for x in (teacher, student))
    expected = []
    for row in range(6):
        kept = sparse.ids[row].tolist()
        rest = [v for v in range(V) if v not in kept]
        a, b = [*p[row, kept], p[row, rest].sum()], [*q[row, kept], q[row, rest].sum()]
        expected.append(4 * sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
    np.testing.assert_allclose(forward_kl(student, sparse, ALL).numpy(), expected, rtol=1e-10)


def test_a_tail_of_nearly_nothing_is_not_rounding() -> None:
    """In fp32 one minus the k tokens' mass would be 0 or 6e-8; the tail here is 2e-13."""
    logits = torch.tensor([[30.0, 1.0, 0.5, -1.0]])
    found, total = student_buckets(logits, torch.tensor([[0]]), 1.0)
    exact = logsumexp([1.0, 0.5, -1.0]) - logsumexp([30.0, 1.0, 0.5, -1.0])
    assert float(found[0, 1]) == pytest.approx(exact, rel=1e-6)
    assert float(total) == pytest.approx(30.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 5, V])
def test_gradients_through_sparse_signals(name: str, k: int) -> None:
    student, teacher = _logits()
    sparse = _sparse(teacher, k, 1.5)
    assert torch.autograd.gradcheck(lambda x: _loss(name).values(x, sparse, ALL), student.requires_grad_())


def test_a_student_that_rules_tokens_out_keeps_finite_gradients() -> None:
    student, teacher = _logits()
    sparse = _sparse(teacher, 5)
    outside = torch.ones(6, V, dtype=torch.bool).scatter(-1, sparse.ids, False)
    for gone in (outside & (torch.arange(V) % 2 == 0), outside):
        logits = student.masked_fill(gone, -math.inf).requires_grad_()
        for name in ("jsd:0.5", "skew_kl:0.1", "reverse_kl", "total_variation"):
            (grad,) = torch.autograd.grad(_loss(name).values(logits, sparse, ALL).sum(), logits)
            assert bool(torch.isfinite(grad).all()), name


def test_stored_in_half_precision_a_divergence_is_still_not_below_zero() -> None:
    _, teacher = _logits()
    exact = _sparse(teacher, 8)
    half = replace(exact, log_probs=exact.log_probs.half(), tail=exact.tail.half())
    assert float(torch.cat([half.log_probs.double(), half.tail.double().unsqueeze(-1)], -1).exp().sum(-1).max()) != 1
    assert float(forward_kl(teacher, half, ALL).min()) > -1e-14
    assert float(forward_kl(teacher, half, ALL).max()) < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_sampled_tail_tokens_give_the_exact_kl_on_average(weighted: bool) -> None:
    student, teacher = (rows[:2] for rows in _logits())
    temperature, k, drawn, copies = 2.0, 3, 4, 20_000
    sparse = _sparse(teacher, k, temperature)
    p = softmax(teacher.numpy() / temperature, axis=-1)
    chooser = np.random.default_rng(0)
    ids, weights = [], []
    for row in range(2):
        outside = p[row].copy()
        outside[sparse.ids[row]] = 0
        proposal = np.sqrt(outside) if weighted else outside
        proposal = proposal / proposal.sum()
        ids.append(chooser.choice(V, size=(copies, drawn), p=proposal))
        weights.append(np.log(p[row][ids[-1]] / proposal[ids[-1]]))
    sampled = torch.from_numpy(np.stack(ids))
    rows = np.arange(2)[:, None, None]
    signal = Sparse(
        *(t.unsqueeze(1).expand(2, copies, *t.shape[1:]) for t in (sparse.ids, sparse.log_probs, sparse.tail)),
        temperature, V, sampled, torch.from_numpy(np.log(p[rows, sampled.numpy()])),
        torch.from_numpy(np.stack(weights)) if weighted else None,
    )  # fmt: skip
    estimates = forward_kl(
        student.unsqueeze(1).expand(2, copies, V), signal, torch.ones(2, copies, dtype=torch.bool)
    ).reshape(2, copies)
    q = softmax(student.numpy() / temperature, axis=-1)
    exact = torch.from_numpy(temperature**2 * rel_entr(p, q).sum(-1))
    error = estimates.std(-1) / math.sqrt(copies)
    assert bool((error < 0.02).all())
    assert bool(((estimates.mean(-1) - exact).abs() < 4 * error).all())
    buckets = forward_kl(student, sparse, ALL[:2])
    assert bool((exact - buckets > 10 * error).all())  # so the test would notice plain buckets


def test_sampled_tokens_have_a_right_gradient() -> None:
    student, teacher = _logits()
    sparse = _sparse(teacher, 3)
    outside = torch.ones(6, V, dtype=torch.bool).scatter(-1, sparse.ids, False)
    sampled = torch.stack([row.nonzero().squeeze(-1)[[0, 0, 7]] for row in outside])
    log = torch.log_softmax(teacher, -1)
    signal = replace(sparse, sampled_ids=sampled, sampled_log_probs=log.gather(-1, sampled))
    assert torch.autograd.gradcheck(lambda x: forward_kl(x, signal, ALL), student.requires_grad_())


def test_logit_mse_is_a_mean_over_the_true_vocabulary() -> None:
    student, teacher = _logits()
    expected = [np.mean([(float(a) - float(b)) ** 2 for a, b in zip(s[:20], t[:20], strict=True)])
                for s, t in zip(student, teacher, strict=True)]  # fmt: skip
    for temperature in (1.0, 4.0):
        found = logit_mse(student, Dense(teacher, temperature, 20), ALL)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    gone = torch.arange(V) == 4
    both = [x.masked_fill(gone, -math.inf) for x in (student, teacher)]
    without = [x[:, ~gone] for x in (student, teacher)]
    torch.testing.assert_close(
        logit_mse(both[0], Dense(both[1]), ALL) * V, logit_mse(without[0], Dense(without[1]), ALL) * (V - 1)
    )


@pytest.mark.parametrize("name", [*NAMES, "alpha_beta:0.2:0.7", "logit_mse"])
def test_bf16_logits_are_compared_in_fp32(name: str) -> None:
    student, teacher = (x.to(torch.bfloat16) for x in _logits())
    found = _loss(name).values(student, Dense(teacher, 2.0), ALL)
    assert found.dtype == torch.float32
    exact = _loss(name).values(student.double(), Dense(teacher.double(), 2.0), ALL)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "alpha_beta:0.2:0.7"])
def test_the_factor_keeps_the_gradient_in_size(name: str) -> None:
    sizes = []
    for temperature in (32.0, 128.0):
        student, teacher = _logits()
        student.requires_grad_()
        _loss(name).values(student, Dense(teacher, temperature), ALL).sum().backward()
        sizes.append(float(student.grad.norm()))
    drift = 4 ** (0.1 if name == "alpha_beta:0.2:0.7" else 0.0)  # V^(1 − alpha − beta): probabilities themselves
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15 * drift)


@pytest.mark.parametrize("name", [*NAMES, "alpha_beta:0.2:0.7", "logit_mse"])
def test_rows_behind_the_vocabulary_and_masked_places_change_nothing(name: str) -> None:
    student, teacher = _logits(size=V + 9)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    found = _loss(name).values(student, Dense(teacher, 2.0, V), mask)
    other_student, other_teacher = student.clone(), teacher.clone()
    for logits in (other_student, other_teacher):
        logits[:, V:] = 77.0
        logits[~mask.bool()] = math.nan
    assert torch.equal(_loss(name).values(other_student, Dense(other_teacher, 2.0, V), mask), found)
    if LOSSES[name.partition(":")[0]].function is not logit_mse:
        signal = replace(_sparse(teacher[:, :V], 5, 2.0))
        sparse = _loss(name).values(student, signal, mask)
        assert torch.equal(_loss(name).values(other_student, signal, mask), sparse)


def test_unequal_vocabularies_are_one_clear_line() -> None:
    with pytest.raises(BadInput, match="the teacher has 20 logits, the student 23"):
        forward_kl(torch.zeros(6, 23), Dense(torch.zeros(6, 20)), ALL)


def test_total_variation_carries_the_temperature_once() -> None:
    student, teacher = _logits()
    p, q = (softmax(x.numpy() / 3.0, axis=-1) for x in (teacher, student))
    np.testing.assert_allclose(
        total_variation(student, Dense(teacher, 3.0), ALL).numpy(), 3.0 * 0.5 * np.abs(p - q).sum(-1), rtol=1e-12
    )


def test_a_markov_chains_best_student_is_known() -> None:
    """A student that can't see the state can do no better than the mean of the chain's rows, weighted by how often
    each state comes up: the forward KL left over is the information that the state holds about the next token."""
    chain = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
    values, vectors = np.linalg.eig(chain.T)
    often = np.real(vectors[:, np.argmax(np.real(values))])
    often = often / often.sum()
    best = often @ chain
    least = float(sum(often[s] * rel_entr(chain[s], best).sum() for s in range(3)))
    student = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    teacher = torch.from_numpy(np.log(chain))
    optimiser = torch.optim.LBFGS([student], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        values = forward_kl(student.expand(3, 3), Dense(teacher), torch.ones(3))
        loss = (torch.from_numpy(often) * values).sum()
        loss.backward()
        return loss

    optimiser.step(step)
    assert float(step().detach()) == pytest.approx(least, rel=1e-9)
    np.testing.assert_allclose(torch.softmax(student.detach(), -1).numpy(), best, atol=1e-7)
    # The reverse KL's best is the normalised geometric mean of the rows instead.
    geometric = np.exp(often @ np.log(chain))
    at_best = [LOSSES["reverse_kl"].values(torch.from_numpy(np.log(q)).expand(3, 3), Dense(teacher), torch.ones(3))
               for q in (geometric / geometric.sum(), best)]  # fmt: skip
    assert float(often @ at_best[0].numpy()) < float(often @ at_best[1].numpy())


def test_which_places_get_a_gradient() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    for name in (*NAMES, "logit_mse", "cross_entropy"):
        student = torch.randn(2, 4, V, dtype=torch.float64, requires_grad=True)
        logits, following = shift(student, ids, mask)
        theirs = shift(torch.randn(2, 4, V, dtype=torch.float64), ids, mask)[0]
        signal = Labels(following) if name == "cross_entropy" else Dense(theirs)
        _loss(name).values(logits, signal, torch.ones(len(logits))).sum().backward()
        assert (student.grad.abs().sum(-1) > 0).tolist() == [[True, True, False, False], [True, True, True, False]]
    assert cross_entropy(logits, Labels(following), torch.ones(5)).shape == (5,)


def test_parts_of_a_signal() -> None:
    _, teacher = _logits()
    signal = _sparse(teacher, 3)
    full = replace(signal, sampled_ids=signal.ids, sampled_log_probs=signal.log_probs)
    part = full.rows(2, 5)
    assert torch.equal(part.ids, full.ids[2:5])
    assert torch.equal(part.tail, full.tail[2:5])
    assert part.sampled_ids is not None
    assert torch.equal(part.sampled_ids, full.ids[2:5])
    assert part.sampled_log_weights is None
    assert torch.equal(Dense(teacher, 2.0).rows(1, 3).logits, teacher[1:3])
