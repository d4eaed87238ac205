"""The command that says on which machines an artifact says something else."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path

import pytest

from edgestill.errors import MissingDependency, Unsupported, UsageError
from edgestill.export import export
from edgestill.parity import ParityRequest, ParityResult, check_parity
from edgestill.recipe import ExportConfig
from edgestill.runtimes.transports.qemu_root import find_root
from edgestill.stages import Observer

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86-64 machine")


@pytest.fixture(scope="session")
def safe(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 7-bit weights."""
    out = tmp_path_factory.mktemp("parity") / "a name with 'quotes'"
    return export(tiny_classifier, out, ExportConfig(to="onnx:int8-dynamic")).path


@pytest.fixture(scope="session")
def saturating(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights of the full range: what ONNX Runtime's documentation warns of."""
    out = tmp_path_factory.mktemp("parity") / "saturating"
    return export(tiny_classifier, out, ExportConfig(to="onnx:int8-dynamic-per-channel")).path


def by_name(result: ParityResult) -> dict[str, str]:
    return {row.name: row.status for row in result.rows}


@x86
def test_what_is_missing_is_named_with_what_installs_it(
    safe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    result = check_parity(ParityRequest(safe), Observer())
    assert result.exit_code == 0
    assert by_name(result)["arm64 cortex-a76"] == "missing"
    hints = {row.name: row.hint for row in result.rows}
    assert "apt-get install qemu-user-static" in hints["arm64 cortex-a76"]
    tried = {row.name: row for row in result.rows if row.target == "host"}
    assert len(tried) == 2
    for row in tried.values():
        assert row.rms == 0.0
        assert row.status in ("same", "reference")
    assert result.saturation is not None
    assert result.saturation["fraction"] == 0.0
    assert check_parity(ParityRequest(safe, strict=True), Observer()).exit_code == 1


def test_bad_requests(safe: Path, tmp_path: Path) -> None:
    for request in (ParityRequest(safe, limit=-1.0), ParityRequest(safe, limit=float("nan")),
                    ParityRequest(safe, examples=0), ParityRequest(safe, examples=10**6)):  # fmt: skip
        with pytest.raises(UsageError):
            check_parity(request, Observer())


def test_one_runtime_has_nothing_to_compare(tiny_classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "artifact.json").write_text("{}")
    with pytest.raises(UsageError):
        check_parity(ParityRequest(folder), Observer())
    assert issubclass(Unsupported, UsageError)


needs_x86_emulator = pytest.mark.skipif(
    shutil.which("qemu-x86_64-static") is None, reason="apt-get install qemu-user-static"
)


@x86
@needs_x86_emulator
@pytest.mark.slow
def test_sums_that_overflow_are_found_and_seven_bits_are_safe(saturating: Path, safe: Path) -> None:
    """The real kernels of an x86 without VNNI, against the simulation, which does not run them."""
    bad, good = (check_parity(ParityRequest(folder), Observer()) for folder in (saturating, safe))
    row = next(row for row in bad.rows if row.name == "x86 without VNNI")
    assert row.status == "differs"
    assert "overflow 16 bits" in row.reason
    assert bad.exit_code == 1
    assert bad.saturation is not None
    assert bad.saturation["fraction"] > 0
    exact = next(row for row in bad.rows if row.name == "x86 without VNNI, exact")
    assert exact.status != "differs"
    assert exact.rms is not None
    assert exact.rms < 0.001 < (row.rms or 0)
    assert by_name(good)["x86 without VNNI"] in ("same", "reference")
    assert good.exit_code == 0
    assert good.saturation is not None
    assert good.saturation["fraction"] == 0


@x86
@pytest.mark.slow
def test_arm_agrees_with_exact_sums(saturating: Path) -> None:
    try:
        find_root()
    except MissingDependency as error:
        pytest.skip(f"{error.message}: {error.hint}")
    result = check_parity(ParityRequest(saturating, core="cortex-a53"), Observer())
    assert result.reference == "arm64 cortex-a53"
    rows = {row.name: row for row in result.rows}
    assert rows["x86 without VNNI, exact"].status == "same"
    assert (rows["x86 without VNNI, exact"].rms or 0) < 1e-5
    assert rows["x86 without VNNI"].status == "differs"
    if importlib.util.find_spec("edgestill.runtimes.transports.web") is None:
        assert rows["wasm"].status == "missing"
