"""A package of several functions that share their weights, written by coremltools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.errors import BadInput
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import function_names, import_coremltools, load_program

WEIGHT = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)


def test_each_function_opens(save: Any, tmp_path: Path) -> None:
    ct = import_coremltools()

    def body(mb: Any, x: Any) -> Any:
        return mb.linear(x=x, weight=WEIGHT, name="out")

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, rows in (("prefill", 16), ("decode", 1)):
        descriptor.add_function(str(save(body, ((rows, 64), "float32"))), "main", name)
    descriptor.default_function_name = "prefill"
    package = tmp_path / "two.mlpackage"
    ct.utils.save_multifunction(descriptor, str(package))
    assert function_names(package) == ("prefill", "decode")
    weights = next(package.rglob("weight.bin")).stat().st_size
    assert WEIGHT.nbytes <= weights < 1.5 * WEIGHT.nbytes  # stored once
    for name, rows in ((None, 16), ("prefill", 16), ("decode", 1)):
        x = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
        run = Interpreter(load_program(package, name))
        (feed,) = run.program.inputs
        (out,) = run.run({feed: x}).values()
        np.testing.assert_allclose(out, x @ WEIGHT.T, atol=1e-4)
    with pytest.raises(BadInput, match=r"has no function 'train'") as caught:
        load_program(package, "train")
    assert caught.value.hint == "it has prefill, decode"
