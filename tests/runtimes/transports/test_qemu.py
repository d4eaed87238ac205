"""Emulated cores: the same numbers as here, no times, and a core without an instruction says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.errors import EdgestillError, MissingDependency, Unsupported, UsageError
from edgestill.runtimes.native.find import RUNNER_NAME, runner_folder
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.targets import open_target, parse_target
from edgestill.runtimes.transports.local import LocalWorker
from edgestill.runtimes.transports.qemu import QemuTarget, QemuWorker
from edgestill.runtimes.transports.qemu_root import find_root

from .test_qemu_plugin import program

ONE = SessionOptions(threads=1)
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None or shutil.which("qemu-aarch64") is None,
    reason="apt-get install qemu-user-static qemu-user",
)


@pytest.fixture(scope="session")
def root() -> None:
    """The root file system, or the reason why the test is skipped."""
    try:
        find_root()
    except MissingDependency as error:
        pytest.skip(f"{error.message}: {error.hint}")


def test_names() -> None:
    assert str(parse_target("qemu:cortex-a76")) == "qemu:cortex-a76"
    assert open_target("qemu:cortex-a76").source == "emulated"
    with pytest.raises(UsageError, match="no such core") as caught:
        open_target("qemu:cortex-a67")
    assert "did you mean 'cortex-a76'?" in caught.value.hint
    with pytest.raises(UsageError, match="which core"):
        open_target("qemu")


@needs_qemu
def test_a_core_that_this_qemu_does_not_know(tmp_path: Path) -> None:
    target = QemuTarget("cortex-a53")
    target.core = target.core.__class__("cortex-a999", "aarch64", "cortex-a999", "", "")
    with pytest.raises(Unsupported, match="does not know cortex-a999"):
        target.command(1)


@needs_qemu
def test_an_illegal_instruction_is_a_result(tmp_path: Path) -> None:
    """A worker that was built for newer cores dies at once; that names the core, not a crash."""
    elf = program(tmp_path / "it's new")
    folder = tmp_path / "artifact"
    folder.mkdir()
    command = [str(shutil.which("qemu-aarch64-static")), "-cpu", "cortex-a53", str(elf)]
    with pytest.raises(Unsupported, match="illegal instruction on cortex-a53: artifact"):
        QemuWorker(folder, ONE, command=command, core="cortex-a53")
    ended = [str(shutil.which("qemu-aarch64-static")), "-cpu", "max", str(elf)]
    with pytest.raises(EdgestillError) as caught:
        QemuWorker(folder, ONE, command=ended, core="max")
    assert "illegal" not in caught.value.message


def test_what_runs(tmp_path: Path) -> None:
    with QemuTarget("cortex-a76") as target, pytest.raises(Unsupported, match="runs onnx and gguf artifacts"):
        target.open_worker(tmp_path, ONE)
    with QemuTarget("x86-avx2") as target, pytest.raises(Unsupported, match="runs onnx artifacts"):
        target.open_worker(tmp_path, ONE)
    for address in ("cortex-a53?level=dotprods", "cortex-a53?levels=dotprod"):
        with pytest.raises(UsageError, match="cortex-a53"):
            QemuTarget(address)


@needs_qemu
def test_a_runner_of_newer_cores_on_an_old_one(tmp_path: Path) -> None:
    """GGUF takes the native runner that fits the core, and on request one that does not."""
    with QemuTarget("cortex-a53", cache=tmp_path) as target, pytest.raises(MissingDependency) as caught:
        target.command(1, form="gguf")
    assert "build-runner" in caught.value.hint
    for level in ("armv8.0", "dotprod"):
        folder = runner_folder(level, cache=tmp_path)
        folder.mkdir(parents=True)
        program(folder / RUNNER_NAME)
    command = QemuTarget("cortex-a53", cache=tmp_path).command(2, form="gguf")
    assert Path(command[3]).parent.name == "armv8.0"
    forced = QemuTarget("cortex-a53?level=dotprod", cache=tmp_path).command(2, form="gguf")
    assert Path(forced[3]).parent.name == "dotprod"
    with pytest.raises(Unsupported, match="illegal instruction on cortex-a53"):
        QemuWorker(tmp_path, ONE, command=forced, core="cortex-a53")


# ---- with the root file system: minutes of emulation ---------------------------------------------------------------

# Float kernels add in another order: 1.4e-6 was measured. Quantised activations may then round to the next level of
# 127, which is much in a decoder 64 wide: 2.7 % was measured.
LIMITS = {"fp32": 1e-5, "int8": 0.05, "int8-dynamic": 0.05}


@pytest.fixture(scope="session")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny decoder in three quantisations."""
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    out = tmp_path_factory.mktemp("emulated")
    return {name: export(tiny_llama, out / name, ExportConfig(to=f"onnx:{name}")).path for name in LIMITS}


@pytest.fixture(scope="session")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, 300, (2, 16))
    return ids, (np.arange(16) < np.array([[16], [9]])).astype(np.int64)


@needs_qemu
@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_a_core_computes_what_this_machine_computes(artifacts: dict[str, Path], inputs: tuple) -> None:
    for name, folder in artifacts.items():
        with (
            QemuTarget("cortex-a76") as target,
            target.open_worker(folder, ONE) as there,
            LocalWorker(folder, ONE) as here,
        ):
            assert there.capabilities["machine"] == "aarch64"
            assert "latency" in here.info().capabilities
            assert "latency" not in there.info().capabilities
            mask = inputs[1].astype(bool)
            a, b = (worker.forward(*inputs)[mask] for worker in (there, here))
            assert np.linalg.norm(a - b) / np.linalg.norm(b) < LIMITS[name], name
            assert there.info().version == here.info().version
            for refused in (there.time_forward, there.time_decode, there.memory):
                with pytest.raises(Unsupported, match="emulated"):
                    refused(*inputs) if refused != there.memory else refused()


@needs_qemu
@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_dot_products_are_counted_where_a_core_has_them(artifacts: dict[str, Path], inputs: tuple) -> None:
    ids, mask = inputs[0][:1], inputs[1][:1]
    counted: dict[str, list[dict[str, float]]] = {}
    for core in ("cortex-a53", "cortex-a76", "cortex-a76"):
        with QemuTarget(core) as target, target.open_counter(artifacts["int8-dynamic"], ONE) as worker:
            counted.setdefault(core, []).extend(worker.count_forward(ids, mask, windows=2, repeats=2))
            assert worker.count_decode([3, 4, 5], windows=1, repeats=2)[0]["load"] > 0
    assert {row["dot"] for row in counted["cortex-a53"]} == {0}
    new = counted["cortex-a76"]
    assert len(new) == 4
    assert new[0]["dot"] > 0
    assert len({row["dot"] for row in new}) == 1, "of two processes and two windows"
    totals = {core: np.median([sum(row.values()) for row in rows]) for core, rows in counted.items()}
    assert totals["cortex-a76"] < totals["cortex-a53"]


@needs_qemu
@pytest.mark.slow
def test_gguf_runs_by_the_native_runner_of_the_core(tiny_llama: Path, tmp_path: Path) -> None:
    """Without a root file system; the counts tell the level: dot products on a Cortex-A76, none on an A53."""
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    folder = export(tiny_llama, tmp_path / "it's gguf", ExportConfig(to="gguf:q8_0")).path
    ids = np.random.default_rng(0).integers(3, 300, (1, 8))
    dots = {}
    for core, level in (("cortex-a53", "armv8.0"), ("cortex-a76", "dotprod")):
        with QemuTarget(core) as target:
            try:
                worker = target.open_counter(folder, ONE)
            except MissingDependency as error:
                pytest.skip(f"{error.message}: {error.hint}")
            with worker, LocalWorker(folder, ONE) as here:
                assert level in worker.info().version
                assert "latency" not in worker.info().capabilities
                got, wanted = (one.forward(ids, np.ones_like(ids)) for one in (worker, here))
                np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-2)
                [window] = worker.count_forward(ids, np.ones_like(ids), windows=1)
                dots[core] = window["dot"]
    assert dots["cortex-a53"] == 0
    assert dots["cortex-a76"] > 0


@needs_qemu
@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_accuracy_on_an_emulated_core(tiny_bert: Path, tmp_path: Path) -> None:
    """An emulated core is slow and has no clock, but its answers are those of the core."""
    from edgestill.accuracy import AccuracyRequest, measure_accuracy
    from edgestill.bench.measure import Subject
    from edgestill.export import export
    from edgestill.recipe import ExportConfig
    from edgestill.stages import Observer

    folder = export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32")).path
    request = AccuracyRequest(tiny_bert, threads=1, examples=4)
    rows = measure_accuracy([Subject("fp32", folder)], request, Observer(), targets=("qemu:cortex-a76",))
    found = {row.metric: row.summary.value for row in rows if row.summary is not None}
    assert found == {"cosine": pytest.approx(1, abs=1e-5), "spearman": pytest.approx(1, abs=1e-3)}
    assert {(row.target, row.source, row.device) for row in rows} == {
        ("qemu:cortex-a76", "measured", rows[0].device)
    }  # fmt: skip
    assert "emulated" in rows[0].device
