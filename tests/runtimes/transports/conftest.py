"""A small ONNX artifact made without an exporter, and the device's Python: numpy and onnxruntime, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, Histogram, Manifest, TensorSpec, seal_artifact

WIDTH, VOCABULARY = 8, 50


@pytest.fixture(scope="session")
def table() -> np.ndarray:
    """The embedding table ``[50, 8]`` of :func:`lookup`."""
    return np.random.default_rng(5).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


@pytest.fixture(scope="session")
def make_lookup(table: np.ndarray) -> Callable[[Path], Artifact]:
    """Write an ONNX artifact that looks token vectors up and leaves mean pooling to the caller."""

    def make(folder: Path) -> Artifact:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        folder.mkdir(parents=True)
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
            "lookup",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
            [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", WIDTH])],
            [numpy_helper.from_array(table, "table")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, folder / "model.onnx")
        manifest = Manifest(
            format="onnx", quantisation="fp32", task="feature-extraction", entry="model.onnx",
            inputs=(TensorSpec("input_ids", "int64", ("batch", "length")),),
            outputs=(TensorSpec("hidden", "float32", ("batch", "length", WIDTH)),),
            shapes="dynamic", max_length=64, vocab_size=VOCABULARY, contents="fp32",
            dtype_histogram={"float32": Histogram(1, table.size, table.nbytes)},
            minimum_runtime={"onnxruntime": "1.17"}, lineage={}, pooling="mean",
        )  # fmt: skip
        return seal_artifact(folder, manifest)

    return make


@pytest.fixture(scope="session")
def lookup(make_lookup: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One such artifact, not to be changed."""
    return make_lookup(tmp_path_factory.mktemp("artifacts") / "lookup")


@pytest.fixture(scope="session")
def device_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as a board has them: numpy and onnxruntime, and no edgestill."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("device") / "packages"
    folder.mkdir()
    for package in (Path(np.__file__).parent, Path(onnxruntime.__file__).parent):
        (folder / package.name).symlink_to(package)
        bundled = package.parent / f"{package.name}.libs"
        if bundled.is_dir():
            (folder / bundled.name).symlink_to(bundled)
    return folder


_DEVICE_PYTHON = """#!{python} -IS
import sys
from runpy import run_path

sys.path.append({packages!r})
arguments = sys.argv[1:]
while arguments[0] in ("-I", "-u"):
    del arguments[0]
if arguments[0] == "-c":
    code = arguments.pop(1)
    sys.argv = arguments
    exec(code, {{"__name__": "__main__"}})
else:
    sys.argv = arguments
    sys.path.insert(0, "")
    run_path(arguments[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def device_python(device_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable that behaves as the ``python3`` of a board with only :func:`device_packages`: -S shuts this
    environment's own packages out."""
    script = tmp_path_factory.mktemp("device") / "python3"
    script.write_text(_DEVICE_PYTHON.format(python=sys.executable, packages=str(device_packages)))
    script.chmod(0o755)
    return script
