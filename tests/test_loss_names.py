from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.errors import RecipeError
from edgestill.loss_names import LOSS_NAMES, LossSpec, parse_loss


def test_parameters_that_are_left_out_have_their_defaults() -> None:
    assert parse_loss("forward_kl") == LossSpec("forward_kl")
    assert parse_loss("jsd") == parse_loss("jsd:0.5") == LossSpec("jsd", (0.5,))
    assert parse_loss("alpha_beta:1") == LossSpec("alpha_beta", (1.0, 0.7))
    assert parse_loss("alpha_beta:.30:7e-1").text == "alpha_beta:0.3:0.7"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("forwrd_kl", "unknown loss 'forwrd_kl'", "did you mean 'forward_kl'?"),
        ("skw_kl:0.1", "unknown loss 'skw_kl:0.1'", "did you mean 'skew_kl'?"),
        ("", "unknown loss ''", "known: alpha_beta"),
        ("forward_kl:2", "forward_kl takes 0 parameters, got 1", "write forward_kl"),
        ("jsd:0.1:0.2", "jsd takes 1 parameters (beta), got 2", "e.g. jsd:0.5 (beta: 0 to 1)"),
        ("jsd:1.01", "beta of jsd is 1.01, allowed: 0 to 1", "e.g. jsd:0.5"),
        ("jsd:-0.1", "beta of jsd is -0.1, allowed: 0 to 1", ""),
        ("jsd:nan", "beta of jsd is no number: 'nan'", ""),
        ("jsd:", "beta of jsd is no number: ''", ""),
        ("jsd: 0.5", "beta of jsd is no number: ' 0.5'", ""),
        ("skew_kl:1", "alpha of skew_kl is 1, allowed: 0 to below 1", ""),
        ("alpha_beta:0:0", "alpha_beta: alpha and beta are both 0", "e.g. alpha_beta:0.2:0.7"),
        ("jsd:1e999", "beta of jsd is 1e999, allowed: 0 to 1", ""),
    ],
)
def test_mistakes_are_one_line_that_says_what_would_be_right(text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_loss(text)
    assert caught.value.message == message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_written_name_is_read_back(name: str) -> None:
    spec = parse_loss(name)
    assert spec.name == name
    assert LOSS_NAMES[name].written == spec.text
    assert parse_loss(spec.text) == spec
    assert len(spec.parameters) == len(LOSS_NAMES[name].parameters)


@given(st.floats(0, 1))
def test_every_beta_is_read_back_to_the_last_bit(beta: float) -> None:
    assert parse_loss(LossSpec("jsd", (beta,)).text).parameters == (beta,)
