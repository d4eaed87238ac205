"""ONNX in the native runner, with the library of onnxruntime's own wheel: the numbers of Python's worker, and what goes
wrong. The messages are in ``test_runner.py``, the rest of the contract in ``test_conformance.py``.

Skipped where the runner was not built.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.checkpoints import open_model
from edgestill.errors import BadInput, EdgestillError, MissingDependency, Unsupported, WorkerError
from edgestill.recipe import ExportConfig
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

pytestmark = pytest.mark.slow

ONE = SessionOptions(threads=1)
PROMPT = [5, 60, 90, 130, 7]
IDS = np.array([[5, 60, 90, 130, 7], [11, 12, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Artifacts, made once, in folders whose names a shell would stumble over."""
    from edgestill.export import export

    root = tmp_path_factory.mktemp("artifacts")

    def make(model: Path, to: str) -> Path:
        folder = root / f"a 'model' of \"{model.name}\" {to.partition(':')[2]}"
        if not folder.exists():
            export(model, folder, ExportConfig(to=to))
        return folder

    return make


def both(folder: Path, command: list[str], options: SessionOptions = ONE) -> tuple[LocalWorker, LocalWorker]:
    return LocalWorker(folder, options), LocalWorker(folder, options, command=command)


@pytest.mark.parametrize(
    ("model", "to"),
    [
        ("tiny_bert", "onnx:fp32"), ("tiny_bert", "onnx:int8"), ("tiny_classifier", "onnx:fp32"),
        ("tiny_llama", "onnx:fp32"), ("tiny_llama", "onnx:fp16"), ("tiny_llama", "onnx:int4"),
        ("tiny_llama", "onnx:fp32-portable"),
    ],
)  # fmt: skip
def test_the_numbers_of_pythons_worker(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], request: pytest.FixtureRequest, model: str,
    to: str,
) -> None:  # fmt: skip
    """One library, two ways to it: logits within 1e-5 (most are the same bits), the same tokens."""
    python, native = both(made(request.getfixturevalue(model), to), onnxruntime_command)
    with python, native:
        wanted, got = python.forward(IDS, MASK), native.forward(IDS, MASK)
        assert got.dtype == np.float32
        real = MASK == 1 if got.ndim == 3 else slice(None)
        np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-5)
        assert (native.info().runtime, native.info().version) == ("onnxruntime", python.info().version)
        if model != "tiny_llama":
            return
        theirs, ours = (worker.decode(PROMPT, 12, logits=True) for worker in (python, native))
        assert [token.id for token in ours] == [token.id for token in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.logits, other.logits, rtol=0, atol=1e-5)
        assert all(0 < token.seconds < 5 for token in ours)
        assert [token.id for token in native.decode(PROMPT, 12)] == [token.id for token in theirs]


def test_weights_beside_the_graph(onnxruntime_command: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    """External data is found where the graph is; without its file the artifact is refused."""
    from edgestill.artifact import Manifest, seal_artifact
    from edgestill.export import onnx

    folder = tmp_path / "it's external"
    folder.mkdir()
    draft = onnx.write(open_model(tiny_llama), folder, ExportConfig(to="onnx:fp32"), external_bytes=0)
    manifest = Manifest(
        format="onnx", quantisation="fp32", task="text-generation", entry=draft.entry, inputs=draft.inputs,
        outputs=draft.outputs, shapes="dynamic", max_length=draft.max_length,
        vocab_size=open_model(tiny_llama).vocab_size, contents="", dtype_histogram={}, minimum_runtime={}, lineage={},
    )  # fmt: skip
    artifact: Artifact = seal_artifact(folder, manifest)
    assert (folder / "model.onnx.data").stat().st_size > (folder / "model.onnx").stat().st_size
    python, native = both(artifact.path, onnxruntime_command)
    with python, native:
        np.testing.assert_array_equal(native.forward(IDS, MASK)[0], python.forward(IDS, MASK)[0])
    (folder / "model.onnx.data").unlink()
    with pytest.raises(BadInput, match=r"payload file model\.onnx\.data is missing"):
        LocalWorker(folder, ONE, command=onnxruntime_command)


def test_likelihoods_are_scored_as_in_python(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "reference.json").write_text(json.dumps({"task": "text-generation", "likelihood": True}))
    arrays = {"ids": IDS, "mask": MASK, "starts": np.array([2, 1])}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    python, native = both(made(tiny_llama, "onnx:fp32"), onnxruntime_command)
    with python, native:
        wanted, got = python.score(tmp_path, batch_size=1), native.score(tmp_path, batch_size=2)
        assert {name: len(values) for name, values in got.items()} == {"logprob": 4, "right": 4, "window": 4}
        np.testing.assert_allclose(got["logprob"], wanted["logprob"], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(got["right"], wanted["right"])
        np.testing.assert_array_equal(got["window"], wanted["window"])
        np.save(tmp_path / "starts.npy", np.array([2, 2]))
        with pytest.raises(BadInput, match="a row has no continuation or no context"):
            native.score(tmp_path)


def test_memory_is_that_of_the_process_with_the_model(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_llama: Path
) -> None:
    with LocalWorker(made(tiny_llama, "onnx:fp32"), ONE, command=onnxruntime_command) as worker:
        worker.forward(IDS, MASK)
        told = worker.memory()
        [host] = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        status = Path(f"/proc/{host}/status").read_text()
        resident = 1024 * int(status.partition("VmRSS:")[2].split()[0])
        assert (worker.exchange.folder / "host.pid").read_text() == f"{host}\n"
        assert 0.5 * resident < told["peak_rss"] < 2 * resident
        assert told["peak_file_backed"] > 5 << 20  # the library; the static runner has less
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        assert _ended(int(host))  # it never outlives the runner


def test_options_reach_the_runtime(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_bert: Path
) -> None:
    folder = made(tiny_bert, "onnx:int8")
    extra = {"session.x64quantprecision": "1", "graph_optimization": "extended"}
    python, native = both(folder, onnxruntime_command, SessionOptions(threads=1, extra=extra))
    with python, native:
        np.testing.assert_allclose(native.forward(IDS, MASK), python.forward(IDS, MASK), rtol=0, atol=1e-5)
    for options, kind, text in (
        (SessionOptions(1, extra={"graph_optimization": "most"}), BadInput, "graph_optimization 'most'"),
        (SessionOptions(1, backend="CUDAExecutionProvider"), Unsupported, "no backend 'CUDAExecutionProvider'"),
    ):
        with pytest.raises(kind, match=text):
            LocalWorker(folder, options, command=onnxruntime_command)


def test_a_graph_that_the_runtime_refuses(onnxruntime_command: list[str], tmp_path: Path) -> None:
    from edgestill.artifact import Manifest, TensorSpec, seal_artifact

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.onnx").write_bytes(b"\x08\x09broken")
    manifest = Manifest(
        format="onnx", quantisation="fp32", task="feature-extraction", entry="model.onnx", inputs=(),
        outputs=(TensorSpec("out", "float32", ()),), shapes="dynamic", max_length=8, vocab_size=9, contents="",
        dtype_histogram={}, minimum_runtime={}, lineage={},
    )  # fmt: skip
    seal_artifact(tmp_path / "a", manifest)
    with pytest.raises(BadInput, match=r"model\.onnx: onnxruntime \d+\.\d+\S* can't load it: ") as caught:
        LocalWorker(tmp_path / "a", ONE, command=onnxruntime_command)
    assert "minimum_runtime" in caught.value.hint


def _libraries(tmp_path: Path) -> dict[str, Path]:
    """Libraries that are none: of another kind, and too old (its table ends before what is needed)."""
    from edgestill.runtimes.native.zig import find_zig

    try:
        zig = find_zig()
    except EdgestillError as error:
        pytest.skip(error.message)
    old = """
#include <stdint.h>
static const void * get(uint32_t version) { return 0; }
static const char * version(void) { return "1.3.0"; }
static const void * const base[2] = {(void *) get, (void *) version};
const void * const * OrtGetApiBase(void) { return base; }
"""
    for name, text in (("old", old), ("other", "int zlibVersion(void) { return 1; }")):
        (tmp_path / f"{name}.c").write_text(text)
        zig.run(["cc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so"], name, cwd=tmp_path, root=tmp_path)
    return {"old": tmp_path / "old.so", "other": tmp_path / "other.so", "missing": tmp_path / "missing.so"}


def test_libraries_that_can_not_be_used(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_bert: Path, tmp_path: Path
) -> None:
    folder = made(tiny_bert, "onnx:fp32")
    found = _libraries(tmp_path)
    at = onnxruntime_command.index("--onnxruntime") + 1
    for name, text in (
        ("old", r"old\.so can't be used: it is version 1\.3\.0: 1\.4 or newer is needed"),
        ("other", r"other\.so can't be used: it exports no OrtGetApiBase"),
        ("missing", r"missing\.so can't be used: .*No such file"),
    ):
        command = [*onnxruntime_command]
        command[at] = str(found[name])
        with pytest.raises(BadInput, match=text):
            LocalWorker(folder, ONE, command=command)
    command = [*onnxruntime_command[:-1], str(tmp_path / "no program")]
    with pytest.raises(MissingDependency, match="no program can't be started here: No such file"):
        LocalWorker(folder, ONE, command=command)
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(MissingDependency, match="Exec format error"):
        LocalWorker(folder, ONE, command=[*onnxruntime_command[:-1], str(tmp_path / "text")])


def test_onnx_without_a_library_and_gguf_with_one(
    onnxruntime_command: list[str], native_command: Callable[..., list[str]], made: Callable[[Path, str], Path],
    tiny_llama: Path,
) -> None:  # fmt: skip
    with pytest.raises(Unsupported, match=r"for onnx it needs a libonnxruntime\.so, and none was given"):
        LocalWorker(made(tiny_llama, "onnx:fp32"), ONE, command=native_command())
    with LocalWorker(made(tiny_llama, "gguf:f32"), ONE, command=onnxruntime_command) as worker:
        assert worker.info().runtime == "llama.cpp"
    done = subprocess.run([*onnxruntime_command[:-2], "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, "--onnxruntime and --host go together" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGILL"])
def test_the_runner_ends_as_the_process_with_the_model_does(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_llama: Path, name: str
) -> None:
    """Who watches the worker sees the signal that says what happened."""
    with LocalWorker(made(tiny_llama, "onnx:fp32"), ONE, command=onnxruntime_command) as worker:
        host = int((worker.exchange.folder / "host.pid").read_text())
        os.kill(host, getattr(signal, name))
        with pytest.raises(WorkerError, match=f"died of {name} during forward"):
            worker.forward(IDS, MASK)


def test_cold_loads_and_a_second_model(
    onnxruntime_command: list[str], made: Callable[[Path, str], Path], tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made(tiny_bert, "onnx:fp32"), folder)
    with LocalWorker(folder, ONE, cold=True, command=onnxruntime_command) as worker:
        assert worker.load_seconds > 0
        assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=0)) == 3


def _ended(pid: int) -> bool:
    import time

    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False
