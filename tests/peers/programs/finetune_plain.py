"""``finetune_plain.py SPEC.json``: plain fine-tuning with transformers' Trainer, as a user has it: the model's own
cross-entropy over full logits. The request ``teacher`` is one forward pass of the teacher on the same batch."""

from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from steps import Steps
from trainer_plain import Wait, read_spec, settings

spec = read_spec()
rows = torch.tensor(spec["ids"])
batch = rows[: spec["config"]["batch_size"]]
student = transformers.AutoModelForCausalLM.from_pretrained(spec["student"], dtype=torch.float32)
teacher = transformers.AutoModelForCausalLM.from_pretrained(spec["teacher"], dtype=torch.float32).eval()


def ask_teacher() -> None:
    with torch.no_grad():
        teacher(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)


trainer = transformers.Trainer(
    model=student,
    args=transformers.TrainingArguments(**settings(spec)),
    train_dataset=[
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows
    ],
    callbacks=[Wait(Steps(transformers.__version__, {"teacher": ask_teacher}))],
)  # fmt: skip
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
