"""Samples for apps beside the artifacts that passed: the last step of an export that asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import hash_file
from .stages import RunFolder

if TYPE_CHECKING:
    from .artifact import Artifact
    from .recipe import ExportConfig, Recipe

__all__ = ["check_apps", "write_apps"]

# Raised by one when a template changes.
_VERSION = 1


def check_apps(recipe: Recipe) -> None:
    """Whether each sample that ``recipe`` asks for can be there, before the work; see :func:`.export.app.check_app`."""
    for config in recipe.export:
        for language in config.app:
            from .export.app import check_app

            check_app(language, config.format)


def write_apps(config: ExportConfig, artifact: Artifact, folder: RunFolder, out: Path | None = None) -> None:
    """The samples of one verified artifact: ``app/VARIANT/LANGUAGE/`` in the run folder, or below ``out``.

    They stand outside the artifact: its bytes, and so its id, don't know them. Raises what
    :func:`edgestill.export.app.write_app` raises.
    """
    for language in config.app:
        place = (out.resolve() if out else folder.path / "app") / config.variant / language

        def action(language: Any = language, place: Path = place) -> Mapping[str, Any]:
            from .export.app import write_app

            return {"note": str(write_app(artifact.path, language, place))}

        inputs = {
            "version": _VERSION, "language": language, "place": str(place.resolve()),
            "artifact": artifact.manifest.artifact_id, "manifest": hash_file(artifact.path / "artifact.json"),
        }  # fmt: skip
        relative = str(place if out else place.relative_to(folder.path))
        folder.stage(f"app:{config.variant}:{language}", inputs, action, [relative], f"{language} sample")
