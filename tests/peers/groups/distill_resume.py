"""Whether a distillation that is killed again and again ends with the same weights as one that is left alone."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgestill.errors import EdgestillError
from edgestill.files import hash_file

from ..context import Context
from ..models import Kind, tiny_model
from ..processes import PROGRAMS, surroundings
from ..registry import Taken, figure
from ..workloads import write_spec

STEPS = 9
KILLS = (1, 4, 7)
"""Optimiser steps after which a life ends, somewhere in the next one; checkpoints are written every two."""
_MOST_LIVES = len(KILLS) + 1

_SHARED: dict[str, Any] = {
    "batch_size": 2, "max_steps": STEPS, "save_every": 2, "learning_rate": 1e-3, "schedule": "cosine",
}  # fmt: skip
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "decoder, forward KL + cross-entropy, accumulated": (
        "decoder", {"loss": {"forward_kl": 0.9, "cross_entropy": 0.1}, "gradient_accumulation": 2},
    ),
    "decoder, cached teacher": ("decoder", {"loss": {"forward_kl": 1.0}, "cache": {"top_k": 8}}),
    "encoder, remembered vectors": ("encoder", {"loss": {"embedding_cosine": 1.0, "embedding_gram": 1.0}}),
}  # fmt: skip


@figure(
    "resume_identical", group="distill", title="killed runs that end with the same weights, bit for bit",
    unit="fraction", limit=1.0, sense="at_least", peer="the same run, left alone",
)  # fmt: skip
def resume_identical(context: Context, variant: str) -> Taken:
    """Each case runs once undisturbed and once through several ``kill -9``, in fresh processes on one thread."""
    same, lives = [], 0
    for number, (case, (kind, settings)) in enumerate(CASES.items()):
        context.progress(f"kill -9: {case}")
        folder = context.scratch / f"resume-{number}"
        alone, _ = _student(context, kind, settings, folder / "alone", kills=())
        killed, count = _student(context, kind, settings, folder / "killed", kills=KILLS)
        same.append(alone == killed)
        lives += count
    wrong = [case for case, equal in zip(CASES, same, strict=True) if not equal]
    how = (
        f"sha256 of the final weights; {len(CASES)} cases ({'; '.join(CASES)}), {STEPS} steps, {lives} lives ended by "
        f"kill -9 after steps {', '.join(map(str, KILLS))} and some milliseconds; one machine, one thread"
    )
    return Taken(sum(same) / len(same), how + (f"; not the same: {', '.join(wrong)}" if wrong else ""))


def _student(
    context: Context, kind: Kind, settings: dict[str, Any], folder: Path, kills: tuple[int, ...]
) -> tuple[str, int]:  # fmt: skip
    """The hash of the finished student's weights, and how many lives were ended."""
    teacher = context.once(("resume", kind), lambda: tiny_model(kind, context.scratch / f"resume-{kind}"))
    folder.mkdir(parents=True)
    spec = write_spec(
        folder / "spec.json", teacher=str(teacher.path), layers=1, texts=_texts(), out=str(folder / "student"),
        work=str(folder / "work"), config={**_SHARED, "threads": 1, **settings},
    )  # fmt: skip
    chooser = random.Random(str(folder.name))
    waiting = list(kills)
    for ended in range(_MOST_LIVES):
        if _life(spec, waiting[0] if waiting else None, chooser.uniform(0, 0.05)):
            if waiting:
                raise EdgestillError(f"the run was done before it could be killed after step {waiting[0]}")
            return hash_file(folder / "student" / "model.safetensors"), ended
        waiting.pop(0)
    raise EdgestillError("the run does not come to its end")


def _life(spec: Path, kill_after: int | None, delay: float) -> bool:
    """One process; whether it came to its end. It is killed ``delay`` seconds after step ``kill_after``."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAMS / "life_ours.py"), str(spec)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=surroundings(1),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            step = re.match(r"step (\d+) of ", line)
            if step and kill_after is not None and int(step[1]) >= kill_after:
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.kill()
                break
        _, errors = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode not in (0, -9):
        raise EdgestillError(f"a life ended by itself: {(errors.strip().splitlines() or ['no word'])[-1][:300]}")
    return process.returncode == 0


def _texts() -> list[str]:
    from ...conftest import WORDS

    chooser = random.Random(0)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(4, 12))) for _ in range(80)]
