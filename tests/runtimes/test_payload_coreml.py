"""Reading weights back from a program: grids, histogram, and claims that the file does not keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Histogram, StoredTensor
from edgestill.errors import BadInput, Unsupported
from edgestill.runtimes import payload_coreml
from edgestill.runtimes.mil.program import Constant, Operation, Program, ValueType
from edgestill.runtimes.payload_coreml import CoremlPayload, histogram, weight_values

RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(4, 8)).astype(np.float16)
CODES = RNG.integers(-127, 128, (6, 32)).astype(np.int8)
SCALES = RNG.uniform(0.01, 0.1, (6, 1)).astype(np.float16)


def _constant(array: Any, stored: int = 0) -> Constant:
    return Constant(ValueType(str(array.dtype), array.shape), array, stored)


@pytest.fixture
def program() -> Program:
    constants = {
        "floats": _constant(FLOATS, FLOATS.nbytes),
        "codes": _constant(CODES, CODES.nbytes),
        "scales": _constant(SCALES, SCALES.nbytes),
        "shape": _constant(np.array([1, -1], np.int32)),
    }
    weight = Operation(
        "constexpr_blockwise_shift_scale", "w", {"data": ("codes",), "scale": ("scales",)},
        (("w", ValueType("float16", (6, 32))),),
    )  # fmt: skip
    return Program({}, {}, constants, (weight,), ("w",))


def test_histogram_counts_weights_by_grid(program: Program) -> None:
    assert histogram(program) == {
        "float16": Histogram(1, 32, 64),
        "int8-channel": Histogram(1, 6 * 32, 6 * 32 + 6 * 2),  # codes and one float16 scale a row
    }


def test_stored_values(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_coreml, "load_program", lambda path: program)
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(entry="model.mlpackage"), entry="model.mlpackage")
    payload = CoremlPayload(artifact)
    np.testing.assert_array_equal(payload.stored(StoredTensor("a", "floats", "float16")), FLOATS.astype(np.float32))
    want = (CODES * SCALES.astype(np.float32)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(payload.stored(StoredTensor("b", "w", "int8-channel")), want)
    assert payload.histogram() == histogram(program)
    with pytest.raises(BadInput, match="floats should be int8-channel, the file has float16"):
        payload.stored(StoredTensor("a", "floats", "int8-channel"))
    with pytest.raises(BadInput, match="gone should be float16, the file has no such tensor"):
        payload.stored(StoredTensor("a", "gone", "float16"))
    with pytest.raises(BadInput, match="codes should be int8, the file has no such tensor"):
        payload.stored(StoredTensor("a", "codes", "int8"))  # only what operations compute with is a weight


def test_unknown_compression_is_refused() -> None:
    result = (("w", ValueType("float16", (6, 32))),)
    strange = Operation("constexpr_made_up", "w", {"indices": (_constant(CODES),)}, result)
    with pytest.raises(Unsupported, match="no grid for constexpr_made_up"):
        weight_values(strange, Program({}, {}, {}, (strange,), ("w",)))
    odd = Operation(
        "constexpr_blockwise_shift_scale", "w",
        {"data": (_constant(CODES),), "scale": (_constant(np.ones((3, 1), np.float16)),)}, result,
    )  # fmt: skip
    with pytest.raises(Unsupported, match=r"scales \[3, 1\] for weights \[6, 32\]"):
        weight_values(odd, Program({}, {}, {}, (odd,), ("w",)))
