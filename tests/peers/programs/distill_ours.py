"""``distill_ours.py SPEC.json``: our ``distill()``, one optimiser step a request."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from steps import Steps

from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.recipe import DistillConfig, StudentConfig

spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
work, out = Path(spec["work"]), Path(spec["work"]) / "student"
steps = Steps(torch.__version__)


def loss() -> float:
    last = (work / "training.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["loss"])


def progress(message: str, fraction: float | None = None) -> None:
    if message.startswith("step "):
        steps.end(loss)


distill(
    Path(spec["teacher"]), out, student=StudentConfig(layers=spec["layers"]),
    config=DistillConfig.model_validate(spec["config"]),
    data=DataSets((TextSet("rows", tuple(spec["texts"]), (), (), (), "0" * 64),), ()),
    max_length=spec["length"], work=work, progress=progress,
)  # fmt: skip
