"""What can be measured on, for ``edgestill devices``."""

from __future__ import annotations

from dataclasses import dataclass

from .runtimes.targets import SCHEMES

__all__ = ["TargetKind", "TargetList", "list_targets"]


@dataclass(frozen=True)
class TargetKind:
    """A kind of target: how it is typed, where its numbers come from, what it is."""

    address: str
    source: str
    description: str


@dataclass(frozen=True)
class TargetList:
    """All kinds of targets."""

    kinds: tuple[TargetKind, ...]
    schema_version: int = 1


def list_targets() -> TargetList:
    """The kinds of targets that this edgestill knows."""
    return TargetList(tuple(TargetKind(kind.form, kind.source, kind.description) for kind in SCHEMES.values()))
