"""Layout steps against closed forms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgestill.artifact import Histogram, StoredTensor
from edgestill.errors import BadInput, Unsupported
from edgestill.runtimes.payload import PayloadReader, apply_layout, open_payload


def test_steps_are_numpys_own():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(apply_layout(values, [["transpose"]]), values.T)
    np.testing.assert_array_equal(apply_layout(values, [["reshape", 2, 12]]), values.reshape(2, 12))
    np.testing.assert_array_equal(apply_layout(values, [["slice", 0, 1, 3]]), values[1:3])
    np.testing.assert_array_equal(apply_layout(values, [["slice", 1, 2, 6]]), values[:, 2:6])
    assert apply_layout(values, []) is values


def test_steps_apply_in_order():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    got = apply_layout(values, [["transpose"], ["slice", 0, 0, 3], ["reshape", 12]])
    np.testing.assert_array_equal(got, values.T[:3].reshape(12))


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (2, 4), (3, 8), (4, 16)])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_rope_unpermute_puts_each_pair_back_into_its_half(heads, size, rest):
    """llama.cpp's row 2i (2i+1) of a head is Transformers' row i (i + size/2): they rotate together."""
    hf = np.random.default_rng(0).normal(size=(heads * size, *rest)).astype(np.float32)
    stored = np.empty_like(hf)
    for head in range(heads):
        for i in range(size // 2):
            stored[head * size + 2 * i] = hf[head * size + i]
            stored[head * size + 2 * i + 1] = hf[head * size + i + size // 2]
    np.testing.assert_array_equal(apply_layout(stored, [["rope_unpermute", heads]]), hf)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (["transpos"], "unknown layout step 'transpos'.*did you mean 'transpose'"),
        ([], "unknown layout step ''"),
        (["transpose", 1], "does not fit"),
        (["reshape", 5, 5], "24 values"),
        (["reshape", -1, 6], "24 values"),
        (["slice", 2, 0, 1], "outside"),
        (["slice", 0, 0, 5], "outside"),
        (["slice", 0, 3, 3], "outside"),
        (["slice", 0], "does not fit"),
        (["rope_unpermute", 3], "4 rows in 3 heads"),
        (["rope_unpermute", 0], "4 rows in 0 heads"),
        (["rope_unpermute", "x"], "does not fit"),
    ],
)
def test_a_layout_that_does_not_fit_names_tensor_and_step(step, message):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    with pytest.raises(BadInput, match=f"model.q: .*{message}"):
        apply_layout(values, [step], name="model.q")


def test_the_reader_applies_the_layout_to_what_is_stored():
    class Payload:
        def stored(self, tensor):
            return {"w": np.arange(6, dtype=np.float16).reshape(2, 3)}[tensor.stored]

        def histogram(self):
            return {"float16": Histogram(1, 6, 12)}

    reader = PayloadReader(Payload())
    got = reader.decode(StoredTensor("layer.weight", "w", "float16", layout=(("transpose",),)))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, np.arange(6).reshape(2, 3).T)
    assert reader.histogram() == {"float16": Histogram(1, 6, 12)}


def test_an_unknown_format_is_unsupported(tmp_path: Path):
    with pytest.raises(Unsupported, match="torch"):
        open_payload(SimpleNamespace(manifest=SimpleNamespace(format="torch"), path=tmp_path))
