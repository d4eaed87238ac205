"""``life_ours.py SPEC.json``: one life of a distillation; says on stdout how far it is, and may be killed anywhere."""

import json
import sys
from pathlib import Path
from typing import Any

from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.recipe import DistillConfig, StudentConfig

spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())


def progress(message: str, fraction: float | None = None) -> None:
    print(message, flush=True)


texts = spec["texts"]
distill(
    Path(spec["teacher"]), Path(spec["out"]), student=StudentConfig(layers=spec["layers"]),
    config=DistillConfig.model_validate(spec["config"]),
    data=DataSets((TextSet("words", tuple(texts[:-20]), (), tuple(texts[-20:]), (), "0" * 64),), ()),
    max_length=32, work=Path(spec["work"]), progress=progress,
)  # fmt: skip
