"""Compressed constants: what we write, read by coremltools' own loader and decoded by its own operations."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgestill.checkpoints import open_model
from edgestill.errors import RecipeError, Unsupported, UsageError
from edgestill.export import coreml_package
from edgestill.export.coreml_compress import compressible, fitting
from edgestill.export.coreml_target import choose
from edgestill.quantisation_coreml import parse
from edgestill.recipe import ExportConfig
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import import_coremltools, load_program
from edgestill.runtimes.payload_coreml import grid_of, histogram, stored_weights, weight_values

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_t(4, size=(48, 64)).astype(np.float16)
TABLE = RNG.normal(size=(50, 64)).astype(np.float16)


@pytest.fixture(scope="module")
def sources() -> dict[int, Any]:
    """A program with an embedding and a linear layer, for each system."""
    ct = import_coremltools()
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  the name of MIL's builder everywhere
    from coremltools.converters.mil.mil import types

    made = {}
    for ios in (16, 17, 18):
        target = getattr(ct.target, f"iOS{ios}")

        @mb.program(input_specs=[mb.TensorSpec((1, 5), dtype=types.int32)], opset_version=target)
        def function(ids: Any) -> Any:
            rows = mb.gather(x=mb.const(val=TABLE, name="table"), indices=ids, axis=0)
            small = mb.const(val=np.arange(64).astype(np.float16), name="small")
            return mb.linear(x=mb.add(x=rows, y=small), weight=mb.const(val=WEIGHT, name="weight"), name="out")

        made[ios] = ct.convert(
            function, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,
        )  # fmt: skip
    return made


def _written(source: Any, package: Path, plan: dict[str, str]) -> list[Any]:
    copy = package.parent / f"{package.name}.copy"
    shutil.copytree(source.package_path, copy)
    model = SimpleNamespace(
        get_spec=lambda: type(source.get_spec()).FromString(source.get_spec().SerializeToString()),
        package_path=str(copy), weights_dir=source.weights_dir,
    )  # fmt: skip
    chosen = {name: parse(how) for name, how in plan.items()}
    return coreml_package.write_package(model, package, description="test", license=None, plan=chosen)


def _decoded(package: Path, ios: int) -> dict[str, Any]:
    """The weights as coremltools' own operations decode them."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models.utils import load_spec

    weights = package / "Data/com.apple.CoreML/weights"
    program = load(load_spec(str(package)), {16: 7, 17: 8, 18: 9}[ios], str(weights))
    return {
        op.outputs[-1].name: op.materialized_val_inference()
        for op in program.functions["main"].operations
        if op.op_type.startswith("constexpr_")
    }


CASES = [
    *[(ios, how) for ios in (16, 17) for how in ("int8", "pal8", "pal6", "pal4", "pal2", "sparse50", "sparse37")],
    *[
        (18, how)
        for how in (
            "int8", "int8-b16", "int4", "int4-b16", "pal8", "pal6", "pal4", "pal3", "pal2", "pal4-g8", "pal3-g16",
            "sparse50", "sparse90", "sparse50-int8", "sparse50-int4-b16", "sparse50-pal4", "sparse37-pal3-g16",
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("ios", "how"), CASES)
def test_bit_equal_to_coremltools(sources: dict[int, Any], ios: int, how: str, tmp_path: Path) -> None:
    package = tmp_path / "model.mlpackage"
    assert _written(sources[ios], package, {"weight": how}) == []
    program = load_program(package)
    stored = dict(stored_weights(program))
    ours = weight_values(stored["weight"], program)
    theirs = _decoded(package, ios)["weight"]
    np.testing.assert_array_equal(ours, theirs)
    interpreter = Interpreter(program)
    np.testing.assert_array_equal(interpreter._constants["weight"], ours)
    grid = grid_of(stored["weight"], program)
    wanted = {"int8": "int8-channel", "int4": "int4-b32"}
    inner = how.partition("-")[2] if how.startswith("sparse") else how
    assert grid.endswith(wanted.get(inner, inner))
    row = histogram(program)[grid]
    assert (row.tensors, row.parameters) == (1, WEIGHT.size)
    assert 0 < row.size_bytes < WEIGHT.nbytes
    ids = np.array([[0, 49, 3, 3, 7]])
    got = interpreter.run({next(iter(program.inputs)): ids})["out"]
    want = (TABLE[ids].astype(np.float32) + np.arange(64)) @ ours.T
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1)  # inputs to 64, rounded to float16


@pytest.mark.parametrize("how", ["int4", "sparse50-pal4"])
def test_the_same_bytes_again_and_nothing_else_changed(sources: dict[int, Any], how: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _written(sources[18], tmp_path / name / "model.mlpackage", {"weight": how})
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file() and ".copy" not in str(p)) for name in "ab"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    program = load_program(tmp_path / "a/model.mlpackage")
    np.testing.assert_array_equal(program.constants["table"].value, TABLE)
    assert compressible(sources[18].get_spec()) == {"weight", "table"}


def test_what_does_not_fit_falls_back_and_says_so(sources: dict[int, Any], tmp_path: Path) -> None:
    assert [fitting(*pair) for pair in ((64, 32), (48, 32), (50, 16), (47, 32), (64, 0))] == [32, 24, 10, 0, 0]
    fallbacks = _written(sources[18], tmp_path / "m.mlpackage", {"weight": "pal4-g32", "table": "pal4-g16"})
    assert {(one.name, one.stored) for one in fallbacks} == {("weight", "pal4-g24"), ("table", "pal4-g10")}
    program = load_program(tmp_path / "m.mlpackage")
    assert set(histogram(program)) == {"pal4-g10", "pal4-g24", "float16"}
    [one] = _written(sources[18], tmp_path / "n.mlpackage", {"weight": "int4-b128"})
    assert one.stored == "int4-b64"
    assert "blocks of 128 do not divide rows of 64" in one.reason


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "coreml:int4", "min_target": "iOS17"}, Unsupported, "weights as int4 needs iOS 18, .* asks for iOS17"),
        ({"to": "coreml:fp16", "shapes": [16, 32], "min_target": "iOS16"}, Unsupported, "enumerated .* needs iOS 18"),
        ({"to": "coreml:fp16", "shapes": 32}, Unsupported, "a single fixed length is not written yet"),
        ({"to": "coreml:fp16", "shapes": [8, 65]}, UsageError, "a length of 65 is more than the 64 tokens"),
    ],
)  # fmt: skip
def test_targets_that_are_too_old(tiny_bert: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        choose(open_model(tiny_bert), ExportConfig(**options), 64, {})


def test_targets(tiny_bert: Path, tiny_llama: Path) -> None:
    bert, llama = open_model(tiny_bert), open_model(tiny_llama)
    assert choose(bert, ExportConfig(to="coreml:int8"), 64, {}).ios == 16
    assert choose(bert, ExportConfig(to="coreml:int8", min_target="iOS17"), 64, {}).ios == 17
    assert choose(bert, ExportConfig(to="coreml:int8"), 64, {"a": "int4"}).ios == 18
    enumerated = choose(bert, ExportConfig(to="coreml:fp16", shapes=[32, 8]), 64, {})
    assert (enumerated.shapes, enumerated.lengths, enumerated.ios) == ("enumerated", (8, 32), 18)
    assert choose(llama, ExportConfig(to="coreml:fp16"), 64, {}).ios == 18
    with pytest.raises(Unsupported, match=r"states.* needs iOS 18"):
        choose(llama, ExportConfig(to="coreml:fp16", min_target="iOS16"), 64, {})
    with pytest.raises(Unsupported, match="takes any length"):
        choose(llama, ExportConfig(to="coreml:fp16", shapes=32), 64, {})
    with pytest.raises(RecipeError, match="unknown quantisation 'int7'"):
        choose(bert, ExportConfig(to="coreml:fp16"), 64, {"a": "int7"})
