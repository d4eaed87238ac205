"""The device side as one file: a deterministic zipapp of the worker and all that it imports.

``python3 -I worker.pyz`` on a board with numpy and a runtime is the same worker as ``python -m
edgestill.runtimes.worker`` here. What goes in is found by walking the imports from the worker, those inside functions
too, so that no list is forgotten. A module that asks for more than numpy and the device's runtimes (torch, coremltools)
stays out, with what can't be imported without it: opening such a format on a board is refused, not half possible.
"""

from __future__ import annotations

import ast
import io
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import Unsupported
from ...files import atomic_write

__all__ = ["DEVICE_LIBRARIES", "build_worker_zipapp", "worker_modules"]

DEVICE_LIBRARIES = frozenset({"numpy", "onnxruntime", "llama_cpp"})
"""What a device-side module may import beside the standard library."""

_PACKAGE = "edgestill"
_ROOT = Path(__file__).resolve().parents[2]
_WORKER = "runtimes.worker"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say: equal sources give equal bytes
_MAIN = '''"""Written by edgestill: the worker of docs/worker-protocol.md."""

import sys

if sys.version_info < (3, 11):
    sys.exit("python3 is %d.%d, the worker needs 3.11 or newer" % sys.version_info[:2])

from edgestill.runtimes.worker import main

sys.exit(main())
'''


@dataclass(frozen=True)
class _Import:
    """One import statement: the ``module``, whether it is of the house, and whether it runs when its file does."""

    module: str
    ours: bool
    at_once: bool


def build_worker_zipapp(out: Path) -> Path:
    """Write the worker with all that it needs to the file ``out`` and return it; the same bytes every time.

    :class:`Unsupported` when a module that the worker can't do without imports something that a device has not.
    """
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        _add(archive, "__main__.py", _MAIN.encode())
        for path in worker_modules():
            _add(archive, f"{_PACKAGE}/{path.relative_to(_ROOT).as_posix()}", path.read_bytes())
    atomic_write(out, data.getvalue())
    return out


def worker_modules() -> list[Path]:
    """The source files of the device side, sorted by path."""
    files, imports = _reachable()
    heavy = {name for name, found in imports.items() if any(_is_heavy(one) for one in found)}
    while grown := {name for name in imports if name not in heavy and _needs(imports[name], heavy)}:
        heavy |= grown
    if _WORKER in heavy:
        culprits = sorted(f"{one.module} ({name})" for name in heavy for one in imports[name] if _is_heavy(one))
        raise Unsupported(
            f"the worker can't be packed for a device: it needs {', '.join(culprits)}",
            hint="import it inside the function that needs it, in a module that only that function imports",
        )
    kept, queue = {_WORKER}, [_WORKER]
    while queue:
        for name in _targets(imports[queue.pop()], files):
            if name not in kept and not heavy.intersection(_with_packages(name)):
                kept.add(name)
                queue.append(name)
    return sorted({files[part] for name in kept for part in _with_packages(name)})


def _reachable() -> tuple[dict[str, Path], dict[str, list[_Import]]]:
    """Everything of the house that the worker can reach by imports: its files and what each imports."""
    files: dict[str, Path] = {}
    imports: dict[str, list[_Import]] = {}
    queue = [_WORKER]
    while queue:
        name = queue.pop()
        for part in _with_packages(name):
            path = _file(part)
            if path is not None and part not in files:
                files[part] = path
                imports[part] = list(_imports(part, path))
                queue += [one.module for one in imports[part] if one.ours]
    return files, imports


def _with_packages(name: str) -> list[str]:
    """``a.b.c`` -> the packages that importing it runs, and itself: ``"", a, a.b, a.b.c``."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _file(name: str) -> Path | None:
    """The source of a module of the house; ``None`` for a name that is not a module (a function, say)."""
    folder = _ROOT.joinpath(*name.split(".")) if name else _ROOT
    candidates = [folder / "__init__.py", *([folder.with_suffix(".py")] if name else [])]
    return next((path for path in candidates if path.is_file()), None)


def _imports(name: str, path: Path) -> Iterator[_Import]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = set(map(id, _run_at_import(tree)))
    for node in _outside_type_checking(tree):
        now = id(node) in at_once
        if isinstance(node, ast.Import):
            yield from (_Import(alias.name.split(".")[0], False, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield _Import((node.module or "").split(".")[0], False, now)
        elif isinstance(node, ast.ImportFrom):
            inside = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            yield _Import(".".join(inside), True, now)
            # `from . import memory` names modules, `from ..errors import BadInput` names no file: both are looked up
            yield from (_Import(".".join([*inside, alias.name]), True, now) for alias in node.names)


def _outside_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _outside_type_checking(node)


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _run_at_import(node)


def _is_heavy(one: _Import) -> bool:
    return not one.ours and one.module not in DEVICE_LIBRARIES and one.module not in sys.stdlib_module_names


def _needs(found: list[_Import], heavy: set[str]) -> bool:
    wanted = {part for one in found if one.ours and one.at_once for part in _with_packages(one.module)}
    return not wanted.isdisjoint(heavy)


def _targets(found: list[_Import], files: dict[str, Path]) -> list[str]:
    return [one.module for one in found if one.ours and one.module in files]


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # as on Unix, wherever it is written
    archive.writestr(entry, data, compresslevel=9)
