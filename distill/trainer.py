"""The training loop: transformers' Trainer, with the teacher, exact step counts and checkpoints that survive kills."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from . import ranks
from .averaging import Average
from .batches import Batch, Examples, collate, plan_batches
from .checkpoint import full_disk_is_said, load_torch_state, save_torch_state, sweep_checkpoints, write_checkpoint
from .journal import Journal
from .objective import Counts, Objective, count_items
from .quantized import QuantisedWeights
from .rollout import Rollouts
from .stopping import EarlyStopping
from .stream import StreamedBatches, TokenStream
from .teacher import Said, Teacher

__all__ = ["DistillTrainer", "training_arguments"]

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
WEIGHTS_FILE, CLOCK_FILE, ROLLOUT_FILE = "weights.pt", "clock.json", "rollout.json"
EXTRA_FILE, STATE_FILE = "extra.pt", "trainer_state.json"
_Part = Average | EarlyStopping | TokenStream | QuantisedWeights
STOP = "stop"  # travels with the counts: how many processes were asked to stop


def training_arguments(config: DistillConfig, steps: int, work: Path) -> transformers.TrainingArguments:
    """The Trainer's settings for ``steps`` optimiser steps: silent, without hub, only the trackers asked for."""
    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // ranks.world(),
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
        report_to=list(config.report_to) if ranks.is_first() else [],
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        ignore_data_skip=config.streaming,  # a stream knows its own place
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel: it splits batches that count together
    return arguments


class DistillTrainer(transformers.Trainer):
    """Trains an :class:`Objective` against a :class:`Teacher`.

    The order of the batches is fixed beforehand; the loss of each forward pass is divided by the counts of its whole
    optimiser step; each step's raw components go to the ``journal``. ``measure`` gives the metrics of the student as
    it is, for ``config.evaluate_every``.

    Several processes (:mod:`.ranks`) cut each forward pass among them: the result is that of one process.
    """

    # The Trainer would divide once more by the number of accumulated passes.
    loss_is_scaled_for_ga = True
    control: Any

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
        measure: Callable[[], dict[str, float]] = dict,
        seconds: float = 0.0,
        progress: Progress = silent,
        rollouts: Rollouts | None = None,
        stream: TokenStream | None = None,
        quantised: QuantisedWeights | None = None,
    ) -> None:
        self._rollouts = rollouts
        self._teacher = teacher
        self._journal = journal
        self._progress = progress
        self._parts: Tensor | None = None
        self._began = time.monotonic() - seconds
        self._stream = stream
        plan: list[list[int]] = []
        if stream is None:
            plan = plan_batches(
                examples.lengths, config.batch_size, config.gradient_accumulation, arguments.max_steps, config.seed
            )
        self._plan = [rows[ranks.rank() :: ranks.world()] for rows in plan]
        self._batch_size, self._pad_id = config.batch_size, pad_id
        self._measure = measure
        self._evaluate_every = config.evaluate_every
        self._quantised = quantised
        weights = {name: weight for name, weight in objective.student.named_parameters() if weight.requires_grad}
        if quantised is not None:
            weights = quantised.trained
        self._average = Average(weights, config.ema) if config.ema else None
        self._stopping = EarlyStopping(weights, config.patience) if config.patience else None
        self._asked_to_stop = self._all_asked_to_stop = False
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=examples,
            data_collator=lambda rows: collate(rows, pad_id),
        )
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(_AfterStep(self))

    def learn(self, checkpoint: Path | None = None) -> None:
        """Train to the end, on from ``checkpoint`` if there is one; then the student holds the weights to keep.

        Those are the best measured ones (``patience``), else their moving average (``ema``), else the last ones. On
        SIGINT or SIGTERM the step is ended, a checkpoint written and :class:`KeyboardInterrupt` raised; a second one
        acts at once.
        """
        if checkpoint is not None:
            self._load_from_checkpoint(str(checkpoint))
        if self._stopping is not None and checkpoint is not None and self._stopping.exhausted:
            self.state = transformers.TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        else:
            with self._signals():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Asked in the last step, too: what comes after the training may take as long.
        if ranks.add_counts({STOP: int(self._asked_to_stop)})[STOP] or not self.is_over:
            raise KeyboardInterrupt
        if self._stopping is not None:
            self._stopping.restore()
        elif self._average is not None:
            self._average.apply()
        self._onto_the_grid()

    @property
    def is_over(self) -> bool:
        """Whether the last step is done, or early stopping said that this was it."""
        stopped = self._stopping is not None and self._stopping.exhausted
        return stopped or self.state.global_step >= self.state.max_steps

    @property
    def best_step(self) -> int | None:
        """The step whose weights early stopping found best."""
        return self._stopping.best_step if self._stopping is not None else None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM, so that training stops after the step that is under way."""
        before: dict[int, Any] = {}

        def note(number: int, _frame: Any) -> None:
            self._asked_to_stop = True
            signal.signal(number, before[number])
            self._progress("stopping after this step; once more stops at once")

        if threading.current_thread() is threading.main_thread():
            before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self) -> None:
        """What comes between an optimiser step and its log, measurement and checkpoint."""
        step = self.state.global_step
        if self._average is not None:
            self._average.update()
        every = self._evaluate_every
        if every and (step % every == 0 or (self._stopping is not None and step == self.state.max_steps)):
            self.control.should_evaluate = True
        if self._all_asked_to_stop:
            self.control.should_save = self.control.should_training_stop = True

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student (its moving average) on the dev split; early stopping looks at it."""
        with self._average.applied() if self._average is not None else contextlib.nullcontext():
            if self._average is not None:
                self._onto_the_grid()
            metrics = self._measure()
            step = self.state.global_step
            row: dict[str, Any] = {"step": step, "tokens": int(self.state.num_input_tokens_seen), "dev": metrics}
            if self._stopping is not None:
                self._stopping.saw(step, metrics)
        if self._average is not None:
            self._onto_the_grid()
        row["waited"] = self._stopping.waited if self._stopping is not None else 0
        self._journal.append(row)
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.callback_handler.on_log(self.args, self.state, self.control, dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        if self._stopping is not None and self._stopping.exhausted:
            self.control.should_save = self.control.should_training_stop = True
        return named

    def _onto_the_grid(self) -> None:
        """The masters were changed: the model gets what would ship of them."""
        if self._quantised is not None:
            self._quantised.refresh()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._quantised is not None:
            self._quantised.limit_gradients()
        return super()._clip_grad_norm(model)

    def around_step(self, after: bool) -> None:
        """The optimiser moves the float masters of quantised weights."""
        if self._quantised is not None:
            (self._quantised.after_step if after else self._quantised.before_step)()

    @property
    def seconds(self) -> float:
        """Wall seconds so far, those before a kill included (up to the checkpoint that was resumed from)."""
        return time.monotonic() - self._began

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """All forward passes of the run in their planned order, as one epoch; or those of an endless stream."""
        if self._stream is not None:
            streamed = StreamedBatches(self._stream, self._batch_size, self._pad_id, ranks.rank(), ranks.world())
            return DataLoader(streamed, batch_size=None, num_workers=0)
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
        return batches, ranks.add_counts(count_items(batches))

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Counts:
        counts = ranks.add_counts({**count_items(batch_samples), STOP: int(self._asked_to_stop)})
        self._all_asked_to_stop = counts.pop(STOP) > 0
        return counts

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Counts | None = None
    ) -> Any:
        """The loss of one forward pass, divided by the counts of the whole optimiser step."""
        counts = count_items([inputs]) if num_items_in_batch is None else num_items_in_batch
        said = self._teacher.say(inputs) if self._teacher is not None else Said()
        loss, parts = model(inputs, said, counts)
        if not bool(torch.isfinite(loss)):
            names = [
                name for name, part in zip(self.model.losses, parts.tolist(), strict=True) if not math.isfinite(part)
            ]
            raise EdgestillError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} ({', '.join(names)})",
                hint="lower [distill] learning_rate, or raise warmup_ratio",
            )
        self._parts = parts if self._parts is None else self._parts + parts
        loss = loss * ranks.world()  # gradients and the logged loss are averaged over processes, and shall be added up
        return (loss, parts) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a step's line to the journal and tell callbacks and ``progress``."""
        if "learning_rate" not in logs or self._parts is None:
            return  # the Trainer's closing summary, which holds times
        step, steps = self.state.global_step, self.state.max_steps
        row: dict[str, Any] = {
            "step": step,
            "loss": logs["loss"],
            **dict(zip(self.model.losses, ranks.add_up(self._parts).tolist(), strict=True)),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "tokens": int(self.state.num_input_tokens_seen),
        }
        if self._rollouts is not None:
            row |= {"words": self._rollouts.words, "ratio": self._rollouts.ratio}
        self._parts = None
        self._journal.append(row)
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)
        self._progress(f"step {step} of {steps}, loss {row['loss']:.4f}", step / steps)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        written = self._rollouts.state() if self._rollouts is not None else None
        if ranks.is_first():
            self._write_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", written)
        ranks.barrier()

    def _write_checkpoint(self, target: Path, written: list[dict[str, Any]] | None) -> None:
        self._journal.sync()
        with write_checkpoint(target) as folder:
            save_torch_state(self.model.state_dict(), folder / WEIGHTS_FILE)
            save_torch_state(self.optimizer.state_dict(), folder / "optimizer.pt")
            save_torch_state(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            if extra := {name: part.state_dict() for name, part in self._extra().items()}:
                save_torch_state(extra, folder / EXTRA_FILE)
            with full_disk_is_said(folder):
                self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / STATE_FILE))
            if written is not None:
                (folder / ROLLOUT_FILE).write_text(json.dumps(written), encoding="utf-8")
            (folder / CLOCK_FILE).write_text(f"{self.seconds:.3f}\n", encoding="utf-8")
        sweep_checkpoints(Path(self.args.output_dir), keep=target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.model.load_state_dict(load_torch_state(folder / WEIGHTS_FILE))
        if self._rollouts is not None:
            states = read_json(folder / ROLLOUT_FILE)  # a single one, before several processes could write
            self._rollouts.load(states if isinstance(states, list) else [states])
        if parts := self._extra():
            state = load_torch_state(folder / EXTRA_FILE)
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def _extra(self) -> dict[str, _Part]:
        """What a checkpoint holds beside the Trainer's own state."""
        parts: dict[str, _Part | None] = {
            "average": self._average, "stopping": self._stopping, "stream": self._stream, "masters": self._quantised,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}


class _AfterStep(transformers.TrainerCallback):
    """Calls :meth:`DistillTrainer.after_step`, when the Trainer has decided what it wants to do itself, and
    :meth:`DistillTrainer.around_step` right before and after the optimiser's."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.around_step(after=False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.around_step(after=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.after_step()
