from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.distill.batches import Examples
from edgestill.distill.depth import cut_layers
from edgestill.distill.layer_maps import learn_layer_map, linear_cka, map_layers, match_layers
from edgestill.errors import RecipeError


def _examples() -> Examples:
    chooser = torch.Generator().manual_seed(5)
    ids = tuple(tuple(torch.randint(5, 40, (n,), generator=chooser).tolist()) for n in (3, 9, 5, 12, 7, 14, 11, 6) * 4)
    return Examples(ids, (-100,) * len(ids))


def test_cka_is_its_definition_in_features() -> None:
    chooser = np.random.default_rng(0)
    x, y = chooser.normal(size=(30, 5)), chooser.normal(size=(30, 8))
    y[:, :5] += x
    cx, cy = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(cy.T @ cx) ** 2 / (np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-12)
    turned, _ = np.linalg.qr(chooser.normal(size=(5, 5)))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(3 * x @ turned + 7)) == pytest.approx(1.0)
    assert linear_cka(torch.ones(30, 5), torch.from_numpy(y)) == 0.0
    assert 0.0 < linear_cka(torch.from_numpy(x), torch.from_numpy(y)) < 1.0


@pytest.mark.parametrize("seed", range(5))
def test_the_match_is_the_best_of_all(seed: int) -> None:
    likeness = np.random.default_rng(seed).random((3, 6))
    best = max(itertools.combinations(range(6), 3), key=lambda c: sum(likeness[row, c[row]] for row in range(3)))
    assert match_layers(likeness.tolist()) == best
    with pytest.raises(RecipeError, match="3 layers can't each imitate another of 2"):
        match_layers(likeness[:, :2].tolist())


def test_a_student_of_the_first_layers_finds_them(build: Callable[[str], Any]) -> None:
    """Its states are the teacher's, so that their likeness is 1; every family's base model is asked the same way."""
    for name in ("bert", "distilbert", "llama"):
        teacher, student = build(name), build(name)
        cut_layers(student, [0, 1])
        assert learn_layer_map(student, teacher, _examples()) == (0, 1), name


def test_a_narrower_student_is_mapped_too(build: Callable[[str], Any]) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=24,
                        num_hidden_layers=3, initializer_range=0.2)  # fmt: skip
    student = BertModel(config, add_pooling_layer=False).eval()
    teacher = build("bert")
    found = learn_layer_map(student, teacher, _examples())
    assert len(found) == 3
    assert list(found) == sorted(set(found))
    assert found == learn_layer_map(student, teacher, _examples())  # a resumed run finds the same
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ([0, 1], "names 2 layers, the student has 3"),
        ([0, 1, 6], "names layer 6, the teacher has layers 0 to 5"),
        ([], "names 0 layers, the student has 3"),
        ("first", "unknown layer_map 'first'"),
    ],
)
def test_a_map_that_names_no_layer_is_one_clear_line(how: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        map_layers(how, (0, 2, 5), 6)
