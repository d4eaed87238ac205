"""Peak memory of the loss over a large vocabulary: in chunks against dense, each in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.bench.statistics import ratio_interval
from edgestill.errors import EdgestillError

from ..context import Context
from ..processes import PROGRAMS, launch
from ..registry import Taken, figure
from ..workloads import write_spec

PEER = "the same loss over full logits by torch's own functions"
TOP_K = 64
_LIMIT = 0.35
_SAME = 1e-4  # relative: both sides' value and norms of gradients
_MEGABYTE = 1e6


@figure(
    "chunked_memory", group="distill", title="peak memory of the chunked loss over the dense one, live teacher",
    unit="ratio", limit=_LIMIT, peer=PEER,
)  # fmt: skip
def chunked_memory(context: Context, variant: str) -> Taken:
    return _ratio(context, 0)


@figure(
    "chunked_memory_cached", group="distill", title=f"the same with a cached teacher, top {TOP_K} + tail",
    unit="ratio", peer=PEER,
)  # fmt: skip
def chunked_memory_cached(context: Context, variant: str) -> Taken:
    """No limit was set: the dense side holds only the student's logits here."""
    return _ratio(context, TOP_K)


def _ratio(context: Context, top_k: int) -> Taken:
    vocab_size, width, tokens = (512, 32, 256) if context.tiny else (49_152, 576, 1024)
    spec = write_spec(
        context.scratch / f"head-{top_k}.json", vocab_size=vocab_size, width=width, tokens=tokens, top_k=top_k
    )  # fmt: skip
    sides: tuple[list[list[float]], list[list[float]]] = ([], [])
    for number in range(context.repeats):
        context.progress(f"memory of the loss: {number + 1} of {context.repeats}")
        found = {}
        for side in (0, 1) if number % 2 else (1, 0):
            found[side] = _run(context, ("head_ours", "head_plain")[side], spec)
            sides[side].append([float(found[side]["peak_bytes"])])
        _compare(found[0], found[1])
    ratio = ratio_interval(*sides)
    megabytes = [float(np.median(np.concatenate(side))) / _MEGABYTE for side in sides]
    how = (
        f"{megabytes[0]:.0f} MB over {megabytes[1]:.0f} MB: peak resident set of forward and backward beyond what was "
        f"there before, gradients of head and states included; forward KL, vocabulary {vocab_size:,} x {width}, "
        f"{tokens:,} tokens, fp32; median of {len(sides[0])} processes of each, {context.threads} threads"
    )
    interval = (ratio.low, ratio.high) if len(sides[0]) > 1 else None
    return Taken(ratio.value, how, interval, void="a tiny vocabulary" if context.tiny else "")


def _run(context: Context, program: str, spec: Path) -> dict[str, Any]:
    out = context.scratch / f"{program}.json"
    launch([sys.executable, "-P", PROGRAMS / f"{program}.py", spec, out], threads=context.threads, cwd=context.scratch)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    first, second = (np.array([one["value"], *one["norms"]]) for one in (ours, theirs))
    if not np.allclose(first, second, rtol=_SAME, atol=0):
        raise EdgestillError(f"the two sides don't compute the same loss: {first.tolist()} and {second.tolist()}")
