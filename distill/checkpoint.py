"""Training checkpoints on disk: whole or not there, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import pickle  # for the name of its error only
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput, ResourceExhausted
from ..files import atomic_directory, disk_errors

__all__ = [
    "find_checkpoint",
    "full_disk_is_said",
    "load_torch_state",
    "save_torch_state",
    "sweep_checkpoints",
    "write_checkpoint",
]

SIZES_FILE = "checkpoint.json"


@contextlib.contextmanager
def write_checkpoint(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well, together with the sizes of its files."""
    with atomic_directory(target) as folder:
        yield folder
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / SIZES_FILE).write_text(json.dumps(sizes), encoding="utf-8")


def find_checkpoint(work: Path) -> tuple[Path, int] | None:
    """The newest whole ``checkpoint-STEP`` and its step; incomplete ones are passed over."""
    for path, step in _all(work):
        if _is_whole(path):
            return path, step
    return None


def sweep_checkpoints(work: Path, keep: Path | None) -> None:
    """Remove all checkpoints but ``keep``, and what killed processes left half-written."""
    for path, _ in _all(work):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in work.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save_torch_state(value: Any, path: Path) -> None:
    """``torch.save`` through Python's own file, so that a full disk is an ``OSError`` and no C++ error."""
    with full_disk_is_said(path), path.open("wb") as stream:
        torch.save(value, stream)


@contextlib.contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Turn torch's error about a failed write into :class:`ResourceExhausted` when the disk of ``path`` is full."""
    with disk_errors(path):
        try:
            yield
        except RuntimeError as error:
            # torch reports a failed write from its destructor, too, and hides the OSError behind it.
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            if shutil.disk_usage(path.parent).free < 1 << 20:
                raise ResourceExhausted(
                    f"no space left while writing {path}", hint="free some room, then run the same command again"
                ) from error
            raise


def load_torch_state(path: Path) -> Any:
    """What :func:`save_torch_state` wrote; tensors and plain values only (``weights_only``)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"checkpoint {path} is damaged: {reason}", hint=f"remove {path.parent} and run the same command again"
        ) from None


def _all(work: Path) -> list[tuple[Path, int]]:
    names = [path for path in work.iterdir() if path.is_dir()] if work.is_dir() else []
    matches = [(path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in names]
    return sorted(((path, int(match[1])) for path, match in matches if match), key=lambda item: -item[1])


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / SIZES_FILE).read_text(encoding="utf-8"))
        return bool(sizes) and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
