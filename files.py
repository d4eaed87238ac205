"""Files that are either whole or not there: hashes, atomic writes, safe paths. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BadInput, ResourceExhausted

__all__ = [
    "atomic_directory",
    "atomic_write",
    "canonical_json",
    "check_links",
    "check_place",
    "hash_bytes",
    "hash_file",
    "hash_json",
    "hash_tree",
    "is_alive",
    "list_files",
    "read_json",
    "safe_join",
]

_CHUNK_BYTES = 1 << 20
_LONGEST_PATH = 2000


def hash_bytes(data: bytes) -> str:
    """sha256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's content, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(value: Any) -> str:
    """sha256 of :func:`canonical_json`."""
    return hash_bytes(canonical_json(value).encode())


def list_files(root: Path) -> list[PurePosixPath]:
    """Regular files below ``root``, relative and sorted by their POSIX path. Symbolic links are refused."""
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder", hint="check the path")
    found = []
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(folder) / name
            if path.is_symlink():
                raise BadInput(
                    f"{Path(folder) / name} is a symbolic link", hint="replace it with the file it points to"
                )
        found += [PurePosixPath((Path(folder) / name).relative_to(root).as_posix()) for name in files]
    return sorted(found, key=str)


def hash_tree(root: Path) -> str:
    """sha256 over the sorted (path, sha256) of the files below ``root``; a single file hashes as itself."""
    if root.is_file():
        return hash_file(root)
    return hash_json([[str(path), hash_file(root / path)] for path in list_files(root)])


def safe_join(root: Path, relative: str) -> Path:
    """``root / relative``, or :class:`BadInput` when that path would leave ``root`` (``..``, absolute, symlink)."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        raise BadInput(f"unsafe path {relative!r} inside {root}", hint="a path must stay inside its folder")
    if any(len(part.encode(errors="surrogatepass")) > 255 for part in pure.parts) or len(relative) > _LONGEST_PATH:
        raise BadInput(f"a path of {len(relative)} characters inside {root}", hint="no file system holds such a name")
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        raise BadInput(f"unsafe path {relative!r} inside {root}", hint="a path must be text that encodes") from None
    joined = root.joinpath(*pure.parts)
    if not _real(joined).is_relative_to(_real(root)):
        raise BadInput(f"path {relative!r} leaves {root} through a link", hint="replace the link with the file")
    return joined


def _real(path: Path) -> Path:
    """Without links; unlike ``Path.resolve`` it does not fail on links that lead in a circle."""
    return Path(os.path.realpath(path))


def check_links(root: Path) -> None:
    """:class:`BadInput` for a symbolic link below the folder ``root`` that leads out of it, or nowhere."""
    inside = _real(root)
    for folder, names, files in os.walk(root):
        for name in sorted([*names, *files]):
            path = Path(folder) / name
            if path.is_symlink() and not (_real(path).is_relative_to(inside) and path.exists()):
                raise BadInput(f"{path} is a symbolic link that leaves its folder", hint="replace it with a real file")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is :class:`BadInput` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", hint="check the path") from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}", hint="check the path and its permissions") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}", hint="fetch or write the file again") from None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "file too large" into :class:`ResourceExhausted` naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"no space left while writing {path}", hint="free some room, then run the same command again"
            ) from error
        if error.errno == errno.EFBIG:
            raise ResourceExhausted(
                f"a file outgrew what may be written while writing {path}",
                hint="raise the limit (ulimit -f), or choose a file system for files of this size",
            ) from error
        raise


def check_place(path: Path) -> None:
    """That a file can be written to ``path``, for commands to ask before they spend minutes on its content.

    Raises :class:`BadInput` for a folder, and for a file in a folder that is not there (a slip of the pen more often
    than a wish: it is not made) or that may not be written to.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder", hint="name a file in it")
    if not path.parent.exists():
        raise BadInput(f"{path} can't be written: there is no folder {path.parent}", hint=f"mkdir -p '{path.parent}'")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(
            f"{path} can't be written: {path.parent} is no folder that you may write to", hint="choose another"
        )


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``: temporary file in the same folder, fsync, rename."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes when not.

    An existing ``target`` is replaced. Left-overs of processes that were killed are swept first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        owner = stale.name.removeprefix(f".{target.name}.").split(".")[0]
        if not (owner.isdigit() and is_alive(int(owner))):
            shutil.rmtree(stale, ignore_errors=True)
    with disk_errors(target):
        prefix = f".{target.name}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            for path in list_files(temporary):
                with (temporary / path).open("rb") as stream:
                    os.fsync(stream.fileno())
            if target.is_dir() and not target.is_symlink():
                # Aside first: a kill between the two renames must not find a folder that is half removed.
                aside = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
                os.replace(target, aside / target.name)
                os.replace(temporary, target)
                shutil.rmtree(aside, ignore_errors=True)
            elif target.exists() or target.is_symlink():
                raise BadInput(f"{target} exists and is not a folder", hint="choose another place, or remove it")
            else:
                os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_alive(pid: int) -> bool:
    """Whether a process with this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
