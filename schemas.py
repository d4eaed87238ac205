"""``schemas/*.json``: JSON schemas of the recipe, of every ``--json`` document and of what a run folder holds.

Generated from the types (``make schemas``); a test compares them with what is committed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic_write

__all__ = ["FOLDER", "generate", "write"]

FOLDER = Path(__file__).parent / "schemas"


def generate() -> dict[str, Mapping[str, Any]]:
    """File name -> JSON schema (draft 2020-12)."""
    from pydantic import TypeAdapter

    from .artifact import Manifest
    from .bench.records import Measurement, Verdict
    from .commands import BenchResult, ExportResult, VerifyResult
    from .delivery import RunResult
    from .doctor import DoctorReport
    from .plan import Plan
    from .recipe import Recipe

    types: dict[str, Any] = {
        "recipe": Recipe, "artifact": Manifest, "measurement": Measurement, "verdict": Verdict, "run": RunResult,
        "plan": Plan, "export": ExportResult, "verify": VerifyResult, "bench": BenchResult, "doctor": DoctorReport,
    }  # fmt: skip
    found: dict[str, Mapping[str, Any]] = {}
    for name, type_ in types.items():
        # Dataclasses are serialised whole, so in their documents every field is there; a recipe leaves defaults out.
        mode: Any = "validation" if name == "recipe" else "serialization"
        schema = TypeAdapter(type_).json_schema(mode=mode)
        found[f"{name}.json"] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return found


def write(folder: Path = FOLDER) -> list[Path]:
    """Write them all; returns the paths."""
    paths = []
    for name, schema in generate().items():
        atomic_write(folder / name, json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        paths.append(folder / name)
    return paths


if __name__ == "__main__":
    write()
