"""What may be written after ``--to``, and what is said about everything else."""

from __future__ import annotations

import pytest

from edgestill.quantisation import QUANTISATIONS, parse_quantisation

NAMES = [f"{form}:{name}" for form, names in QUANTISATIONS.items() for name in names]


@pytest.mark.parametrize("to", NAMES)
def test_plain_names_are_their_own_canonical_text(to: str) -> None:
    parsed = parse_quantisation(to)
    assert parsed.to == to
    assert parse_quantisation(parsed.to) == parsed


@pytest.mark.parametrize(
    ("to", "nearest"), [("onnx:int5", "int8"), ("gguf:q4_k", "q4_k_m"), ("onx:int4", "onnx"), ("onnx", "fp32")]
)
def test_an_unknown_name_is_refused_with_the_nearest(to: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        parse_quantisation(to)
