"""The house keeps its shape: floors, public names, wheel contents, doctests, what a module may import."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgestill

ROOT = Path(__file__).resolve().parent.parent
SKIP = {"tests", "build", "dist", "runs", ".venv", ".src", ".git", ".ci"}

# DESIGN: an import only points down. A longer prefix wins.
FLOORS = {
    "cli": 6, "cli_output": 6, "cli_bench": 6, "cli_devices": 6,
    "show": 6, "show_devices": 6, "show_emulated": 6, "terminal": 6, "__main__": 6, "schemas": 6,
    "pipeline": 5, "stages": 5, "commands": 5, "benchmark": 5, "accuracy": 5, "bench_import": 5, "bench_export": 5,
    "devices": 5,
    "runner_build": 5, "plan": 5, "init": 5,
    "emulation": 5, "parity": 5,
    "doctor": 5, "delivery": 5, "judging": 5,
    "company": 5, "apps": 5, "loss_comparison": 5, "distillation": 5,
    "distill": 4, "export": 4,
    "benchmark_profile": 5, "show_profile": 6,
    "bench": 3,
    "runtimes": 2,
    "architectures": 1, "checkpoints": 1, "torch_models": 1, "model_tokenizer": 1, "model_import": 1, "gguf_import": 1,
    "gguf_header": 1, "gguf_names": 1, "gguf_origin": 1, "model_origin": 1,
    "gguf_tokenizer": 1, "vocabularies": 1, "data": 1, "data_files": 1, "data_labels": 1, "data_stream": 1, "fetch": 1,
    "registries": 1, "archives": 1, "inspection": 1,
    "recipe": 0, "recipe_base": 0, "recipe_cache": 0, "recipe_teaching": 0, "recipe_training": 0, "recipe_student": 0,
    "recipe_text": 0, "recipe_export": 0, "quantisation": 0, "quantisation_base": 0,
    "quantisation_budget": 0, "quantisation_onnx": 0, "quantisation_gguf": 0, "quantisation_coreml": 0,
    "loss_names": 0, "artifact": 0, "grids": 0, "sorted_ids": 0, "ggml_grids": 0, "ggml_bits": 0,
    "ggml_blocks": 0, "ggml_k": 0, "ggml_iq": 0, "ggml_codebooks": 0, "coreml_grids": 0, "errors": 0, "files": 0,
    "progress": 0, "": 0,
}  # fmt: skip
DEVICE_SIDE = (
    "session", "worker", "protocol", "scoring", "likelihood", "memory", "timing", "ort_session", "llamacpp",
    "coreml_session", "mil", "machine", "sensors", "profiling", "ort_profile",
)  # fmt: skip
NEVER_ON_A_DEVICE = {"torch", "transformers", "pydantic", "rich", "typer", "scipy", "onnx", "gguf", "safetensors"}


def sources() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if not SKIP & set(p.relative_to(ROOT).parts))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module, is it of the house) for each import outside ``if TYPE_CHECKING``."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }  # fmt: skip
    found: set[tuple[str, bool]] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name, False) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "", False))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            inside = [*base, *(node.module.split(".") if node.module else [])]
            if node.module:
                found.add((".".join(inside), True))
            else:
                found |= {(".".join([*inside, alias.name]), True) for alias in node.names}
    return found


def floor(module: str) -> int:
    first = module.split(".")[0]
    assert first in FLOORS, f"{module} stands on no floor: name it in FLOORS"
    return FLOORS[first]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = module_name(path)
    for target, of_the_house in imports(path):
        if not of_the_house:
            assert target.split(".")[0] not in {"edgestill", "bench", "runtimes", "export", "distill"}, (
                f"{own} imports {target}: inside the package imports are relative"
            )
            continue
        if target.startswith("__"):
            continue
        assert floor(target) <= floor(own), f"{own} (floor {floor(own)}) imports {target} (floor {floor(target)})"
        rooms = {own.split(".")[0], target.split(".")[0]}
        assert rooms != {"distill", "export"}, f"{own} imports {target}: neither room knows the other"


def device_side() -> list[Path]:
    names = {path: module_name(path).removeprefix("runtimes.") for path in sources()}
    return [path for path, name in names.items() if path.parent != ROOT and name.startswith(DEVICE_SIDE)]


@pytest.mark.parametrize("path", device_side(), ids=module_name)
def test_what_runs_on_a_device_is_light(path: Path) -> None:
    heavy = {target.split(".")[0] for target, ours in imports(path) if not ours} & NEVER_ON_A_DEVICE
    assert not heavy, f"{module_name(path)} imports {heavy}"


def modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(edgestill.__path__, "edgestill.")]
    return [n for n in names if not n.startswith("edgestill.tests") and n != "edgestill.__main__"
            and n.split(".")[1] not in SKIP]  # fmt: skip


@pytest.mark.parametrize("name", modules())
def test_public_names_are_what_all_says(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        assert not [k for k, v in vars(module).items() if getattr(v, "__module__", None) == name and k[0] != "_"], (
            f"{name} defines public names but has no __all__"
        )
        return
    assert sorted(set(public)) == sorted(public), "a name stands twice in __all__"
    missing = [n for n in public if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ promises {missing}"


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500, "split it by what it does"


def test_package_under_test_is_the_one_asked_for() -> None:
    expected = os.environ.get("EDGESTILL_EXPECT", str(ROOT))
    assert Path(edgestill.__file__).resolve().is_relative_to(Path(expected).resolve())


def test_wheel_holds_the_whole_tree(tmp_path: Path) -> None:
    """Every module, recipe, schema, template and device profile that git knows is in the wheel, and nothing else."""
    checkout = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    tracked = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    for name in tracked:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", checkout],
        check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n.removeprefix("edgestill/") for n in archive.namelist() if n.startswith("edgestill/")}
    shipped = (".py", ".toml", ".json", ".csv", ".jinja", ".css", ".c", ".cpp", ".h", ".mjs", ".html", "py.typed")
    outside = {"tests", ".ci", "docs", ".src"}
    expected = {n for n in tracked if n.endswith(shipped) and n.split("/")[0] not in outside and n != "pyproject.toml"}
    assert inside == expected
