"""Each divergence against references that share no code with it: scipy, torch, double loops, closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from edgestill.distill import divergences as d

# name -> (function of rows, parameters)
ALL = {
    "kl": (d.kl, ()),
    "reverse_kl": (d.reverse_kl, ()),
    "jsd:0": (d.jsd, (0.0,)),
    "jsd:0.1": (d.jsd, (0.1,)),
    "jsd:0.5": (d.jsd, (0.5,)),
    "jsd:1": (d.jsd, (1.0,)),
    "skew_kl:0.1": (d.skew_kl, (0.1,)),
    "skew_reverse_kl:0.1": (d.skew_reverse_kl, (0.1,)),
    "total_variation": (d.total_variation, ()),
    "alpha_beta:1:0": (d.alpha_beta, (1.0, 0.0)),
    "alpha_beta:0:1": (d.alpha_beta, (0.0, 1.0)),
    "alpha_beta:0:0.7": (d.alpha_beta, (0.0, 0.7)),
    "alpha_beta:0.2:0": (d.alpha_beta, (0.2, 0.0)),
    "alpha_beta:0.2:0.7": (d.alpha_beta, (0.2, 0.7)),
    "alpha_beta:0.5:0.5": (d.alpha_beta, (0.5, 0.5)),
    "alpha_beta:1:1": (d.alpha_beta, (1.0, 1.0)),
}


def _alpha_beta_term(p: float, q: float, a: float, b: float) -> float:
    if b == 0:
        return ((a * p**a * math.log(p / q) if p else 0.0) - p**a + q**a) / a**2
    if a == 0:
        return ((b * q**b * math.log(q / p) if q else 0.0) - q**b + p**b) / b**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


def _kl_term(p: float, q: float) -> float:
    return 0.0 if p == 0 else math.inf if q == 0 else p * math.log(p / q)


def _loop(name: str, p: list[float], q: list[float]) -> float:
    """The definition, one token after the other, in Python's floats."""
    kind, *rest = name.split(":")
    numbers = [float(x) for x in rest]
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if kind == "kl":
            total += _kl_term(a, b)
        elif kind == "reverse_kl":
            total += _kl_term(b, a)
        elif kind == "jsd":
            # As TRL's generalised JSD: the ends are special, elsewhere beta weighs the teacher in the mixture.
            beta = numbers[0]
            m = beta * a + (1 - beta) * b
            inside = beta * _kl_term(a, m) + (1 - beta) * _kl_term(b, m)
            total += _kl_term(a, b) if beta == 0 else _kl_term(b, a) if beta == 1 else inside
        elif kind == "skew_kl":
            total += _kl_term(a, numbers[0] * a + (1 - numbers[0]) * b)
        elif kind == "skew_reverse_kl":
            total += _kl_term(b, numbers[0] * b + (1 - numbers[0]) * a)
        elif kind == "total_variation":
            total += abs(a - b) / 2
        else:
            total += _alpha_beta_term(a, b, *numbers)
    return total


def _rows(seed: int = 0, rows: int = 6, size: int = 23, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    chooser = torch.Generator().manual_seed(seed)
    return tuple(
        torch.log_softmax(spread * torch.randn(rows, size, generator=chooser, dtype=torch.float64), -1)
        for _ in range(2)
    )  # type: ignore[return-value]


def _value(name: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    function, parameters = ALL[name]
    return function(teacher, student, *parameters)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_each_is_its_definition_in_a_double_loop(name: str, spread: float) -> None:
    teacher, student = _rows(spread=spread)
    p, q = teacher.exp().tolist(), student.exp().tolist()
    expected = [_loop(name, *pair) for pair in zip(p, q, strict=True)]
    np.testing.assert_allclose(_value(name, teacher, student).numpy(), expected, rtol=1e-9, atol=1e-13)
    single = _value(name, teacher.float(), student.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-6, atol=1e-6)


def test_kl_is_scipy_and_torch() -> None:
    teacher, student = _rows()
    p, q = teacher.exp().numpy(), student.exp().numpy()
    np.testing.assert_allclose(d.kl(teacher, student).numpy(), rel_entr(p, q).sum(-1), rtol=1e-12)
    by_torch = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(d.reverse_kl(teacher, student), by_torch, rtol=1e-12, atol=1e-14)


def test_jsd_is_scipys_squared_distance() -> None:
    teacher, student = _rows()
    expected = jensenshannon(teacher.exp().numpy(), student.exp().numpy(), axis=-1) ** 2
    np.testing.assert_allclose(d.jsd(teacher, student, 0.5).numpy(), expected, rtol=1e-12)


def test_which_end_of_beta_is_which() -> None:
    teacher, student = _rows()
    assert torch.equal(d.jsd(teacher, student, 0.0), d.kl(teacher, student))
    assert torch.equal(d.jsd(teacher, student, 1.0), d.kl(student, teacher))
    # They are the limits of the divergence over beta, and over 1 − beta.
    torch.testing.assert_close(d.jsd(teacher, student, 1e-9) / 1e-9, d.kl(teacher, student), rtol=1e-3, atol=0)
    torch.testing.assert_close(d.jsd(teacher, student, 1 - 1e-9) / 1e-9, d.kl(student, teacher), rtol=1e-3, atol=0)
    # And between them beta weighs the teacher: with beta near 1 the mixture is nearly the teacher.
    torch.testing.assert_close(d.jsd(teacher, student, 0.3), d.jsd(student, teacher, 0.7))


def test_special_cases_of_the_alpha_beta_divergence() -> None:
    teacher, student = _rows()
    p, q = teacher.exp(), student.exp()
    for parameters, expected in {
        (1.0, 0.0): d.kl(teacher, student),
        (0.0, 1.0): d.kl(student, teacher),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
        (1.0, 1.0): 0.5 * (p - q).square().sum(-1),
        (2.0, 0.0): (p.square() * (p / q).log() / 2 - p.square() / 4 + q.square() / 4).sum(-1),
        # alpha + beta = 1 is the alpha-divergence
        (0.3, 0.7): (1 - (p**0.3 * q**0.7).sum(-1)) / (0.3 * 0.7),
    }.items():
        torch.testing.assert_close(d.alpha_beta(teacher, student, *parameters), expected, rtol=1e-10, atol=1e-13)
    # It goes over into its limits.
    for near, limit in (((0.7, 1e-7), (0.7, 0.0)), ((1e-7, 0.7), (0.0, 0.7))):
        torch.testing.assert_close(
            d.alpha_beta(teacher, student, *near), d.alpha_beta(teacher, student, *limit), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("name", ALL)
def test_equal_distributions_have_none_and_others_some(name: str) -> None:
    teacher, student = _rows(spread=1.0)
    assert float(_value(name, teacher, teacher.clone()).abs().max()) < 1e-14
    assert float(_value(name, teacher, student).min()) > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_differences(name: str) -> None:
    teacher, _ = _rows(rows=3, size=7, spread=1.0)
    chooser = torch.Generator().manual_seed(9)
    logits = torch.randn(3, 7, generator=chooser, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _value(name, teacher, torch.log_softmax(x, -1)), logits)


@pytest.mark.parametrize("name", ALL)
def test_what_has_probability_zero_is_exact_and_has_a_finite_gradient(name: str) -> None:
    teacher, student = _rows(rows=4, spread=1.0)
    gone = torch.zeros_like(teacher, dtype=torch.bool)
    gone[0, 3] = gone[1, [2, 5]] = True
    theirs, ours = gone.clone(), gone.clone()
    if name in ("jsd:0.1", "jsd:0.5", "skew_kl:0.1", "skew_reverse_kl:0.1", "total_variation", "alpha_beta:0.2:0.7",
                "alpha_beta:0.5:0.5", "alpha_beta:1:1"):  # fmt: skip
        theirs[2, 1], ours[2, 4] = True, True  # finite even where only one of them is 0
    logits = student.masked_fill(ours, -math.inf).requires_grad_()
    q_log, p_log = torch.log_softmax(logits, -1), torch.log_softmax(teacher.masked_fill(theirs, -math.inf), -1)
    found = _value(name, p_log, q_log)
    pairs = zip(p_log.exp().tolist(), q_log.detach().exp().tolist(), strict=True)
    np.testing.assert_allclose(found.detach().numpy(), [_loop(name, *pair) for pair in pairs], rtol=1e-9, atol=1e-14)
    found.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[ours] == 0).all())


@pytest.mark.parametrize("name", ["kl", "jsd:0", "alpha_beta:1:0", "alpha_beta:0.2:0"])
def test_ruling_out_what_the_teacher_says_is_infinite(name: str) -> None:
    teacher, student = _rows(rows=2)
    student[1, 3] = -math.inf
    found = _value(name, teacher, student)
    assert math.isfinite(float(found[0]))
    assert float(found[1]) == math.inf


@pytest.mark.parametrize("name", ["reverse_kl", "jsd:1", "alpha_beta:0:1", "alpha_beta:0:0.7"])
def test_saying_what_the_teacher_rules_out_is_infinite(name: str) -> None:
    teacher, student = _rows(rows=2)
    teacher[1, 3] = -math.inf
    found = _value(name, teacher, student)
    assert math.isfinite(float(found[0]))
    assert float(found[1]) == math.inf


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_nan(name: str, side: int) -> None:
    rows = _rows(rows=2)
    rows[side][1, 3] = math.nan
    found = _value(name, *rows)
    assert math.isfinite(float(found[0]))
    assert math.isnan(float(found[1]))


def test_bounds() -> None:
    apart = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert float(d.total_variation(*apart)) == 1.0
    assert float(d.jsd(*apart, 0.5)) == pytest.approx(math.log(2))
    assert float(d.skew_kl(*apart, 0.1)) == pytest.approx(-math.log(0.1))
    assert float(d.skew_reverse_kl(*apart, 0.2)) == pytest.approx(-math.log(0.2))
    assert float(d.alpha_beta(*apart, 0.5, 0.5)) == pytest.approx(4.0)
