"""The worker protocol: JSON lines for control, raw files for tensors. The page for implementers is
``docs/worker-protocol.md``.

A client writes one request a line, ``{"id": 7, "op": "forward", …}``, and reads one reply a line,
``{"id": 7, "ok": true, "result": {…}}`` or ``{"id": 7, "ok": false, "error": {"kind", "message", "hint"}}``. Tensors
never pass through JSON (64 tokens of SmolLM2 logits would be 65 MB of it): both sides see one *exchange folder*, and a
message names the file, its dtype, shape and sha256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import errors
from ..errors import EdgestillError, WorkerError
from ..files import disk_errors, safe_join

__all__ = [
    "DTYPES",
    "MAX_LINE_BYTES",
    "OPERATIONS",
    "PROTOCOL_VERSION",
    "Exchange",
    "describe_error",
    "exchange_root",
    "pack",
    "rebuild_error",
    "unpack",
]

PROTOCOL_VERSION = 1
OPERATIONS = (
    "hello", "open", "info", "forward", "decode", "score", "time_forward", "time_decode", "memory", "facts", "sensors",
    "profile", "close",
)  # fmt: skip
MAX_LINE_BYTES = 16 << 20  # a line holds control only; more than this is not our protocol

# Name on the wire -> little-endian numpy type. Nothing else is accepted, objects least of all.
DTYPES = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8", "uint8": "|u1", "bool": "|b1"}

_KINDS: dict[str, type[EdgestillError]] = {
    name: getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)
}
_ROOMY_BYTES = 2 << 30


def exchange_root() -> Path:
    """Where exchange folders are made: shared memory when there is at least 2 GiB of it free, else the temp folder."""
    shared = Path("/dev/shm")
    try:
        stats = os.statvfs(shared)
        roomy = stats.f_bavail * stats.f_frsize >= _ROOMY_BYTES and os.access(shared, os.W_OK | os.X_OK)
    except (OSError, AttributeError):  # not there, or not a POSIX system
        roomy = False
    return shared if roomy else Path(tempfile.gettempdir())


def pack(message: Mapping[str, Any]) -> bytes:
    """One line of JSON, with its newline. NaN and infinity are refused: they are not JSON."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def unpack(line: bytes) -> dict[str, Any]:
    """Parse one line; :class:`WorkerError` shows the start of what is not a message."""
    try:
        message = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise WorkerError(f"not a protocol message: {line[:80]!r}", hint="one JSON object a line is expected")
    return message


class Exchange:
    """One side of an exchange folder: writes tensors for the other side, takes (reads and removes) what it wrote.

    ``side`` starts the names of the files written here, so that both sides can't collide (``"c"`` client, ``"w"``
    worker).
    """

    def __init__(self, folder: Path, side: str) -> None:
        self.folder = folder
        self._side = side
        self._count = 0

    def put(self, array: npt.ArrayLike) -> dict[str, Any]:
        """Write an array as a raw little-endian file in row-major order and return its reference for a message."""
        values = np.asarray(array)
        if values.dtype.name not in DTYPES:
            raise WorkerError(f"can't send a tensor of {values.dtype.name}", hint=f"known: {', '.join(DTYPES)}")
        name = values.dtype.name
        raw = np.ascontiguousarray(values, dtype=DTYPES[name])
        self._count += 1
        file = f"{self._side}{self._count}.bin"
        with disk_errors(self.folder / file):
            try:
                raw.tofile(self.folder / file)
            except FileNotFoundError:
                raise WorkerError("the exchange folder is gone: the worker is closed", hint="start another") from None
        return {"file": file, "dtype": name, "shape": list(values.shape), "sha256": _digest(raw)}

    def take(self, reference: Any) -> npt.NDArray[Any]:
        """Read the tensor that ``reference`` names and remove its file.

        Name, dtype and size are checked before anything is allocated, the sha256 after reading: :class:`WorkerError`.
        """
        try:
            file, name, digest = str(reference["file"]), str(reference["dtype"]), str(reference["sha256"])
            shape = tuple(int(size) for size in reference["shape"])
        except (KeyError, TypeError, ValueError):
            raise WorkerError(
                f"not a tensor reference: {str(reference)[:80]}", hint="file, dtype, shape, sha256"
            ) from None
        if name not in DTYPES or any(size < 0 for size in shape):
            raise WorkerError(
                f"tensor {file}: unknown dtype or shape {name} {shape}", hint=f"known: {', '.join(DTYPES)}"
            )
        path = safe_join(self.folder, file)
        if not path.is_file():
            raise WorkerError(f"tensor file {file} is missing", hint="write the file before the message that names it")
        dtype = np.dtype(DTYPES[name])
        if path.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise WorkerError(
                f"tensor {file}: {path.stat().st_size} bytes do not fit {name} {list(shape)}",
                hint="raw row-major values, nothing else",
            )
        values = np.fromfile(path, dtype=dtype).reshape(shape)
        path.unlink()
        if _digest(values) != digest:
            raise WorkerError(f"tensor {file} does not match its sha256", hint="it was damaged on the way")
        return values.astype(dtype.newbyteorder("="), copy=False)


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()


def describe_error(error: BaseException) -> dict[str, str]:
    """The ``error`` object of a reply: the class of :mod:`edgestill.errors` by name, the message, the hint, the trace.

    What is not of our tree becomes a ``WorkerError`` (running out of memory: ``ResourceExhausted``).
    """
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, EdgestillError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint, "trace": trace}
    if isinstance(error, MemoryError):
        text = f"the worker ran out of memory: {error}".removesuffix(": ")
        return {"kind": "ResourceExhausted", "message": text, "hint": "use a smaller batch or length", "trace": trace}
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {
        "kind": "WorkerError",
        "message": text[:500],
        "hint": "run again with --debug for the trace",
        "trace": trace,
    }


def rebuild_error(error: Any) -> EdgestillError:
    """The inverse of :func:`describe_error`; the worker's trace is attached as a note (``--debug`` shows it)."""
    if not isinstance(error, dict):
        return WorkerError(f"a reply without an error object: {str(error)[:80]}", hint="see docs/worker-protocol.md")
    kind = _KINDS.get(str(error.get("kind")), WorkerError)
    rebuilt = kind(str(error.get("message", "unknown error")), hint=str(error.get("hint", "")))
    if trace := error.get("trace"):
        rebuilt.add_note(f"in the worker:\n{trace}")
    return rebuilt
