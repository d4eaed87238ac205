"""lm-eval's ``hf`` model and ours on local tasks: what each said to each request, as JSON.

lm_eval_both_ours.py MODEL_FOLDER ARTIFACT TASK_FOLDER RESULT.json
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from edgestill.bench.lm_eval_bridge import edgestill_model

TASKS = ("quiz", "rolling", "writing")


def main(model: str, artifact: str, tasks: str, result: str) -> None:
    manager = TaskManager(include_path=tasks, include_defaults=False)
    models = {
        "hf": HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4, max_length=128),
        "edgestill": edgestill_model(artifact=artifact, threads=1, batch_size=4),
    }
    found: dict[str, dict[str, object]] = {"acc": {}, "acc_norm": {}}
    for name, one in models.items():
        done = lm_eval.simple_evaluate(
            model=one, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        found[name] = {}
        for task in TASKS:
            samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
            found[name][task] = [_numbers(sample["resps"]) for sample in samples]
        for metric in ("acc", "acc_norm"):
            found[metric][name] = done["results"]["quiz"][f"{metric},none"]
    Path(result).write_text(json.dumps(found))


def _numbers(responses: list) -> object:
    """Of each response: a text, a number, or a number and whether it is greedy."""
    plain = [response[0] for response in responses]
    return [[float(part) for part in one] if isinstance(one, tuple | list) else one for one in plain]


if __name__ == "__main__":
    main(*sys.argv[1:])
