"""What a distillation step costs: beside TRL on the same work, and beside plain fine-tuning."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import ratio_interval
from edgestill.errors import EdgestillError

from ..context import Context, busy_note
from ..environments import TRL
from ..processes import Conversation
from ..registry import Taken, figure
from ..workloads import row_ids, row_text, workload, write_spec

PLAIN = "transformers' Trainer: cross-entropy over full logits"
GKD = "TRL's GKDTrainer, lmbda=0"
BLOCKS = 2  # palindromes (ABBA, ABCCBA) in every round of fresh processes
_SAME_LOSS = 1e-3  # relative: sides that do the same work agree far better on every step
_SAME_WORK = ({"live", "trl"}, {"own", "plain"})

TOP_K = 64

Turns = Sequence[tuple[str, str]]
"""``(process, request)`` in the order in which they are made, of which every second block is the reverse."""
Samples = dict[tuple[str, str], list[list[float]]]


@figure(
    "trl_ratio", group="distill", title="time of a step with a live teacher, ours over TRL's", unit="ratio", limit=1.0,
    peer=GKD, environment=TRL,
)  # fmt: skip
def trl_ratio(context: Context, variant: str) -> Taken:
    context.environment(TRL)
    samples, versions, busy = rounds(context, ("live", "trl"), [("live", "step"), ("trl", "step")])
    found = ratio_interval(samples["live", "step"], samples["trl", "step"])
    what = f"forward KL on the same rows, weights, optimiser and losses; TRL {versions['trl']}"
    return taken(context, found, what, samples, busy)


@figure(
    "step_live", group="distill", title="step with a live teacher over (plain fine-tuning step + teacher forward)",
    unit="ratio", limit=1.05, peer=PLAIN,
)  # fmt: skip
def step_live(context: Context, variant: str) -> Taken:
    turns = [("live", "step"), ("plain", "step"), ("plain", "teacher")]
    samples, _, busy = rounds(context, ("live", "plain"), turns)
    parts = zip(samples["plain", "step"], samples["plain", "teacher"], strict=True)
    sums = [[one + two for one, two in zip(*part, strict=True)] for part in parts]
    found = ratio_interval(samples["live", "step"], sums)
    return taken(context, found, "forward KL", samples, busy)


@figure(
    "step_own", group="distill", title="our own cross-entropy step over the plain fine-tuning step", unit="ratio",
    peer=PLAIN,
)  # fmt: skip
def step_own(context: Context, variant: str) -> Taken:
    samples, _, busy = rounds(context, ("own", "plain"), [("own", "step"), ("plain", "step")])
    found = ratio_interval(samples["own", "step"], samples["plain", "step"])
    return taken(context, found, "cross-entropy on the same rows, losses compared", samples, busy)


def taken(
    context: Context, found: tuple[float, float, float], what: str, samples: Samples, busy: str
) -> Taken:  # fmt: skip
    value, low, high = found
    medians = ", ".join(
        f"{process} {request} {np.median(np.concatenate(taken)):.3g} s"
        for (process, request), taken in samples.items()
    )  # fmt: skip
    counted = next(iter(samples.values()))
    how = (
        f"{what}; {workload(context).what}; medians {medians}; {len(counted)} rounds of fresh processes, "
        f"{len(counted[0])} samples of each side in each, interleaved forth and back, {context.threads} threads"
    )
    return Taken(value, f"{how}; {busy}" if busy else how, (low, high), void=context.void)


def rounds(context: Context, processes: Sequence[str], turns: Turns) -> tuple[Samples, Mapping[str, str], str]:
    """Seconds of each turn by round; the processes stand next to each other and take turns."""

    def take() -> tuple[Samples, Mapping[str, str], str]:
        samples: Samples = {turn: [] for turn in turns}
        with LoadProbe() as probe:
            for number in range(context.repeats):
                context.progress(f"{' and '.join(processes)}: round {number + 1} of {context.repeats}")
                with _started(context, processes) as running:
                    versions = {name: process.version for name, process in running.items()}
                    _round(running, turns, samples, number)
        return samples, versions, busy_note(probe)

    return context.once(("steps", *processes, *turns), take)


def _round(
    running: Mapping[str, Conversation], turns: Turns, samples: Samples, number: int
) -> None:  # fmt: skip
    taken: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    for block in range(2 * BLOCKS + 1):
        losses = {}
        for process, request in turns if (block + number) % 2 == 0 else list(reversed(turns)):
            answer = running[process].ask({"what": request})
            if block:  # the first is for warming up
                taken[process, request].append(answer["seconds"])
            if request == "step":
                losses[process] = answer["loss"]
        for names in _SAME_WORK:
            values = [losses[name] for name in names & losses.keys()]
            if values and np.ptp(values) > _SAME_LOSS * max(values):
                raise EdgestillError(f"the sides don't do the same work: their losses are {losses}")
    for turn, seconds in taken.items():
        samples[turn].append(seconds)


@contextlib.contextmanager
def _started(context: Context, processes: Sequence[str]) -> Iterator[dict[str, Conversation]]:
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(_start(context, name)) for name in processes}


def _start(context: Context, name: str) -> Conversation:
    """One side. Where a teacher is cached its answers are on disk before the first step: the rounds share them."""
    work = workload(context)
    folder = context.scratch / f"steps-{name}"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    # One batch of rows: whatever the order, every step of every side is on the same ones.
    ids = row_ids(work, work.batch_size)
    steps = 2 * BLOCKS + 8
    config = {
        "loss": {"cross_entropy" if name == "own" else "forward_kl": 1.0}, "learning_rate": 1e-5, "weight_decay": 0.0,
        "warmup_ratio": 0.0, "schedule": "constant", "max_grad_norm": 1.0, "batch_size": work.batch_size,
        "max_steps": steps, "save_every": 10 * steps, "threads": context.threads,
    }  # fmt: skip
    if name == "cached":
        ids = row_ids(work, work.batch_size * steps)
        config["cache"] = {"top_k": TOP_K, "path": str(context.scratch / "token-cache")}
    spec = write_spec(
        folder / "spec.json", teacher=str(work.teacher), student=str(work.student), layers=work.student_layers,
        length=work.length, ids=ids, texts=[row_text(row) for row in ids], steps=steps, beta=0.0, work=str(folder),
        config=config,
    )  # fmt: skip
    if name == "trl":
        return Conversation(context.environment(TRL).python, "gkd_trl", [spec], context.threads)
    if name == "plain":
        return Conversation(Path(sys.executable), "finetune_plain", [spec], context.threads)
    return Conversation(Path(sys.executable), "distill_ours", [spec], context.threads, ours=True)
