"""The zipapp: the same bytes twice, only what a device has, and a worker like any other."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.errors import MissingDependency, Unsupported
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports import zipapp
from edgestill.runtimes.transports.local import LocalWorker
from edgestill.runtimes.transports.zipapp import build_worker_zipapp, worker_modules

ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_worker_zipapp(tmp_path_factory.mktemp("zipapp") / "worker.pyz")


def test_the_same_bytes_twice(worker: Path, tmp_path: Path) -> None:
    assert build_worker_zipapp(tmp_path / "again.pyz").read_bytes() == worker.read_bytes()
    assert worker.stat().st_size < 200_000


def test_it_holds_the_runtimes_and_nothing_heavy(worker: Path) -> None:
    names = set(zipfile.ZipFile(worker).namelist())
    runtimes = {"worker", "service", "session", "protocol", "memory", "timing", "ort_session", "llamacpp_session"}
    assert {f"edgestill/runtimes/{name}.py" for name in runtimes} <= names
    rest = {name for name in names if not name.startswith("edgestill/runtimes/")}
    assert not rest & {"edgestill/recipe.py", "edgestill/cli.py", "edgestill/checkpoints.py"}
    assert not {name for name in names if "torch" in name or "coreml" in name or "/mil/" in name}


def test_it_works_where_there_is_only_numpy_and_onnxruntime(
    worker: Path, device_python: Path, lookup: Artifact, table: np.ndarray
) -> None:
    ids = np.array([[4, 9, 30]])
    with LocalWorker(lookup.path, ONE, timeout=120, command=[str(device_python), "-I", str(worker)]) as remote:
        assert remote.info().runtime == "onnxruntime"
        np.testing.assert_allclose(remote.forward(ids, np.ones_like(ids)), table[ids].mean(axis=1), atol=1e-6)
        assert len(remote.time_forward(ids, np.ones_like(ids), repeats=3, warmup=0)) == 3


def test_without_a_runtime_it_says_what_is_missing(worker: Path, lookup: Artifact, tmp_path: Path) -> None:
    (tmp_path / "numpy").symlink_to(Path(np.__file__).parent)
    bundled = Path(np.__file__).parent.with_name("numpy.libs")
    (tmp_path / "numpy.libs").symlink_to(bundled)
    code = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); "
    code += f"runpy.run_path({str(worker)!r}, run_name='__main__')"
    with pytest.raises(MissingDependency, match="onnxruntime is not installed"):
        LocalWorker(lookup.path, ONE, timeout=120, command=[sys.executable, "-I", "-S", "-c", code])


def test_every_module_in_it_can_be_imported_on_a_device(worker: Path, device_python: Path) -> None:
    """Floor 0, numpy and the standard library: no import at the top of a packed module fails there."""
    files = set(zipfile.ZipFile(worker).namelist()) - {"__main__.py"}
    names = sorted(file[:-3].replace("/", ".").removesuffix(".__init__") for file in files)
    code = f"import sys; sys.path.insert(0, {str(worker)!r}); [__import__(name) for name in {names!r}]"
    done = subprocess.run([device_python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _house(root: Path, files: dict[str, str]) -> None:
    for name, text in {"__init__.py": "", "runtimes/__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_imports_are_followed_into_functions_and_heavy_ones_stay_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipapp, "_ROOT", tmp_path)
    _house(
        tmp_path,
        {
            "runtimes/worker.py": "from . import light\nfrom ..low import value\ndef f():\n    from .far import g\n"
            "    from .heavy import h\n    from .above import i\n",
            "low.py": "value = 1\n",
            "runtimes/light.py": "import numpy\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\n",
            "runtimes/far.py": "import json\n",
            "runtimes/heavy.py": "def h():\n    import torch\n",
            "runtimes/above.py": "from .heavy import h\nfrom .only_above import x\n",
            "runtimes/only_above.py": "",
            "runtimes/stray.py": "",
        },
    )
    found = [str(path.relative_to(tmp_path)) for path in worker_modules()]
    assert found == [
        "__init__.py", "low.py", "runtimes/__init__.py", "runtimes/far.py", "runtimes/light.py", "runtimes/worker.py"
    ]  # fmt: skip


def test_a_worker_that_needs_more_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipapp, "_ROOT", tmp_path)
    _house(tmp_path, {"runtimes/worker.py": "from . import heavy\n", "runtimes/heavy.py": "import pydantic\n"})
    with pytest.raises(Unsupported, match=r"it needs pydantic \(runtimes.heavy\)"):
        build_worker_zipapp(tmp_path / "worker.pyz")
    assert not (tmp_path / "worker.pyz").exists()
