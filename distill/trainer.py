"""The training loop: transformers' Trainer, with the teacher, exact step counts and checkpoints that survive kills."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import EdgestillError
from ..files import read_json
from ..progress import Progress, silent
from ..recipe import DistillConfig
from .batches import Batch, Examples, collate, plan_batches
from .checkpoint import load_torch_state, save_torch_state, sweep_checkpoints, write_checkpoint
from .journal import Journal
from .objective import Counts, Objective, count_items
from .rollout import Rollouts
from .teacher import Said, Teacher

__all__ = ["DistillTrainer", "training_arguments"]

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
WEIGHTS_FILE, CLOCK_FILE, ROLLOUT_FILE = "weights.pt", "clock.json", "rollout.json"


def training_arguments(config: DistillConfig, steps: int, work: Path) -> transformers.TrainingArguments:
    """The Trainer's settings for ``steps`` optimiser steps: silent, without hub, evaluation or reports."""
    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        lr_scheduler_type=SCHEDULES[config.schedule],
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
        report_to=[],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel: it splits batches that count together
    return arguments


class DistillTrainer(transformers.Trainer):
    """Trains an :class:`Objective` against a :class:`Teacher`.

    The order of the batches is fixed beforehand; the loss of each forward pass is divided by the counts of its whole
    optimiser step; each step's raw components go to the ``journal``.
    """

    # The Trainer would divide once more by the number of accumulated passes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        teacher: Teacher | None,
        examples: Examples,
        config: DistillConfig,
        arguments: transformers.TrainingArguments,
        *,
        pad_id: int,
        journal: Journal,
        seconds: float = 0.0,
        progress: Progress = silent,
        rollouts: Rollouts | None = None,
    ) -> None:
        self._rollouts = rollouts
        self._teacher = teacher
        self._journal = journal
        self._progress = progress
        self._parts: Tensor | None = None
        self._began = time.monotonic() - seconds
        self._plan = plan_batches(
            examples.lengths, config.batch_size, config.gradient_accumulation, arguments.max_steps, config.seed
        )
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=examples,
            data_collator=lambda rows: collate(rows, pad_id),
        )
        self.remove_callback(transformers.PrinterCallback)

    @property
    def seconds(self) -> float:
        """Wall seconds so far, those before a kill included (up to the checkpoint that was resumed from)."""
        return time.monotonic() - self._began

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """All forward passes of the run in their planned order, as one epoch."""
        loader: DataLoader[Batch] = DataLoader(
            self.train_dataset, batch_sampler=self._plan, collate_fn=self.data_collator, num_workers=0
        )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Counts]:
        """The forward passes of one optimiser step, rewritten by the student where that is its turn, and their counts.

        Here and not in the data loader: that one reads ahead, so the student would write with older weights.
        """
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rollouts is None or not batches:
            return batches, counts
        batches = self._rollouts.take(self.model.student, batches, self.state.global_step + 1)
        return batches, count_items(batches)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Counts:
        return count_items(batch_samples)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Counts | None = None
    ) -> Any:
        """The loss of one forward pass, divided by the counts of the whole optimiser step."""
        counts = count_items([inputs]) if num_items_in_batch is None else num_items_in_batch
        said = self._teacher.say(inputs) if self._teacher is not None else Said()
        loss, parts = model(inputs, said, counts)
        if not bool(torch.isfinite(loss)):
            raise EdgestillError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}",
                hint="lower [distill] learning_rate, or raise warmup_ratio",
            )
        self._parts = parts if self._parts is None else self._parts + parts
        return (loss, parts) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a step's line to the journal and tell callbacks and ``progress``."""
        if "learning_rate" not in logs or self._parts is None:
            return  # the Trainer's closing summary, which holds times
        step, steps = self.state.global_step, self.state.max_steps
        row: dict[str, Any] = {
            "step": step,
            "loss": logs["loss"],
            **dict(zip(self.model.losses, self._parts.tolist(), strict=True)),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "tokens": int(self.state.num_input_tokens_seen),
        }
        if self._rollouts is not None:
            row |= {"words": self._rollouts.words, "ratio": self._rollouts.ratio}
        self._parts = None
        self._journal.append(row)
        self.control: Any = self.callback_handler.on_log(self.args, self.state, self.control, dict(row))
        self._progress(f"step {step} of {steps}, loss {row['loss']:.4f}", step / steps)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._journal.sync()
        with write_checkpoint(target) as folder:
            save_torch_state(self.model.state_dict(), folder / WEIGHTS_FILE)
            save_torch_state(self.optimizer.state_dict(), folder / "optimizer.pt")
            save_torch_state(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            if self._rollouts is not None:
                (folder / ROLLOUT_FILE).write_text(json.dumps(self._rollouts.state()), encoding="utf-8")
            (folder / CLOCK_FILE).write_text(f"{self.seconds:.3f}\n", encoding="utf-8")
        sweep_checkpoints(Path(self.args.output_dir), keep=target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(load_torch_state(Path(resume_from_checkpoint) / WEIGHTS_FILE))
        if self._rollouts is not None:
            self._rollouts.load(read_json(Path(resume_from_checkpoint) / ROLLOUT_FILE))
