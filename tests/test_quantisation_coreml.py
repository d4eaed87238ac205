"""The language of Core ML's weights."""

from __future__ import annotations

import pytest

from edgestill.quantisation_coreml import parse
from edgestill.recipe import ExportConfig


@pytest.mark.parametrize(
    ("name", "canonical", "bits", "block", "group", "sparsity", "palette", "ios"),
    [
        ("fp32", "fp32", 32, 0, 0, 0, False, 16),
        ("int8", "int8", 8, 0, 0, 0, False, 16),
        ("int8-b64", "int8-b64", 8, 64, 0, 0, False, 18),
        ("int4", "int4", 4, 32, 0, 0, False, 18),
        ("int4-b32", "int4", 4, 32, 0, 0, False, 18),
        ("int4-b16", "int4-b16", 4, 16, 0, 0, False, 18),
        ("pal4", "pal4", 4, 0, 0, 0, True, 16),
        ("pal3", "pal3", 3, 0, 0, 0, True, 18),
        ("pal6-g8", "pal6-g8", 6, 0, 8, 0, True, 18),
        ("sparse75", "sparse75", 16, 0, 0, 75, False, 16),
        ("sparse50-int4-b32", "sparse50-int4", 4, 32, 0, 50, False, 18),
        ("sparse50-pal4-g16", "sparse50-pal4-g16", 4, 0, 16, 50, True, 18),
    ],
)
def test_names(
    name: str, canonical: str, bits: int, block: int, group: int, sparsity: int, palette: bool, ios: int
) -> None:
    one = parse(name)
    assert (one.name, one.bits, one.block, one.group, one.sparsity, one.palette, one.ios) == (
        canonical, bits, block, group, sparsity, palette, ios,
    )  # fmt: skip
    assert parse(one.name) == one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int5", "unknown quantisation"), ("pal5", "unknown quantisation"), ("int4-g16", "is -bN"),
        ("pal4-b16", "is -gN"), ("sparse100", "unknown"), ("sparse50-fp16", "unknown"), ("sparse0", "unknown"),
        ("int4-b0", "unknown"), ("", "unknown"),
    ],
)  # fmt: skip
def test_refusals(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_keys_that_only_core_ml_has() -> None:
    assert ExportConfig(to="coreml:int4", shapes=[32, 128], min_target="iOS18").shapes == [32, 128]
    assert ExportConfig(to="coreml:int4-b32").to == "coreml:int4"
    with pytest.raises(ValueError, match="shapes is for coreml; onnx:int8 takes any length"):
        ExportConfig(to="onnx:int8", shapes=128)
    with pytest.raises(ValueError, match="min_target is for coreml"):
        ExportConfig(to="gguf:f16", min_target="iOS18")
    with pytest.raises(ValueError, match="at least two lengths"):
        ExportConfig(to="coreml:fp16", shapes=[128])


@pytest.mark.parametrize(
    ("name", "size"),
    [("fp32", 4), ("fp16", 2), ("int8", 1.01), ("int4", 0.5625), ("pal4", 0.5), ("sparse50", 1.125),
     ("sparse50-pal4", 0.375)],
)  # fmt: skip
def test_bytes_of_a_weight(name: str, size: float) -> None:
    assert parse(name).bytes_per_weight == pytest.approx(size)
