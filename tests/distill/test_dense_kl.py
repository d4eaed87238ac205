from __future__ import annotations

import pytest
import torch

from edgestill.distill import divergences
from edgestill.distill.dense_kl import dense_forward_kl


def block(seed: int, *, scale: float = 3.0, rows: int = 7, size: int = 23) -> torch.Tensor:
    chooser = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, size, generator=chooser, dtype=torch.float64)


def by_autograd(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    return divergences.kl(*(torch.log_softmax(logits / temperature, -1) for logits in (teacher, student)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_are_those_of_torchs_kl_div(temperature):
    teacher, student = block(1), block(2).requires_grad_()
    found = dense_forward_kl(teacher, student, temperature)
    reference = torch.nn.functional.kl_div(
        torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad((found * weights).sum(), student)
    (theirs,) = torch.autograd.grad((reference * weights).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda logits: dense_forward_kl(teacher, logits, temperature), (student,))


def test_a_small_divergence_over_a_large_vocabulary_is_exact_in_fp32():
    teacher = block(3, rows=4, size=49_152)
    student = teacher + 0.01 * block(4, scale=1.0, rows=4, size=49_152)
    exact = by_autograd(teacher.float().double(), student.float().double(), 1.0)
    assert float(exact.max()) < 1e-3
    found = dense_forward_kl(teacher.float(), student.float())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-7)


def test_what_both_rule_out_adds_nothing_and_pulls_at_nothing():
    teacher, student = block(5), block(6)
    for logits in (teacher, student):
        logits[:, 3] = -torch.inf
    student.requires_grad_()
    found = dense_forward_kl(teacher, student)
    rest = [index for index in range(23) if index != 3]
    torch.testing.assert_close(found, dense_forward_kl(teacher[:, rest], student.detach()[:, rest]))
    found.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert float(student.grad[:, 3].abs().max()) == 0


def test_what_only_the_student_rules_out_is_infinite():
    teacher, student = block(7), block(8)
    student[2, 5] = -torch.inf
    found = dense_forward_kl(teacher, student)
    assert torch.isinf(found[2])
    assert torch.isfinite(found[[0, 1, 3, 4, 5, 6]]).all()


def test_nan_stays_nan_and_no_row_is_no_value():
    teacher, student = block(9), block(10)
    teacher[1, 1] = torch.nan
    student[4, 0] = torch.nan
    assert torch.isnan(dense_forward_kl(teacher, student)).tolist() == [False, True, False, False, True, False, False]
    assert dense_forward_kl(teacher[:0], student[:0]).shape == (0,)
