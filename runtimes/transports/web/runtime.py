"""Where onnxruntime-web comes from: its npm package, pinned by sha256 and fetched once into the cache.

npm has no release with the number of our onnxruntime: the newest one below it is taken, and the version stands in every
measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ....fetch import fetch
from ....progress import Progress, silent

__all__ = ["FILES", "ORT_WEB_SHA256", "ORT_WEB_VERSION", "ort_web_files"]

ORT_WEB_VERSION = "1.30.0"
ORT_WEB_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page loads: the API, and the WebAssembly build with SIMD (threads only when asked for)."""


def ort_web_files(progress: Progress = silent) -> Mapping[str, Path]:
    """The files of :data:`FILES` on this machine, downloaded when they are not in the cache.

    Raises what :func:`edgestill.fetch.fetch` does: :class:`MissingDependency` without npm, :class:`BadInput` for a
    package with another sha256.
    """
    found = {}
    for name in FILES:
        address = f"npm:onnxruntime-web@{ORT_WEB_VERSION}!dist/{name}"
        found[name] = fetch(address, sha256=ORT_WEB_SHA256, progress=progress).path
    return found
