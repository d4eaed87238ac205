"""The ``?name=value&…`` behind a target's address."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

from ...errors import UsageError, nearest

__all__ = ["parse_query"]


def parse_query(query: str, known: Sequence[str], target: str) -> dict[str, str]:
    """Options by name, percent-decoded; :class:`UsageError` for one that is not known, twice there, or empty.

    >>> parse_query("python=~/my%20env/bin/python3", ["python"], "ssh://board")
    {'python': '~/my env/bin/python3'}
    """
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in known:
            raise UsageError(f"{target}: unknown option {name!r}", hint=nearest(name, list(known)))
        if name in found or not value:
            raise UsageError(f"{target}: {name} {'stands there twice' if name in found else 'has no value'}")
        found[name] = unquote(value)
    return found
