"""Static int8: input grids and exclusions chosen by measurement, and artifacts that compute what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.checkpoints import open_model
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.export.onnx_inputs import fit_grid
from edgestill.export.onnx_static import MOST_LOSS, Product, choose_kept, plan_static
from edgestill.export.source import Source
from edgestill.grids import InputGrid, input_grid
from edgestill.recipe import ExportConfig
from edgestill.runtimes.onnx_reader import OnnxFile

STATIC = ExportConfig(to="onnx:int8-static")
WHOLE = pytest.mark.whole


def _product(name: str, loss: float, weights: int) -> Product:
    return Product((name,), input_grid(-1, 1), -1.0, 1.0, weights, loss)


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.15, 0.35, 1.0])
def test_the_fewest_products_are_kept_in_the_order_of_loss_by_size(limit: float) -> None:
    random = np.random.default_rng(3)
    products = [
        _product(str(i), float(loss), int(n))
        for i, (loss, n) in enumerate(zip(random.exponential(0.02, 20), random.integers(1, 9, 20) * 100, strict=True))
    ]
    kept, loss = choose_kept(products, lambda rest: sum(one.loss for one in rest), limit)
    order = sorted(products, key=lambda one: one.loss / one.weights, reverse=True)
    count = next(k for k in range(21) if sum(one.loss for one in order[k:]) <= limit)
    assert kept == order[:count]
    assert loss == pytest.approx(sum(one.loss for one in order[count:]))


def test_a_grid_cuts_an_outlier_that_hardly_matters_and_keeps_one_that_does() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    rows[0, 3] = 300.0
    low, high = float(rows.min()), 300.0

    def error(low: float, high: float, weigh: np.ndarray) -> float:
        grid = input_grid(low, high)
        return sum(
            float(weigh[k]) * (float(grid.rounded(rows[t, k : k + 1])[0]) - float(rows[t, k])) ** 2
            for t in range(len(rows)) for k in range(8)
        )  # fmt: skip

    for of_the_outlier, cut in ((1e-6, True), (1.0, False)):
        weigh = np.ones(8)
        weigh[3] = of_the_outlier
        grid = fit_grid(rows, low, high, weigh)
        top = (255 - grid.zero_point) * float(grid.scale)
        assert (top < 0.5 * high) is cut
        assert error(-grid.zero_point * float(grid.scale), top, weigh) <= error(low, high, weigh) * (1 + 1e-6)


@pytest.mark.parametrize(
    "model",
    ["tiny_bert", "tiny_llama", pytest.param("tiny_gpt2", marks=WHOLE), pytest.param("tiny_classifier", marks=WHOLE)],
)
def test_artifacts_pass_verification(
    model: str, tmp_path: Path, sentences: list[str], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    artifact = export(folder, tmp_path / "a", STATIC, calibration=sentences[100:140], dev=sentences[140:160])
    decoder = open_model(folder).task == "text-generation"
    texts = [" ".join(sentences[i : i + 8]) for i in range(0, 32, 8)] if decoder else sentences[:24]
    reference = make_reference(folder, tmp_path / "r", texts=texts, window=48, threads=1)
    options = VerifyOptions(threads=1, device="a test", decode_tokens=4)
    found = examine(artifact.path, student=folder, references={"text": reference}, work=tmp_path, options=options)
    assert found.verdict.failures == ()
    assert "products kept in blocks by measurement" in artifact.manifest.contents
    checks = {check.name: check for check in found.verdict.checks}
    assert checks["int16_saturation"].value == 0
    kinds = {tensor.grid for tensor in artifact.tensors()}
    assert "int8-static" in kinds
    assert "built-in" not in artifact.manifest.contents


def test_onnxruntime_computes_in_whole_numbers(tiny_bert: Path, tmp_path: Path, sentences: list[str]) -> None:
    """Every pair of QuantizeLinear and DequantizeLinear is fused with its product, none is left to be computed."""
    import onnx
    import onnxruntime

    artifact = export(tiny_bert, tmp_path / "a", STATIC, calibration=sentences[:40], dev=sentences[40:50])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(artifact.entry), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    written = [node.op_type for node in OnnxFile(artifact.entry).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == written.count("MatMul") > 0
    assert "DequantizeLinear" not in kinds


def test_an_outlier_is_found_by_measurement(tiny_bert: Path, tmp_path: Path, sentences: list[str]) -> None:
    """One channel a thousand times the others, as in SmolLM2's down projections: its product is kept."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    up = next(name for name in state if name.endswith("layer.1.intermediate.dense.weight"))
    bias = up.replace("weight", "bias")
    state[bias][5] += 3000.0
    down = up.replace("intermediate", "output")
    state[down] = np.ascontiguousarray(state[down])
    state[down][:, 5] /= 1000.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_static(Source(open_model(folder)), calibration=sentences[:40], dev=sentences[40:60], work=tmp_path)
    assert down in plan.types
    (file,) = tmp_path.glob("static-*.json")
    rows = json.loads(file.read_text())["products"]
    worst = max(rows, key=lambda row: row["loss"])
    assert worst["parameters"] == [down]
    assert worst["high"] > 1000


def test_what_was_measured_is_kept_and_used_again(tiny_bert: Path, tmp_path: Path, sentences: list[str]) -> None:
    model, texts = Source(open_model(tiny_bert)), {"calibration": sentences[:40], "dev": sentences[40:60]}
    first = plan_static(model, **texts, work=tmp_path)
    (file,) = tmp_path.glob("static-*.json")
    assert plan_static(model, **texts, work=tmp_path) == first == plan_static(model, **texts)
    kept = json.loads(file.read_text())
    for row in kept["products"]:
        row["grid"] = {"scale": 0.5, "zero_point": 99}
    file.write_text(json.dumps(kept))
    again = plan_static(model, **texts, work=tmp_path)
    assert set(again.grids.values()) == {InputGrid(np.float32(0.5), 99)}
    file.write_text('{"products": [{}]}')  # damaged: measured again
    assert plan_static(model, **texts, work=tmp_path) == first
    plan_static(model, calibration=sentences[50:90], dev=sentences[40:60], work=tmp_path)
    assert len(list(tmp_path.glob("static-*.json"))) == 2


def test_the_whole_stays_below_the_limit_on_dev_text(tiny_bert: Path, sentences: list[str]) -> None:
    plan = plan_static(Source(open_model(tiny_bert)), calibration=sentences[:40], dev=sentences[40:60])
    loss = float(plan.note.partition("(")[2].partition(" ")[0])
    assert loss <= MOST_LOSS["feature-extraction"]


def test_text_without_a_token_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        export(tiny_llama, tmp_path / "a", STATIC, calibration=[""], dev=["a"])
    assert not (tmp_path / "a").exists()
