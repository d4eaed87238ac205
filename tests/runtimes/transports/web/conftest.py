"""A real Chromium that shows the page, one for all tests of a session; skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def web_export(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Export a tiny model: ``web_export("tiny_bert", "onnx:int8")``, once for all tests."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, to: str) -> Path:
        from edgestill.export import export
        from edgestill.recipe import ExportConfig

        if (model, to) not in made:
            folder = tmp_path_factory.mktemp("web") / f"{model} '{to.replace(':', '-')}\" 100%"  # a name to trip over
            export(request.getfixturevalue(model), folder, ExportConfig(to=to))
            made[model, to] = folder
        return made[model, to]

    return make


@pytest.fixture
def fake_ort(tmp_path: Path) -> dict[str, Path]:
    """Files in the place of onnxruntime-web's, for tests of the server alone."""
    (tmp_path / "ort.mjs").write_text("export {};")
    return {"ort.mjs": tmp_path / "ort.mjs"}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No exchange folder and no browser profile outlives a test."""
    from edgestill.runtimes.protocol import exchange_root

    def left() -> set[Path]:
        roots = {exchange_root(), Path(os.environ.get("TMPDIR", "/tmp"))}
        return {path for root in roots for path in root.glob(f"edgestill-{os.getpid()}-*")}

    before = left()
    yield
    assert left() <= before
