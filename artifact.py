"""An artifact: a folder with a payload for one runtime, and ``artifact.json`` that says what it is.

Standard library only, since it travels to devices. A folder looks like this::

    onnx-int4/
      model.onnx            payload: what the runtime loads, plus what an app needs beside it
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      tensors.json          payload: which stored tensor holds which weight of the student (for verification)
      islands.json          payload: which operations of a Core ML program are float32, and what was measured
      artifact.json         not payload: describes the payload
      verdicts.jsonl        not payload: appended to by each verification

``artifact_id`` is the sha256 over the sorted (path, sha256) of the payload, so it names the bytes, not the folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import BadInput
from .files import atomic_write, canonical_json, hash_file, hash_json, list_files, read_json, safe_join

__all__ = [
    "ARTIFACT_FILE",
    "CLASS_TASKS",
    "ISLANDS_FILE",
    "NOT_PAYLOAD",
    "TENSORS_FILE",
    "TOKEN_TASKS",
    "Artifact",
    "FileEntry",
    "Histogram",
    "Manifest",
    "StoredTensor",
    "TensorSpec",
    "append_verdict",
    "artifact_id",
    "move_artifact",
    "open_artifact",
    "seal_artifact",
    "write_tensors",
]

SCHEMA_VERSION = 1
ARTIFACT_FILE = "artifact.json"
TENSORS_FILE = "tensors.json"
ISLANDS_FILE = "islands.json"
VERDICTS_FILE = "verdicts.jsonl"
_FOR_VERIFICATION = frozenset({TENSORS_FILE, ISLANDS_FILE})
NOT_PAYLOAD = frozenset({ARTIFACT_FILE, VERDICTS_FILE})

Format = Literal["torch", "onnx", "gguf", "coreml"]
Task = Literal["feature-extraction", "text-classification", "token-classification", "text-generation"]
CLASS_TASKS: tuple[Task, ...] = ("text-classification", "token-classification")
"""Tasks whose logits stand for the model's own labels."""
TOKEN_TASKS: tuple[Task, ...] = ("token-classification", "text-generation")
"""Tasks whose models answer at every token: ``[batch, length, …]``."""
Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True)
class FileEntry:
    """One payload file: POSIX path relative to the folder, sha256, size in bytes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the model: a dimension is a number, or a name when it is free (``"batch"``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Histogram:
    """What is stored in one type (``"Q4_0"``, ``"float16"``, ``"int4-b32"``): it proves that a file *is* quantised."""

    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight of the student lies in the payload, so that it can be read back without the exporter.

    ``name`` is the student's parameter (``model.layers.0.mlp.up_proj.weight``); ``stored`` the tensor's name in the
    payload, ``scales`` and ``zero_points`` those of its companions where the format keeps them apart. ``grid`` is a
    grid of ``grids.py`` (``"float32"``, ``"float16"``, ``"int8-b32"``, ``"q4_0"`` …). ``layout`` turns the decoded
    array into the student's: a list of steps applied in order, each ``["transpose"]``, ``["reshape", d0, d1, …]``,
    ``["slice", axis, start, stop]`` or ``["rope_unpermute", heads]``.
    """

    name: str
    stored: str
    grid: str
    layout: tuple[tuple[Any, ...], ...] = ()
    scales: str | None = None
    zero_points: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of ``artifact.json``.

    ``entry`` is the payload path that a runtime opens. ``shapes`` says how free the inputs are; ``max_length`` is in
    tokens. ``pooling``/``normalize`` are for embeddings, and ``pooling_in_graph`` says who does them: the graph or the
    caller. ``minimum_runtime`` maps ``onnxruntime | opset | ir | llama.cpp | ios`` to a version. ``lineage`` holds
    ``model_id`` (sha256 of the folder it came from), ``teacher_id``, ``recipe_sha256``, ``versions``. ``contents``
    is the label of what is really inside, e.g. ``"Q4_K_M (112 of 272 tensors fell back to Q5_0)"``.
    """

    format: Format
    quantisation: str
    task: Task
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Literal["dynamic", "fixed", "enumerated"]
    max_length: int
    vocab_size: int
    contents: str
    dtype_histogram: Mapping[str, Histogram]
    minimum_runtime: Mapping[str, str]
    lineage: Mapping[str, Any]
    license: str | None = None
    kv_cache_bytes_per_token: int | None = None
    pooling: Pooling | None = None
    normalize: bool = False
    pooling_in_graph: bool = False
    prompt_prefix: str = ""
    labels: tuple[str, ...] = ()
    files: tuple[FileEntry, ...] = ()
    artifact_id: str = ""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Artifact:
    """An opened artifact folder whose payload hashes were checked."""

    path: Path
    manifest: Manifest

    @property
    def entry(self) -> Path:
        """Absolute path of what the runtime opens."""
        return safe_join(self.path, self.manifest.entry)

    @property
    def size_bytes(self) -> int:
        """Bytes that ship to a device: the payload without ``tensors.json`` and ``islands.json``."""
        return sum(file.size_bytes for file in self.manifest.files if file.path not in _FOR_VERIFICATION)

    @property
    def shipped(self) -> tuple[FileEntry, ...]:
        """The payload that an app needs: without the weight map and the like, and without an ONNX file that lies beside
        ``.ort``."""
        entry = self.manifest.entry
        left_out = entry.removesuffix(".ort") + ".onnx" if entry.endswith(".ort") else TENSORS_FILE
        return tuple(
            f for f in self.manifest.files if f.path not in _FOR_VERIFICATION and not f.path.startswith(left_out)
        )

    def download_bytes(self) -> int:
        """Bytes of :attr:`shipped` when each file is deflated (zlib, level 6), as in an APK, an IPA or a zip file."""
        return sum(_deflated(self.path / file.path) for file in self.shipped)

    @property
    def model_bytes(self) -> int:
        """Bytes of the model itself, without tokenizer and templates."""
        entry = self.manifest.entry
        parts = (entry + "/", entry + ".")  # a package's folder; external data beside a file
        return sum(f.size_bytes for f in self.manifest.files if f.path == entry or f.path.startswith(parts))

    def tensors(self) -> tuple[StoredTensor, ...]:
        """The weight map, empty for an artifact of another tool."""
        path = self.path / TENSORS_FILE
        if not path.exists():
            return ()
        rows = read_json(path)
        try:
            tensors = tuple(
                StoredTensor(**{**row, "layout": tuple(tuple(step) for step in row.get("layout", ()))}) for row in rows
            )
            for tensor in tensors:
                _check_tensor(tensor)
            return tensors
        except (TypeError, AttributeError) as error:
            reason = str(error)[:300]
            raise BadInput(f"{path} is not a weight map: {reason}", hint="export the artifact again") from None


def _check_tensor(tensor: StoredTensor) -> None:
    """What readers rely on without looking: raise ``TypeError`` naming the field."""
    for name in ("name", "stored", "grid", "scales", "zero_points"):
        value = getattr(tensor, name)
        if not isinstance(value, str) and not (value is None and name in ("scales", "zero_points")):
            raise TypeError(f"{name} is {repr(value)[:80]}")


def artifact_id(files: Sequence[FileEntry]) -> str:
    """sha256 over the sorted (path, sha256) of the payload.

    >>> artifact_id([FileEntry("b", "1", 0), FileEntry("a", "0", 0)]) == artifact_id(
    ...     [FileEntry("a", "0", 0), FileEntry("b", "1", 9)])
    True
    """
    return hash_json(sorted([file.path, file.sha256] for file in files))


def write_tensors(folder: Path, tensors: Sequence[StoredTensor]) -> None:
    """Write ``tensors.json`` (sorted by name) into an artifact folder that is being made."""
    rows = [dataclasses.asdict(tensor) for tensor in sorted(tensors, key=lambda t: (t.name, t.stored))]
    atomic_write(folder / TENSORS_FILE, json.dumps(rows, indent=1) + "\n")


def seal_artifact(folder: Path, manifest: Manifest) -> Artifact:
    """Hash the payload in ``folder``, complete ``manifest`` with it and write ``artifact.json``.

    The last step of every exporter, done inside :func:`edgestill.files.atomic_directory`.
    """
    files = _scan(folder)
    sealed = dataclasses.replace(manifest, files=files, artifact_id=artifact_id(files))
    text = json.dumps(dataclasses.asdict(sealed), indent=2, sort_keys=True, ensure_ascii=False)
    atomic_write(folder / ARTIFACT_FILE, text + "\n")
    return Artifact(folder, sealed)


def open_artifact(folder: Path, *, check: bool = True) -> Artifact:
    """Read ``artifact.json`` and (``check``) compare every payload file with its sha256.

    Raises :class:`BadInput` for a missing, incomplete or changed artifact, naming the file.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not an artifact folder", hint=f"pass a folder that holds {ARTIFACT_FILE}")
    manifest = _parse(folder / ARTIFACT_FILE)
    if check:
        _check(folder, manifest)
    return Artifact(folder, manifest)


def move_artifact(artifact: Artifact, target: Path) -> Artifact:
    """Move an artifact folder (to ``quarantine/``, say), replacing what stood there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    artifact.path.replace(target)
    return Artifact(target, artifact.manifest)


def append_verdict(artifact: Artifact, verdict: Mapping[str, Any]) -> None:
    """Append one verdict (a JSON object) to ``verdicts.jsonl``, which is not part of the artifact's identity."""
    path = artifact.path / VERDICTS_FILE
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    atomic_write(path, old + canonical_json(verdict) + "\n")


def _deflated(path: Path) -> int:
    packer, size = zlib.compressobj(6), 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _scan(folder: Path) -> tuple[FileEntry, ...]:
    paths = [path for path in list_files(folder) if str(path) not in NOT_PAYLOAD]
    return tuple(FileEntry(str(p), hash_file(folder / p), (folder / p).stat().st_size) for p in paths)


def _check(folder: Path, manifest: Manifest) -> None:
    hint = "export it again; an artifact is never edited in place"
    for file in manifest.files:
        path = safe_join(folder, file.path)
        if not path.is_file():
            raise BadInput(f"{folder.name}: payload file {file.path} is missing", hint=hint)
        if path.stat().st_size != file.size_bytes or hash_file(path) != file.sha256:
            raise BadInput(f"{folder.name}: payload file {file.path} does not match its sha256", hint=hint)
    if artifact_id(manifest.files) != manifest.artifact_id:
        raise BadInput(f"{folder.name}: artifact_id does not match its files", hint=hint)
    known = {file.path for file in manifest.files} | NOT_PAYLOAD
    extra = [str(path) for path in list_files(folder) if str(path) not in known]
    if extra:
        raise BadInput(f"{folder.name}: file {extra[0]} is not listed in {ARTIFACT_FILE}", hint="remove it")


def _parse(path: Path) -> Manifest:
    raw = read_json(path)
    try:
        if raw["schema_version"] != SCHEMA_VERSION:
            raise BadInput(
                f"{path} has schema_version {raw['schema_version']}, this edgestill reads {SCHEMA_VERSION}",
                hint="export it again with this version",
            )
        manifest = Manifest(
            **{
                **raw,
                "inputs": _specs(raw["inputs"]),
                "outputs": _specs(raw["outputs"]),
                "labels": tuple(raw.get("labels", ())),
                "files": tuple(_file(row) for row in raw["files"]),
                "dtype_histogram": {name: Histogram(**row) for name, row in raw["dtype_histogram"].items()},
            }
        )
        _check_types(manifest)
        return manifest
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is not an artifact description: {error}", hint="export it again") from None


def _file(row: Mapping[str, Any]) -> FileEntry:
    size = row["size_bytes"]
    if type(size) is not int or size < 0:  # JSON as Python reads it has infinities too
        raise TypeError(f"size_bytes is {size!r:.80}, not a number of bytes")
    return FileEntry(str(row["path"]), str(row["sha256"]), size)


def _check_types(manifest: Manifest) -> None:
    """What code below relies on without looking: raise ``TypeError`` naming the field."""
    for name in ("quantisation", "entry", "contents", "artifact_id", "prompt_prefix"):
        if not isinstance(getattr(manifest, name), str):
            raise TypeError(f"{name} is not text")
    for name in ("max_length", "vocab_size"):
        if type(getattr(manifest, name)) is not int:
            raise TypeError(f"{name} is not a whole number")
    for name, known in (("format", Format), ("task", Task), ("pooling", Pooling)):
        value = getattr(manifest, name)
        if value not in get_args(known) and not (name == "pooling" and value is None):
            raise TypeError(f"{name} is {value!r}, not one of {', '.join(get_args(known))}")
    for name in ("minimum_runtime", "lineage"):
        if not isinstance(getattr(manifest, name), Mapping):
            raise TypeError(f"{name} is not an object")


def _specs(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    specs = tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)
    for spec in specs:
        if not isinstance(spec.name, str) or not isinstance(spec.dtype, str):
            raise TypeError("an input or output has a name or a dtype that is not text")
        if any(type(size) not in (int, str) for size in spec.shape):
            raise TypeError(f"the shape of {spec.name!r:.80} is not of numbers and names")
    return specs
