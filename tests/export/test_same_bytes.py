"""The same model in two folders, exported to two folders, gives the same bytes: every quantisation of every format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.quantisation import QUANTISATIONS
from edgestill.recipe import ExportConfig


@pytest.mark.slow
@pytest.mark.parametrize("to", [f"{form}:{name}" for form, names in QUANTISATIONS.items() for name in names])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_two_exports_are_equal_byte_for_byte(
    model: str, to: str, tmp_path: Path, sentences: list[str], request: pytest.FixtureRequest
) -> None:
    found = []
    for name in ("one", "another/deeper"):
        folder = Path(shutil.copytree(request.getfixturevalue(model), tmp_path / name / "model"))
        try:
            made = export(folder, tmp_path / name / "out", ExportConfig(to=to), calibration=sentences[:8])
        except Unsupported as error:
            pytest.skip(error.message)
        found.append([(file.path, file.sha256) for file in made.manifest.files])
    assert found[0] == found[1]
