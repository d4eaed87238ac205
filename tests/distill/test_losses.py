from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from edgestill.distill.losses import (
    LOSSES,
    cross_entropy,
    embedding_cosine,
    embedding_gram,
    forward_kl,
    hidden_states,
    jsd,
    reduce_step,
    select_losses,
    shift,
)
from edgestill.distill.signal import Attention, Dense, Embedding, Hidden, Labels, Relations, Sparse
from edgestill.errors import RecipeError, Unsupported
from edgestill.loss_names import LOSS_NAMES, parse_loss


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    chooser = torch.Generator().manual_seed(3)
    return tuple(2 * torch.randn(2, 5, 23, generator=chooser, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_is_torch_and_scipy_and_a_double_loop(logits, temperature):
    student, teacher = logits
    found = forward_kl(student, Dense(teacher, temperature), MASK)
    chosen = MASK.bool()
    by_torch = torch.nn.functional.kl_div(
        torch.log_softmax(student[chosen] / temperature, -1),
        torch.log_softmax(teacher[chosen] / temperature, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    p, q = (softmax(x[chosen].numpy() / temperature, axis=-1) for x in (teacher, student))
    by_loop = [sum(p[n, v] * math.log(p[n, v] / q[n, v]) for v in range(23)) for n in range(len(p))]
    assert found.shape == (8,)  # a value a token, summed over the vocabulary: a mean would be 23 times less
    for reference in (by_torch, rel_entr(p, q).sum(-1), by_loop):
        torch.testing.assert_close(found / temperature**2, torch.as_tensor(reference), rtol=1e-12, atol=1e-12)


def test_forward_kl_in_bf16_is_taken_in_fp32(logits):
    teacher = logits[1].to(torch.bfloat16)
    student = (teacher.double() + 0.01 * logits[0]).to(torch.bfloat16)
    found = forward_kl(student, Dense(teacher), MASK)
    assert found.dtype == torch.float32
    exact = forward_kl(student.double(), Dense(teacher.double()), MASK)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=5e-7)


def test_temperature_squared_keeps_the_gradient_in_size(logits):
    sizes = []
    for temperature in (1.0, 8.0, 64.0):
        student = logits[0].clone().requires_grad_()
        forward_kl(student, Dense(logits[1], temperature), MASK).sum().backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[2], rel=0.1)  # without T² it would fall 64-fold; with it twice, rise so
    assert sizes[0] / 8 < sizes[2] < sizes[0] * 8


def test_rows_behind_the_tokenizers_vocabulary_mean_nothing(logits):
    student, teacher = (torch.cat([part, torch.zeros(2, 5, n)], -1) for part, n in zip(logits, (3, 9), strict=True))
    found = forward_kl(student, Dense(teacher, vocab_size=23), MASK)
    torch.testing.assert_close(found, forward_kl(logits[0], Dense(logits[1]), MASK))
    same = forward_kl(torch.cat([logits[1], torch.zeros(2, 5, 7)], -1), Dense(logits[1], vocab_size=23), MASK)
    assert float(same.abs().max()) < 1e-12


def test_a_class_that_the_teacher_rules_out_adds_nothing(logits):
    student, teacher = logits[0].clone().requires_grad_(), logits[1].clone()
    teacher[..., 4] = -math.inf
    found = forward_kl(student, Dense(teacher), MASK)
    p, q = (softmax(x[MASK.bool()].detach().numpy(), axis=-1) for x in (teacher, student))
    np.testing.assert_allclose(found.detach().numpy(), rel_entr(p, q).sum(-1), rtol=1e-12)
    found.sum().backward()
    assert bool(torch.isfinite(student.grad).all())


def test_cross_entropy_is_a_double_loop(logits):
    ids = torch.arange(10).reshape(2, 5)
    found = cross_entropy(logits[0], Labels(ids), MASK)
    places = [(b, t) for b in range(2) for t in range(5) if MASK[b, t]]
    expected = [
        math.log(sum(math.exp(x) for x in logits[0][b, t].tolist())) - float(logits[0][b, t, ids[b, t]])
        for b, t in places
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_hidden_states_is_a_double_loop():
    chooser = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 5, 6, generator=chooser) for _ in range(3)] for _ in range(2))
    found = hidden_states(ours, Hidden(tuple(theirs)), MASK)

    def error(a: torch.Tensor, c: torch.Tensor) -> float:
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, c, strict=True)) / sum(float(y) ** 2 for y in c)

    places = [(b, t) for b in range(2) for t in range(5) if MASK[b, t]]
    expected = [np.mean([error(a[place], c[place]) for a, c in zip(ours, theirs, strict=True)]) for place in places]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_embedding_losses_are_double_loops():
    chooser = np.random.default_rng(0)
    ours, theirs = chooser.normal(size=(4, 8)), chooser.normal(size=(4, 8))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    everything = torch.ones(4, dtype=torch.bool)
    signal = Embedding(torch.from_numpy(theirs))
    found = embedding_cosine(torch.from_numpy(ours), signal, everything)
    np.testing.assert_allclose(found.numpy(), [1 - cosine(a, b) for a, b in zip(ours, theirs, strict=True)], rtol=1e-10)
    found = embedding_gram(torch.from_numpy(ours), signal, everything)
    expected = [
        np.mean([(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for j in range(4) if j != i])
        for i in range(4)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_gram_compares_models_of_different_width_and_cosine_says_that_it_can_not():
    ours, theirs = torch.randn(4, 8), Embedding(torch.randn(4, 12))
    everything = torch.ones(4, dtype=torch.bool)
    assert embedding_gram(ours, theirs, everything).shape == (4,)
    with pytest.raises(Unsupported, match="8 and 12"):
        embedding_cosine(ours, theirs, everything)


def test_an_empty_mask_gives_zero_and_a_gradient_of_zero(logits):
    nothing = torch.zeros_like(MASK)
    signals = {
        **{name: (logits[0], Dense(logits[1])) for name, loss in LOSSES.items() if loss.signal is Dense},
        "cross_entropy": (logits[0], Labels(torch.zeros(2, 5, dtype=torch.long))),
        "hidden_states": (logits[0], Hidden((logits[1],))),
        "embedding_cosine": (logits[0][0], Embedding(logits[1][0])),
        "embedding_gram": (logits[0][0], Embedding(logits[1][0])),
        "contrastive_scores": (logits[0][0], Embedding(logits[1][0])),
        "attention_maps": (logits[0][:, None, :, :5].softmax(-1), Attention((logits[1][:, None, :, :5].softmax(-1),))),
        "attention_relations": (logits[0], Relations(logits[1], logits[1], logits[1], 1)),
    }
    outputs = {
        "hidden_states": lambda x: [x],
        "attention_maps": lambda x: [x],
        "attention_relations": lambda x: Relations(x, x, x, 1),
    }
    assert set(signals) == set(LOSSES)
    for name, (student, signal) in signals.items():
        student = student.clone().requires_grad_()
        output = outputs.get(name, lambda x: x)(student)
        mask = nothing if student.dim() >= 3 else nothing[0]
        value = reduce_step(LOSSES[name].function(output, signal, mask), 0)
        value.backward()
        assert float(value.detach()) == 0.0, name
        assert float(student.grad.abs().sum()) == 0.0, name


def test_shift_pairs_each_place_with_the_next_real_token():
    ids = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 9]])
    states = torch.arange(10.0).reshape(2, 5, 1).requires_grad_()
    chosen, following = shift(states, ids, MASK)
    assert following.tolist() == [6, 7, 2, 3, 4, 9]
    chosen.sum().backward()
    # The first token predicts the second; the last real one and the padding predict nothing.
    assert states.grad[..., 0].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_every_loss_of_a_recipe_is_in_the_table():
    assert set(LOSS_NAMES) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert (name, loss.parameters) == (loss.name, parse_loss(name).parameters)


@pytest.mark.parametrize(
    ("weights", "task", "message"),
    [
        ({"forward_kl": 1.0}, "feature-extraction", "does not fit"),
        ({"embedding_gram": 1.0}, "text-generation", "does not fit"),
        ({"forward_lk": 1.0}, "text-generation", "unknown loss"),
        ({"forward_kl": 0.0}, "text-generation", "weight above 0"),
        ({"jsd:2": 1.0}, "text-generation", "allowed: 0 to 1"),
    ],
)
def test_a_loss_that_does_not_fit_is_one_clear_line(weights, task, message):
    with pytest.raises(RecipeError, match=message) as caught:
        select_losses(weights, task)
    assert task in caught.value.hint or "jsd" in caught.value.hint


def test_losses_with_weight_zero_are_left_out():
    assert list(select_losses({"embedding_gram": 0.0, "embedding_cosine": 2.0}, "feature-extraction")) == [
        "embedding_cosine"
    ]


def test_losses_of_a_recipe_have_full_names_and_their_own_parameters(logits):
    weights = {"jsd:0.7": 1.0, "skew_kl": 0.5, "jsd:0.2": 1.0, "forward_kl": 1.0}
    found = select_losses(weights, "text-generation")
    assert list(found) == ["forward_kl", "jsd:0.2", "jsd:0.7", "skew_kl:0.1"]
    assert [loss.name for loss in found.values()] == list(found)
    for name, beta in (("jsd:0.2", 0.2), ("jsd:0.7", 0.7)):
        value = found[name].values(logits[0], Dense(logits[1]), MASK)
        assert torch.equal(value, jsd(logits[0], Dense(logits[1]), MASK, beta))


def test_every_loss_says_how_it_takes_each_signal():
    logit_losses = [loss for loss in LOSSES.values() if loss.signal is Dense]
    assert len(logit_losses) == 9
    assert all(loss.takes[Dense].how == "exact" for loss in logit_losses)
    sparse = {loss.name: loss.takes[Sparse].how for loss in logit_losses}
    refused = {"logit_mse", "alpha_beta", "universal_logit"}
    assert {name for name, how in sparse.items() if how == "refused"} == refused
    assert {how for name, how in sparse.items() if name not in refused} == {"lower bound"}
    for text, how in (("alpha_beta:0.3:0.7", "lower bound"), ("alpha_beta:1:0", "lower bound"),
                      ("alpha_beta:1:1", "refused")):  # fmt: skip
        assert select_losses({text: 1.0}, "text-generation")[parse_loss(text).text].takes[Sparse].how == how
    assert all(taken.why for loss in LOSSES.values() for taken in loss.takes.values() if taken.how != "exact")
    assert LOSSES["embedding_gram"].takes[Embedding].how == "exact"
    assert Sparse not in LOSSES["embedding_gram"].takes


def test_losses_that_compare_texts_with_each_other_are_marked():
    """Several processes have to bring their texts together for them."""
    assert {name for name, loss in LOSSES.items() if loss.pairwise} == {"embedding_gram", "contrastive_scores"}
