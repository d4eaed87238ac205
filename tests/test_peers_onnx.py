"""The figures of our ONNX decoders beside the model builder: all there, with their limits; for real on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.peers import registry
from tests.peers.__main__ import measure
from tests.peers.context import Context
from tests.peers.environments import ONNXRUNTIME_GENAI
from tests.peers.groups import export_onnx
from tests.peers.groups.export_onnx import Graph, Loss
from tests.peers.registry import select

ROOT = Path(__file__).resolve().parent.parent

# What issue 4 asks for, with its limits.
ASKED = {
    "onnx_fp32_decode": ("at_least", 1.0), "onnx_int4_decode": ("at_least", 1.0), "onnx_int4_kl": ("at_most", 0.5),
    "onnx_int8_kl": ("at_most", 0.005), "onnx_int8_bytes": ("at_most", 150e6),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _groups() -> None:
    registry.load_groups()


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tiny=True, repeats=2, threads=1)


def test_every_figure_that_was_asked_for_is_there() -> None:
    for name, (sense, limit) in ASKED.items():
        one = registry.FIGURES[name]
        assert (one.group, one.sense, one.limit, one.variants) == ("export", sense, limit, ())
        assert one.slow


def test_pins_are_those_that_we_lock() -> None:
    """The runtime and the exporter's libraries are ours, so that only the graphs differ."""
    locked = set((ROOT / "constraints.txt").read_text().replace("_", "-").splitlines())
    assert {pin for pin in ONNXRUNTIME_GENAI.pins if pin.startswith(("onnxruntime==", "torch==", "transf"))} <= locked


def test_size_on_a_tiny_model(context: Context) -> None:
    [subject] = select(["onnx_int8_bytes"])
    row = measure(subject, context)
    assert (row.status, row.holds) == ("measured", None), row.how
    folder = next(context.scratch.glob("onnx-int8*"))
    assert row.value == sum(file.stat().st_size for file in folder.iterdir())
    assert (folder / "tokenizer.json").stat().st_size > 0


def test_int4_that_is_too_large_is_no_figure(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "INT4_BYTES", 1000.0)
    monkeypatch.setattr(export_onnx, "INT4", "onnx:int4-pure")
    [subject] = select(["onnx_int4_kl"])
    row = measure(subject, context)
    assert (row.status, row.holds) == ("failed", False)
    assert "MB" in row.how


def test_ratio_of_losses_and_its_interval(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours a quarter of theirs in each of six windows: the ratio of the means, whatever windows are drawn."""
    window = np.repeat(np.arange(6), 20)
    theirs = np.random.default_rng(0).uniform(0.1, 1.0, len(window))
    ours = Loss(theirs / 4, window, 0.9)
    graph = Graph(context.scratch / "model.onnx", 1_000_000)
    monkeypatch.setattr(export_onnx, "_ours", lambda *a: graph)
    monkeypatch.setattr(export_onnx, "_theirs", lambda *a: graph)
    monkeypatch.setattr(export_onnx, "_loss", lambda *a: ours)
    monkeypatch.setattr(export_onnx, "_builders_loss", lambda *a: Loss(theirs, window, 0.8))
    found = export_onnx.onnx_int4_kl(context, "")
    assert found.value == pytest.approx(0.25)
    assert found.interval == pytest.approx((0.25, 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASKED))
def test_figures_on_a_tiny_model(context: Context, name: str) -> None:
    """Both sides run; with equal weights (fp32) they write the same tokens, else the row has failed."""
    [subject] = select([name])
    row = measure(subject, context)
    assert row.status in ("measured", "unavailable"), row.how
    if row.status == "unavailable":
        pytest.skip(row.how)
    assert (row.holds, row.value is not None and row.value > 0) == (None, True)


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_no_peer(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export_onnx.PlainRuntime.ask

    def other(self: Any, request: Any) -> Any:
        answer = honest(self, request)
        return {**answer, "ids": [token + id(self) for token in answer["ids"]]}

    monkeypatch.setattr(export_onnx.PlainRuntime, "ask", other)
    [subject] = select(["onnx_fp32_decode"])
    row = measure(subject, context)
    if row.status == "unavailable":
        pytest.skip(row.how)
    assert (row.holds, row.status) == (False, "failed")
    assert "other tokens" in row.how
