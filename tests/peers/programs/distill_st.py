"""``distill_st.py SPEC.json OUT.json``: sentence-transformers' own recipe for model distillation.

As in its examples (model_distillation.py): the student is the teacher with some layers left, and learns the teacher's
embeddings, computed beforehand, by ``MSELoss``; batch 64, rate 1e-4. It gets ``seconds`` of wall time, the teacher's
reading included: the speed of the first steps says how many there can be.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    __version__,
    losses,
    models,
)
from transformers import PrinterCallback

spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
began = time.monotonic()
BATCH, TRIAL = 64, spec["trial_steps"]


def build() -> SentenceTransformer:
    word = models.Transformer(spec["teacher"], max_seq_length=spec["length"])
    width = word.auto_model.config.hidden_size
    return SentenceTransformer(modules=[word, models.Pooling(width, "mean"), models.Normalize()], device="cpu")


teacher, student = build(), build()
layers = student[0].auto_model.encoder.layer
student[0].auto_model.encoder.layer = torch.nn.ModuleList([layers[index] for index in spec["keep"]])
student[0].auto_model.config.num_hidden_layers = len(spec["keep"])
vectors = teacher.encode(spec["texts"], batch_size=BATCH, show_progress_bar=False)
data = Dataset.from_dict({"sentence": spec["texts"], "label": vectors.tolist()})


def train(steps: int) -> float:
    begin = time.monotonic()
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=spec["work"], max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-4,
            warmup_steps=math.ceil(0.1 * steps), save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            seed=0,
        ),
        train_dataset=data,
        loss=losses.MSELoss(model=student),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return time.monotonic() - begin


start = {name: value.clone() for name, value in student.state_dict().items()}
a_step = train(TRIAL) / TRIAL
student.load_state_dict(start)
# The trial was for the clock only: it costs the student nothing.
left = spec["seconds"] - (time.monotonic() - began) + TRIAL * a_step
steps = max(1, int(left / a_step))
train(steps)
student[0].auto_model.save_pretrained(spec["out"])
student.tokenizer.save_pretrained(spec["out"])
seconds = time.monotonic() - began - TRIAL * a_step
Path(sys.argv[2]).write_text(json.dumps({"steps": steps, "seconds": seconds, "version": __version__}))
