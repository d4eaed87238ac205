"""The shipped recipes' own models: what must hold on real weights and real text. Fetched once into the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgestill.commands import ExportRequest, export_verified
from edgestill.fetch import fetch
from edgestill.recipe import load_recipe
from edgestill.stages import Observer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm() -> Path:
    teacher = load_recipe("minilm").teacher
    return fetch(teacher.source, sha256=teacher.sha256).path


@pytest.fixture(scope="module")
def smollm2() -> Path:
    teacher = load_recipe("smollm2").teacher
    return fetch(teacher.source, sha256=teacher.sha256).path


def exported(model: Path, out: Path, *to: str) -> dict[str, Any]:
    result = export_verified(ExportRequest(model, to, out), Observer())
    return {artifact.name: artifact for artifact in result.run.artifacts}


def test_the_destructive_int8_is_caught_and_the_shipped_one_is_not_it(minilm: Path, tmp_path: Path) -> None:
    """Dynamic int8 per channel saturates on x86 without VNNI; this machine may have VNNI, and it must be caught."""
    found = exported(minilm, tmp_path, "onnx:int8", "onnx:int8-dynamic", "onnx:int8-dynamic-per-channel")
    bad = found["onnx-int8-dynamic-per-channel"]
    assert bad.level == "failed"
    assert bad.folder.startswith("quarantine/")
    assert any(failure.startswith("int16_saturation") for failure in bad.failures)
    assert found["onnx-int8"].level == found["onnx-int8-dynamic"].level == "device_verified"


def test_static_int8_loses_less_than_dynamic_int8(minilm: Path, tmp_path: Path) -> None:
    """What stays in blocks was chosen by measurement there, by role here."""
    found = exported(minilm, tmp_path, "onnx:int8-dynamic", "onnx:int8-static")
    assert {artifact.level for artifact in found.values()} == {"device_verified"}
    metrics = {name: artifact.metrics for name, artifact in found.items()}
    assert metrics["onnx-int8-static"]["cosine@sample"] > metrics["onnx-int8-dynamic"]["cosine@sample"]
    assert metrics["onnx-int8-static"]["cosine@sample"] > 0.99


def test_smollm2_in_onnx_and_gguf(smollm2: Path, tmp_path: Path) -> None:
    found = exported(smollm2, tmp_path, "onnx:fp32", "gguf:q8_0")
    assert {artifact.level for artifact in found.values()} == {"device_verified"}
    kl = {name: artifact.metrics["kl@sample"] for name, artifact in found.items()}
    assert kl["onnx-fp32"] < 1e-6
    assert kl["gguf-q8_0"] <= 0.01
    prompt = [*range(1000, 1010)]
    assert greedy(tmp_path / "artifacts/onnx-fp32", prompt) == greedy(tmp_path / "teacher", prompt)


def greedy(folder: Path, prompt: list[int], count: int = 32) -> list[int]:
    from edgestill.runtimes.session import SessionOptions
    from edgestill.runtimes.transports.local import LocalWorker

    with LocalWorker(folder, SessionOptions(threads=2)) as worker:
        return [token.id for token in worker.decode(prompt, count)]


def test_every_shipped_recipe_resolves(tmp_path: Path) -> None:
    from edgestill.plan import plan_recipe
    from edgestill.recipe import RECIPES

    for path in RECIPES.glob("*.toml"):
        plan = plan_recipe(path, tmp_path)
        assert not plan.problems, [dataclasses.asdict(problem) for problem in plan.problems]
