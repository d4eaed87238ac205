"""The ``general.*`` keys of a GGUF file that say what a model is called and made of, both ways.

Names and types: ``docs/gguf.md`` of ggml and ``class Keys`` of its python package ``gguf``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .model_origin import SAMPLING, Named, Origin, is_setting

__all__ = ["origin_from_gguf", "origin_to_gguf"]

_TERMS = {"general.license.name": "license_name", "general.license.link": "license_link"}
_LISTS = {"general.tags": "tags", "general.languages": "languages"}
_NAMED = {"general.base_model": "base_models", "general.dataset": "datasets"}
_MOST = 100


def origin_to_gguf(origin: Origin, tags: Sequence[str]) -> dict[str, Any]:
    """Keys in the order in which llama.cpp's converter writes them, without name and licence id; ``tags`` come first.

    Whole numbers of ``general.sampling.*`` are int32, as the converter has them.
    """
    found: dict[str, Any] = {
        f"general.sampling.{key}": np.int32(value) if isinstance(value, int) else value
        for key, value in sorted(origin.sampling.items())
    }
    if origin.itself is not None and origin.itself.organization:
        found["general.organization"] = origin.itself.organization
    found |= {key: getattr(origin, name) for key, name in _TERMS.items() if getattr(origin, name)}
    if origin.itself is not None and origin.itself.repo_url:
        found["general.source.repo_url"] = origin.itself.repo_url
    for key, name in _NAMED.items():
        found |= dict(_numbered(key, getattr(origin, name)))
    found["general.tags"] = list(dict.fromkeys([*tags, *origin.tags]))
    if origin.languages:
        found["general.languages"] = list(origin.languages)
    return found


def _numbered(key: str, models: Sequence[Named]) -> Iterator[tuple[str, Any]]:
    if models:
        yield f"{key}.count", len(models)
    for index, model in enumerate(models):
        yield f"{key}.{index}.name", model.name
        if model.organization:
            yield f"{key}.{index}.organization", model.organization
        if model.repo_url:
            yield f"{key}.{index}.repo_url", model.repo_url


def origin_from_gguf(metadata: Mapping[str, Any]) -> Origin:
    """What a GGUF file says of its model; keys of another type than theirs are passed over, as llama.cpp does."""
    known: dict[str, Any] = {name: _texts(metadata.get(key)) for key, name in _LISTS.items()}
    known |= {name: tuple(_read_numbered(key, metadata)) for key, name in _NAMED.items()}
    known |= {name: _text(metadata.get(key)) for key, name in _TERMS.items()}
    settings: dict[str, Any] = {key: metadata.get(f"general.sampling.{key}") for key in SAMPLING.values()}
    known["sampling"] = {key: _shortest(value) for key, value in settings.items() if is_setting(value)}
    return Origin(_read_named("general", metadata, "source.repo_url"), **known)


def _read_numbered(key: str, metadata: Mapping[str, Any]) -> Iterator[Named]:
    count = metadata.get(f"{key}.count")
    for index in range(min(count, _MOST) if type(count) is int else 0):
        if model := _read_named(f"{key}.{index}", metadata, "repo_url"):
            yield model


def _read_named(key: str, metadata: Mapping[str, Any], url: str) -> Named | None:
    name = _text(metadata.get(f"{key}.name"))
    return (
        Named(name, _text(metadata.get(f"{key}.organization")), _text(metadata.get(f"{key}.{url}"))) if name else None
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 1000 else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if _text(text))[:_MOST] if isinstance(value, list) else ()


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 0.2, not 0.20000000298."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
