"""What the peers' training loops share: settings and the callback that waits for requests. No edgestill."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import transformers
from steps import Steps


def read_spec() -> dict[str, Any]:
    """The spec that is named on the command line."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return found


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """Arguments of any Trainer: the same optimiser work as ours, silent, nothing written."""
    config = spec["config"]
    return {
        "output_dir": spec["work"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": config["batch_size"],
        "learning_rate": config["learning_rate"],
        "weight_decay": config["weight_decay"],
        "max_grad_norm": config["max_grad_norm"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


class Wait(transformers.TrainerCallback):
    """Hands each step's loss over and waits for the next request."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.steps.end(lambda: float(logs["loss"]))
