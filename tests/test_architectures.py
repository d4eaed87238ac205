"""The table of architectures against the config classes of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgestill.architectures import ARCHITECTURES, complete_config, find_architecture, supported
from edgestill.errors import Unsupported


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    from transformers import AutoConfig

    row = ARCHITECTURES[model_type]
    config = AutoConfig.for_model(model_type)
    assert {key: getattr(config, key) for key in row.defaults} == dict(row.defaults)
    for key in row.refused:
        assert hasattr(config, key), f"{model_type} has no {key}"
        with pytest.raises(Unsupported, match=f"{model_type} with .*{key} = 3"):
            find_architecture({"model_type": model_type, key: 3}, Path("x"))


def test_what_a_gemma3_config_leaves_out_is_what_transformers_puts_in() -> None:
    from transformers import Gemma3TextConfig

    sizes = {"model_type": "gemma3_text", "num_hidden_layers": 13}
    cases: list[dict[str, Any]] = [
        {}, {"sliding_window_pattern": 4}, {"rope_theta": 5e5, "rope_local_base_freq": 7e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}}},
        {"layer_types": ["full_attention"] * 13},
    ]  # fmt: skip
    for given in cases:
        ours = complete_config({**sizes, **given})
        theirs = Gemma3TextConfig(**{**sizes, **given})
        assert ours["layer_types"] == theirs.layer_types
        for kind, rope in theirs.rope_parameters.items():
            assert {key: value for key, value in ours["rope_parameters"][kind].items() if key in rope} == rope
        again = Gemma3TextConfig(**ours)  # what was completed means the same to Transformers
        assert (again.layer_types, again.rope_parameters) == (theirs.layer_types, theirs.rope_parameters)
        assert complete_config(ours) == ours


def test_gpt2_has_an_ffn_of_four_times_its_width_unless_it_says_otherwise() -> None:
    assert complete_config({"model_type": "gpt2", "n_embd": 24, "n_inner": None})["n_inner"] == 96
    assert complete_config({"model_type": "gpt2", "n_embd": 24, "n_inner": 50})["n_inner"] == 50
    assert complete_config({"model_type": "mamba", "n_embd": 24}) == {"model_type": "mamba", "n_embd": 24}


def test_an_unknown_architecture_is_told_all_known_ones() -> None:
    with pytest.raises(Unsupported) as caught:
        find_architecture({"model_type": "gemma3"}, Path("x"))
    assert caught.value.hint == f"supported: {supported()}"
    assert supported().split(", ") == sorted(ARCHITECTURES)
