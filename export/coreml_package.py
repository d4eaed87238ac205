"""Write a converted model as an ``.mlpackage`` whose bytes depend on its content alone, and map its weights."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import StoredTensor
from ..errors import EdgestillError
from ..files import hash_file
from ..quantisation_coreml import CoremlQuantisation
from ..runtimes.mil.program import Constant, Program
from ..runtimes.payload_coreml import grid_of, stored_weights
from .coreml_compress import Coder, Fallback, compress, compressed_bytes, compressible
from .coreml_target import quantisation_of
from .writer import Weights

__all__ = ["map_weights", "package_bytes", "plan_of", "with_grids", "write_package"]

_AUTHOR = "com.apple.CoreML"
_MODEL, _WEIGHTS = "model.mlmodel", "weights"
# Notes of the converter that change from day to day or from machine to machine.
_VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def write_package(
    model: Any,
    package: Path,
    *,
    description: str,
    license: str | None,
    plan: Mapping[str, CoremlQuantisation] | None = None,
    coder: Coder | None = None,
) -> list[Fallback]:
    """Save the coremltools ``model`` as ``package``, without dates, and with item ids made from the content; constants
    that ``plan`` names are compressed (codes by ``coder``), and what could not be is returned.

    A package saved by coremltools carries the day of the conversion and two random UUIDs. The temporary package that
    coremltools made is deleted.
    """
    spec = _described(model, description, license)
    data = package / "Data" / _AUTHOR
    (data / _WEIGHTS).mkdir(parents=True)
    weights = Path(model.weights_dir) / "weight.bin"
    fallbacks = compress(spec, weights, data / _WEIGHTS / "weight.bin", plan or {}, coder)
    (data / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    shutil.rmtree(model.package_path, ignore_errors=True)
    manifest = _manifest(hash_file(data / _MODEL), hash_file(data / _WEIGHTS / "weight.bin"))
    (package / "Manifest.json").write_text(manifest, encoding="utf-8")
    return fallbacks


def package_bytes(model: Any, *, description: str, license: str | None, plan: Mapping[str, CoremlQuantisation]) -> int:
    """Bytes of the package that :func:`write_package` would make, if no weight falls back; nothing is written."""
    spec = _described(model, description, license)
    weights = compressed_bytes(spec, Path(model.weights_dir) / "weight.bin", plan)
    return weights + len(spec.SerializeToString(deterministic=True)) + len(_manifest("0" * 32, "1" * 32))


def _described(model: Any, description: str, license: str | None) -> Any:
    spec = model.get_spec()
    metadata = spec.description.metadata
    for key in _VOLATILE:
        metadata.userDefined.pop(key, None)
    metadata.shortDescription = description
    metadata.license = license or ""
    return spec


def _manifest(program: str, weights: str) -> str:
    """``Manifest.json`` of a program and a weight file with these hashes."""
    items = {}
    parts = ((_MODEL, program, "CoreML Model Specification"), (_WEIGHTS, weights, "CoreML Model Weights"))
    for name, digest, text in parts:
        key = str(uuid.UUID(digest[:32])).upper()
        items[key] = {"author": _AUTHOR, "description": text, "name": name, "path": f"{_AUTHOR}/{name}"}
    root = next(key for key, item in items.items() if item["name"] == _MODEL)
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def map_weights(program: Program, weights: Weights, used: Iterable[str]) -> list[StoredTensor]:
    """Where the parameters ``used`` lie in a program whose weights are floats: by the converter's name, else by shape
    and content.

    A float16 weight must be the student's, rounded; anything else raises :class:`EdgestillError` (the conversion
    changed it). Weights that are all ones may be missing: multiplying by them was left out.
    """
    stored = {name: found for name, found in stored_weights(program) if isinstance(found, Constant)}
    by_name = {_plain(name): name for name in stored}
    found: list[StoredTensor] = []
    missing: list[str] = []
    for name in used:
        value = weights[name]
        constant = by_name.get(_plain("model_" + re.sub(r"[^A-Za-z0-9]", "_", name)))
        candidates = [constant] if constant is not None else list(stored)
        place = next((c for c in candidates if _holds(stored[c], value)), None)
        if place is None:
            if not (value == 1).all():
                missing.append(name)
            continue
        found.append(StoredTensor(name, place, stored[place].type.dtype))
    if missing:
        raise EdgestillError(
            f"{len(missing)} weights are not in the Core ML program as they were, first {missing[0]}",
            hint="please report this model; export to ONNX or GGUF meanwhile",
        )
    return found


def plan_of(
    model: Any, tensors: Iterable[StoredTensor], default: CoremlQuantisation, types: Mapping[str, str]
) -> dict[str, CoremlQuantisation]:
    """How each constant of the converted ``model`` that may be compressed is stored: by ``types`` (parameter names),
    else as ``default``. Constants that stay float are not in it."""
    able = compressible(model.get_spec())
    chosen = {
        tensor.stored: quantisation_of(types[tensor.name]) if tensor.name in types else default
        for tensor in tensors
        if tensor.stored in able
    }
    return {name: one for name, one in chosen.items() if one.coded or one.sparsity}


def with_grids(tensors: Iterable[StoredTensor], program: Program) -> list[StoredTensor]:
    """The same weight map for ``program``, in which constants of the same names have been compressed."""
    stored = dict(stored_weights(program))
    return [dataclasses.replace(tensor, grid=grid_of(stored[tensor.stored], program)) for tensor in tensors]


def _plain(name: str) -> str:
    """A converter's name without what its passes append."""
    return re.sub(r"(_to_fp16|_cast_fp16)+$", "", name)


def _holds(stored: Constant, value: Any) -> bool:
    """Is ``stored`` the float weight ``value``, equal in its type?"""
    if not stored.type.dtype.startswith("float") or stored.type.shape != value.shape:
        return False
    # coremltools keeps what float16 would round to 0 at its smallest number, 2**-24.
    error = np.abs(np.asarray(stored.value, np.float32) - value.astype(stored.value.dtype).astype(np.float32))
    return bool(error.max(initial=0) <= 2.0**-24)
