"""The reader of packages against coremltools' own (a canary for its internals), and on damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.errors import BadInput, Unsupported
from edgestill.runtimes import milproto
from edgestill.runtimes.milproto import load_program, model_file

RNG = np.random.default_rng(0)
BIG = RNG.normal(size=(64, 32)).astype(np.float32)


def _body(mb: Any, x: Any) -> Any:
    half = mb.cast(x=mb.add(x=x, y=BIG[0]), dtype="fp16")
    return mb.linear(x=half, weight=BIG.astype(np.float16), name="out")


def test_canary_same_program_as_coremltools_reads(save: Any) -> None:
    package = save(_body, ((4, 32), "float32"))
    ours = load_program(package)
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString(model_file(package).read_bytes())
    theirs = load(model, model.specificationVersion, str(model_file(package).parent / "weights")).functions["main"]
    operations = [op for op in theirs.operations if op.op_type != "const"]
    assert [op.kind for op in ours.operations] == [op.op_type for op in operations]
    assert ours.outputs == tuple(out.name for out in theirs.outputs)
    assert {n: t.shape for n, t in ours.inputs.items()} == {n: tuple(v.shape) for n, v in theirs.inputs.items()}
    constants = {op.outputs[0].name: op.outputs[0].val for op in theirs.operations if op.op_type == "const"}
    assert set(ours.constants) == set(constants)
    for name, constant in ours.constants.items():
        assert np.array_equal(constant.value, constants[name]), name


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "float16", "float32", "int4", "uint4", "uint2", "uint1"]
)
def test_canary_blob_layout(tmp_path: Path, dtype: str) -> None:
    """Every type, written by coremltools' native writer, read by us."""
    milproto.import_coremltools()
    from coremltools import libmilstoragepython as storage
    from coremltools.proto import MIL_pb2

    bits = {"int4": 4, "uint4": 4, "uint2": 2, "uint1": 1}.get(dtype)
    low, high = (-8, 8) if dtype == "int4" else (0, 1 << (bits or 6))
    values = RNG.integers(low, high, 37).astype("int8" if dtype == "int4" else "uint8" if bits else dtype)
    (tmp_path / "weights").mkdir()
    writer = storage._BlobStorageWriter(str(tmp_path / "weights" / "weight.bin"))
    if dtype == "float16":
        offset = writer.write_fp16_data(values.view(np.uint16))
    elif dtype == "float32":
        offset = writer.write_float_data(values)
    else:
        offset = getattr(writer, f"write_{dtype}_data")(values)
    del writer
    reader = milproto._Reader(tmp_path / "model.mlmodel", MIL_pb2)
    got, size = reader._blob("@model_path/weights/weight.bin", offset, dtype, (37,))
    np.testing.assert_array_equal(got, values)
    assert size == -(-37 * (bits or values.dtype.itemsize * 8) // 8)


def test_damaged_packages(save: Any, tmp_path: Path) -> None:
    package = save(_body, ((4, 32), "float32"))
    weights = model_file(package).parent / "weights" / "weight.bin"
    whole = weights.read_bytes()
    for damage, message in (
        (whole[:32], "missing or empty"),
        (whole[:100], "beyond the end|do not hold"),
        (whole[:64] + bytes(4) + whole[68:], "no weight begins there"),
        (whole[:68] + b"\x03" + whole[69:], "stored as uint8"),
        (whole[:72] + b"\xff" * 8 + whole[80:], "do not hold"),
        (whole[:80] + b"\xff" * 8 + whole[88:], "do not hold"),
    ):
        weights.write_bytes(damage)
        with pytest.raises(BadInput, match=message):
            load_program(package)
    weights.unlink()
    with pytest.raises(BadInput, match="missing or empty"):
        load_program(package)
    weights.write_bytes(whole)
    assert load_program(package).outputs == ("out",)

    model = model_file(package)
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="not a Core ML model"):
        load_program(package)
    model.write_bytes(b"")
    with pytest.raises(Unsupported, match="no ML program"):
        load_program(package)
    model.unlink()
    with pytest.raises(BadInput, match="does not exist"):
        load_program(package)


def test_manifest_can_not_lead_outside(save: Any, tmp_path: Path) -> None:
    package = save(_body, ((4, 32), "float32"))
    manifest = package / "Manifest.json"
    raw = json.loads(manifest.read_text())
    raw["itemInfoEntries"][raw["rootModelIdentifier"]]["path"] = "../../evil.mlmodel"
    manifest.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="unsafe path"):
        load_program(package)
    manifest.write_text("{}")
    with pytest.raises(BadInput, match="names no model"):
        load_program(package)


def test_another_major_version_of_coremltools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milproto, "coremltools_version", lambda: "10.1")
    with pytest.raises(Unsupported, match=r"coremltools 10\.1 is installed, edgestill knows 9\.x"):
        milproto.import_coremltools()
