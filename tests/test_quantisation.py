"""What may be written after ``--to``, and what is said about everything else."""

from __future__ import annotations

import pytest

from edgestill.quantisation import QUANTISATIONS, Budget, parse_quantisation
from edgestill.recipe import ExportConfig

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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4-asym-b32", "int4-b32-asym"), ("int4-gptq-b64", "int4-b64-gptq"), ("int8-pure-sym", "int8-sym-pure"),
        ("int4-sym-b16-pure", "int4-b16-sym-pure"), ("int8-asym", "int8-asym"),
    ],
)  # fmt: skip
def test_two_spellings_of_an_onnx_quantisation_are_one(text: str, name: str) -> None:
    parsed = parse_quantisation(f"onnx:{text}")
    assert parsed.name == name
    assert parse_quantisation(parsed.to) == parsed


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("onnx:int4-b48", "16, 32, 64, 128"), ("onnx:int4-hqq", "unknown"), ("onnx:int4-b16-b32", "two options"),
        ("onnx:int4-gptq-gptq", "two options"), ("onnx:fp16-b32", "unknown"), ("onnx:bf16", "bfloat16"),
    ],
)  # fmt: skip
def test_an_option_that_means_nothing_is_refused(to: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_quantisation(to)


@pytest.mark.parametrize(
    ("to", "canonical", "size"),
    [
        ("gguf@60MB", "gguf@60MB", 60_000_000), ("onnx@0.06 gb", "onnx@60MB", 60_000_000),
        ("coreml@60MiB", "coreml@60MiB", 62_914_560), ("gguf@62.91456MB", "gguf@60MiB", 62_914_560),
        ("gguf@2GiB", "gguf@2048MiB", 1 << 31), ("gguf@1.5MB", "gguf@1.5MB", 1_500_000),
        ("gguf@1048.576MB", "gguf@1000MiB", 1_048_576_000),
    ],
)  # fmt: skip
def test_a_size_in_place_of_a_type(to: str, canonical: str, size: int) -> None:
    parsed = parse_quantisation(to)
    assert isinstance(parsed, Budget)
    assert (parsed.to, parsed.budget_bytes, parsed.base) == (canonical, size, "budget")
    assert parse_quantisation(parsed.to) == parsed
    assert ExportConfig(to=to).variant == canonical.replace("@", "-")


@pytest.mark.parametrize("to", ["gguf@", "gguf@60", "gguf@60KB", "gguf@0MB", "gguf@-1MB", "gguf@1e3MB", "gguf@0.6x",
                                "gguf@9999999GB", "gguf:q4_0@60MB"])  # fmt: skip
def test_what_is_not_a_size_is_refused(to: str) -> None:
    with pytest.raises(ValueError, match=r"size|q4_0"):
        parse_quantisation(to)
