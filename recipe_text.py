"""A recipe written back as TOML: what ``runs/NAME/recipe.toml`` and ``edgestill plan`` show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .recipe import Recipe

__all__ = ["dump_recipe"]


def dump_recipe(recipe: Recipe) -> str:
    """TOML with every default spelled out; reading it again gives an equal recipe.

    TOML has no null, so keys that are unset are left out.
    """
    return "\n".join(_table(recipe.model_dump(mode="json", exclude_none=True), ())).lstrip("\n") + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Plain keys first, then sub-tables, as TOML demands."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if not _is_table(value, path)]
    for key, value in values.items():
        if not _is_table(value, path):
            continue
        name = ".".join(_key(part) for part in (*path, key))
        for row in value if isinstance(value, list) else [value]:
            header = f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            lines += ["", header, *_table(row, (*path, key))]
    return lines


def _is_table(value: Any, path: tuple[str, ...]) -> bool:
    """Sections become tables; small maps inside a section (losses, filters) stay inline."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(row, dict) for row in value)
    return isinstance(value, dict) and not path


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    return json.dumps(value)


def _key(key: str) -> str:
    bare = bool(key) and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _string(key)


def _string(text: str) -> str:
    """A JSON string is a TOML basic string, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
