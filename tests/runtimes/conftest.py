"""A toy model and the command of the worker that runs it (see toy_worker.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def toy(tmp_path: Path) -> Callable[[str], Path]:
    """Make a toy model folder with a behaviour (``"hang@forward"``)."""

    def make(behaviour: str = "well") -> Path:
        folder = tmp_path / "toy"
        folder.mkdir(exist_ok=True)
        (folder / "behaviour").write_text(behaviour)
        return folder

    return make


@pytest.fixture(scope="session")
def toy_command() -> list[str]:
    """The command line of a worker that runs toy models."""
    script = Path(__file__).with_name("toy_worker.py")
    return [sys.executable, str(script), "--threads", "1", "--parent", str(os.getpid())]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the conformance tests that don't apply to a case, by the fixture they ask for."""
    left_out = []
    for item in items:
        wanted = set(getattr(item, "fixturenames", ()))
        if not wanted & {"generating", "exported"}:
            continue
        runtime, task = item.callspec.params["opened"]  # type: ignore[attr-defined]
        if ("generating" in wanted and task != "text-generation") or ("exported" in wanted and runtime.to is None):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
