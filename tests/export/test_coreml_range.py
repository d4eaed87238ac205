"""Large activations: all-float16 overflows and the report says where, the float32 islands hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.checkpoints import load_torch, open_model
from edgestill.export import coreml_convert, coreml_package
from edgestill.export.source import Source
from edgestill.runtimes.coreml_session import causal_mask
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import load_program

PEAK = 3000.0  # of the residual stream, as a tenth of what SmolLM2's reaches; its square leaves float16


def _loud(folder: Path) -> Any:
    """The tiny llama's first layer, with one channel of the residual stream at 3,000."""
    model = load_torch(folder)
    model.model.layers = model.model.layers[:1]
    torch.manual_seed(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = PEAK
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for layer in model.model.layers:
            layer.input_layernorm.weight[7] = layer.post_attention_layernorm.weight[7] = 1e-3
    return model


def _run(folder: Path, precision: Any, package: Path) -> tuple[np.ndarray, np.ndarray, Interpreter]:
    ids = np.random.default_rng(3).integers(5, 300, (1, 16))
    model = _loud(folder)
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits[0].numpy()
    described = dataclasses.replace(open_model(folder), layers=1)
    converted = coreml_convert.convert_decoder(Source(described), model, 32, precision=precision)
    coreml_package.write_package(converted.model, package, description="", license=None)
    interpreter = Interpreter(load_program(package))
    feed: dict[str, Any] = {"input_ids": ids, "causal_mask": causal_mask(16, 16)}
    return interpreter.run(feed, interpreter.new_state())["logits"][0], want, interpreter


def test_all_float16_overflows_and_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    _, _, interpreter = _run(tiny_llama, "half", tmp_path / "half.mlpackage")
    row = interpreter.first_overflow
    assert row is not None
    assert (row.kind, row.dtype, row.overflowed) == ("pow", "float16", 1)
    norms = [r for r in interpreter.ranges if r.kind == "pow"]
    assert row is norms[0]  # the first RMS norm


def test_islands_hold(tiny_llama: Path, tmp_path: Path) -> None:
    got, want, interpreter = _run(tiny_llama, "islands", tmp_path / "islands.mlpackage")
    assert interpreter.first_overflow is None
    squares = [r for r in interpreter.ranges if r.kind == "pow"]
    assert squares[0].dtype == "float32"
    assert squares[0].peak == pytest.approx(PEAK**2, rel=1e-3)
    assert (got.argmax(-1) == want.argmax(-1)).all()
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
