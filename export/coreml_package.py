"""Write a converted model as an ``.mlpackage`` whose bytes depend on its content alone, and map its weights."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import StoredTensor
from ..errors import EdgestillError
from ..files import hash_file
from ..runtimes.mil.program import Program
from ..runtimes.payload_coreml import grid_of, stored_weights, weight_values
from .writer import Weights

__all__ = ["map_weights", "write_package"]

_AUTHOR = "com.apple.CoreML"
_MODEL, _WEIGHTS = "model.mlmodel", "weights"
# Notes of the converter that change from day to day or from machine to machine.
_VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def write_package(model: Any, package: Path, *, description: str, license: str | None) -> None:
    """Save the coremltools ``model`` as ``package``, without dates, and with item ids made from the content.

    A package saved by coremltools carries the day of the conversion and two random UUIDs. The temporary package that
    coremltools made is deleted.
    """
    spec = model.get_spec()
    metadata = spec.description.metadata
    for key in _VOLATILE:
        metadata.userDefined.pop(key, None)
    metadata.shortDescription = description
    metadata.license = license or ""
    data = package / "Data" / _AUTHOR
    (data / _WEIGHTS).mkdir(parents=True)
    (data / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    shutil.copyfile(Path(model.weights_dir) / "weight.bin", data / _WEIGHTS / "weight.bin")
    shutil.rmtree(model.package_path, ignore_errors=True)
    items = {}
    for name, text in ((_MODEL, "CoreML Model Specification"), (_WEIGHTS, "CoreML Model Weights")):
        content = data / name if name == _MODEL else data / name / "weight.bin"
        key = str(uuid.UUID(hash_file(content)[:32])).upper()
        items[key] = {"author": _AUTHOR, "description": text, "name": name, "path": f"{_AUTHOR}/{name}"}
    root = next(key for key, item in items.items() if item["name"] == _MODEL)
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def map_weights(program: Program, weights: Weights, used: Iterable[str]) -> list[StoredTensor]:
    """Where the parameters ``used`` lie in the program: by the converter's name, else by shape and content.

    A float16 weight must be the student's, rounded; anything else raises :class:`EdgestillError` (the conversion
    changed it). Weights that are all ones may be missing: multiplying by them was left out.
    """
    stored = dict(stored_weights(program))
    by_name = {_plain(name): name for name in stored}
    found: list[StoredTensor] = []
    missing: list[str] = []
    for name in used:
        value = weights[name]
        constant = by_name.get(_plain("model_" + re.sub(r"[^A-Za-z0-9]", "_", name)))
        candidates = [constant] if constant is not None else list(stored)
        place = next((c for c in candidates if _holds(program, stored[c], value)), None)
        if place is None:
            if not (value == 1).all():
                missing.append(name)
            continue
        found.append(StoredTensor(name, place, grid_of(stored[place], program)))
    if missing:
        raise EdgestillError(
            f"{len(missing)} weights are not in the Core ML program as they were, first {missing[0]}",
            hint="please report this model; export to ONNX or GGUF meanwhile",
        )
    return found


def _plain(name: str) -> str:
    """A converter's name without what its passes append."""
    return re.sub(r"(_to_fp16|_quantized|_cast_fp16|_palettized)+$", "", name)


def _holds(program: Program, stored: Any, value: Any) -> bool:
    """Is ``stored`` the float weight ``value``: equal in float16 or float32, near on a coarser grid?"""
    kind = getattr(stored, "type", None)
    if kind is not None:
        if not kind.dtype.startswith("float") or kind.shape != value.shape:
            return False
        # coremltools keeps what float16 would round to 0 at its smallest number, 2**-24.
        error = np.abs(np.asarray(stored.value, np.float32) - value.astype(stored.value.dtype).astype(np.float32))
        return bool(error.max(initial=0) <= 2.0**-24)
    if tuple(stored.outputs[0][1].shape) != value.shape:
        return False
    step = np.abs(value.reshape(len(value), -1)).max(axis=1) / 100  # a code of int8 is 1/127 of the largest weight
    error = np.abs(weight_values(stored, program) - value).reshape(len(value), -1).max(axis=1)
    return bool((error <= step + 1e-7).all())
