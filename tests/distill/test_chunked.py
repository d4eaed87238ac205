from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgestill.distill.chunked import chunked_head
from edgestill.distill.losses import cross_entropy, forward_kl
from edgestill.distill.signal import Dense, Labels
from edgestill.errors import Unsupported

N, D, V = 11, 6, 23


def _setting(bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return hidden, head, 2 * torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,))


def _losses(logits: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.ones(len(logits), dtype=torch.bool)
    kl = forward_kl(logits, Dense(teacher, 2.0), every).sum() / N
    entropy = cross_entropy(logits, Labels(ids), every).sum() / N
    return 0.9 * kl + 0.1 * entropy, torch.stack([kl, entropy])


@pytest.mark.parametrize("rows", [1, 3, 7, N, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_dense_value_and_gradient(rows, bias):
    hidden, head, teacher, ids = _setting(bias)
    value, parts = chunked_head(hidden, head, lambda x, a, b: _losses(x, teacher[a:b], ids[a:b]), rows)
    found = torch.autograd.grad(3 * value, [hidden, *head.parameters()])
    dense, dense_parts = _losses(head(hidden), teacher, ids)
    expected = torch.autograd.grad(3 * dense, [hidden, *head.parameters()])
    torch.testing.assert_close(value, dense)
    torch.testing.assert_close(parts, dense_parts)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 3, 7, N])
def test_gradcheck(rows):
    hidden, head, teacher, ids = _setting()

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        copy = nn.Linear(D, V, bias=False).double()
        del copy.weight
        copy.weight = weight  # a plain tensor, so that gradcheck's own copy is differentiated
        return chunked_head(hidden, copy, lambda x, a, b: _losses(x, teacher[a:b], ids[a:b]), rows)[0]

    weight = head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (hidden, weight))


def test_no_rows_are_zero_with_a_gradient():
    hidden, head, teacher, ids = _setting()
    value, parts = chunked_head(hidden[:0], head, lambda x, a, b: _losses(x, teacher[a:b], ids[a:b]))
    value.backward()
    assert float(value.detach()) == 0.0
    assert parts.tolist() == [0.0, 0.0]
    assert float(head.weight.grad.abs().sum()) == 0.0


def test_a_frozen_head_costs_no_gradient():
    hidden, head, teacher, ids = _setting()
    head.requires_grad_(False)
    value, _ = chunked_head(hidden, head, lambda x, a, b: _losses(x, teacher[a:b], ids[a:b]), 4)
    value.backward()
    assert head.weight.grad is None
    assert float(hidden.grad.abs().sum()) > 0


def test_an_unknown_head_is_refused():
    with pytest.raises(Unsupported, match="Sequential"):
        chunked_head(torch.zeros(1, 2), nn.Sequential(), lambda x, a, b: (x.sum(), x.sum()[None]))
