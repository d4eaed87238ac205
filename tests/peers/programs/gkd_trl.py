"""``gkd_trl.py SPEC.json``: TRL's ``GKDTrainer`` on given rows (``lmbda=0``: nothing is sampled)."""

import os
from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parent))
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import transformers
import trl
from steps import Steps
from trainer_plain import Wait, read_spec, settings
from trl.experimental.gkd import GKDConfig, GKDTrainer

spec = read_spec()
student, teacher = (
    transformers.AutoModelForCausalLM.from_pretrained(spec[name], dtype=torch.float32)
    for name in ("student", "teacher")
)
# One token of prompt, which the loss would not predict anyway: all others count, as in ours.
rows = [
    {"prompt": "w2", "input_ids": ids, "completion_mask": [0] + [1] * (len(ids) - 1)} for ids in spec["ids"]
]  # fmt: skip
trainer = GKDTrainer(
    model=student,
    teacher_model=teacher,
    args=GKDConfig(
        **settings(spec), lmbda=0.0, beta=spec["beta"], temperature=1.0, max_length=spec["length"],
        gradient_checkpointing=False,
    ),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=transformers.AutoTokenizer.from_pretrained(spec["teacher"]),
    callbacks=[Wait(Steps(trl.__version__))],
)  # fmt: skip
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
