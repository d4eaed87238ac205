"""Whether ``edgestill bench`` and llama.cpp's own ``llama-bench`` measure the same speed on the same GGUF file.

It is a test of equivalence: the two agree when the whole interval of their ratio lies within 2 % of 1 (two one-sided
tests; with a 95 % interval each at 2.5 %). The figure is the distance of the ratio from 1, so that one limit serves
both sides; its interval begins at 0 when that of the ratio holds 1. A busy machine widens the interval, and what then
spans the limit is undecided.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.artifact import Artifact
from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import Interval, ratio_interval
from edgestill.errors import EdgestillError
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

from ..context import Context, busy_note
from ..llamacpp_tools import llama_tools
from ..processes import surroundings
from ..registry import Taken, figure

VARIANTS = ("gguf:q8_0 prefill", "gguf:q8_0 decode", "gguf:q4_k_m prefill", "gguf:q4_k_m decode")
LIMIT = 0.02
PROMPT_TOKENS, NEW_TOKENS = 128, 33
SAMPLES = 10  # in each process
_WARM_UP = 2
_MOST_SECONDS = 1800

# Seconds a token of one process, by what was timed.
Seconds = dict[str, list[float]]


@figure(
    "llama_bench_ratio", group="measure", title="tokens/s of edgestill bench over llama-bench's: distance from 1",
    unit="of 1", limit=LIMIT, sense="at_most", variants=VARIANTS, peer="llama-bench linked to the same engine",
)  # fmt: skip
def llama_bench_ratio(context: Context, variant: str) -> Taken:
    to, _, what = variant.partition(" ")
    theirs, ours, prompt, busy, engine = context.once(("llama-bench", to), lambda: _both(context, to))
    ratio = ratio_interval([run[what] for run in theirs], [run[what] for run in ours])
    tokens = f"{prompt} prompt tokens" if what == "prefill" else f"{NEW_TOKENS - 1} tokens after {prompt}"
    how = (
        f"ratio {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f}); {tokens}; {context.repeats} pairs of "
        f"processes, alternating, {len(ours[0][what])} samples in each; {engine}, {context.threads} threads, KV cache "
        f"f16, flash attention auto; {context.model_note('decoder')}"
    )
    value, low, high = distance(ratio)
    doubt = f"{busy} while it ran" if busy else ""
    return Taken(value, f"{how}; {busy}" if busy else how, (low, high), doubt=doubt, void=context.void)


def distance(ratio: Interval) -> tuple[float, float, float]:
    """How far a ratio is from 1, and the least and the most that its interval allows."""
    ends = sorted(abs(end - 1) for end in (ratio.low, ratio.high))
    least = 0.0 if ratio.low <= 1 <= ratio.high else ends[0]
    return abs(ratio.value - 1), least, ends[1]


def _both(context: Context, to: str) -> tuple[list[Seconds], list[Seconds], int, str, str]:
    """Samples of llama-bench and ours from fresh processes that take turns (A B, B A, …); the prompt's length."""
    tools = llama_tools(context.progress)
    theirs: list[Seconds] = []
    ours: list[Seconds] = []
    with context.artifact("decoder", to) as artifact, LoadProbe() as probe:
        prompt = min(PROMPT_TOKENS, artifact.manifest.max_length - NEW_TOKENS)  # a tiny model takes less
        for pair in range(context.repeats):
            context.progress(f"{to}: pair {pair + 1} of {context.repeats}")
            turns = [
                lambda: theirs.append(_llama_bench(tools.bench, artifact.entry, prompt, context.threads)),
                lambda: ours.append(_edgestill(artifact, prompt, context.threads)),
            ]
            for turn in turns if pair % 2 == 0 else turns[::-1]:
                turn()
    return theirs, ours, prompt, busy_note(probe), tools.engine


def _edgestill(artifact: Artifact, length: int, threads: int) -> Seconds:
    """What ``edgestill bench`` takes its tokens/s from: time to the first token, and the tokens after it."""
    prompt = np.random.default_rng(0).integers(3, artifact.manifest.vocab_size, length).tolist()
    with LocalWorker(artifact.path, SessionOptions(threads=threads), timeout=_MOST_SECONDS) as worker:
        runs = worker.time_decode(prompt, NEW_TOKENS, repeats=SAMPLES, warmup=_WARM_UP, max_seconds=_MOST_SECONDS)
    return {
        "prefill": [run["first_s"] / length for run in runs],
        "decode": [sum(run["tokens_s"]) / len(run["tokens_s"]) for run in runs],
    }


def _llama_bench(program: Path, model: Path, length: int, threads: int) -> Seconds:
    """The same two as llama-bench sees them: ``pp128``, and ``tg32`` at a depth of 128 tokens."""
    common = ["-m", str(model), "-t", str(threads), "-r", str(SAMPLES), "-o", "json", "-ngl", "0"]
    count = NEW_TOKENS - 1
    prefill = _run([str(program), *common, "-p", str(length), "-n", "0"], threads)
    decode = _run([str(program), *common, "-p", "0", "-n", str(count), "-d", str(length)], threads)
    return {"prefill": _samples(prefill, length), "decode": _samples(decode, count)}


def _run(command: Sequence[str], threads: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        command, env=surroundings(threads), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        timeout=_MOST_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise EdgestillError(f"llama-bench ended with {done.returncode}: {' | '.join(lines[-2:])[:300]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _samples(rows: Sequence[dict[str, Any]], tokens: int) -> list[float]:
    """Seconds a token of llama-bench's only test; its own tokens/s must follow from them."""
    [row] = rows
    if row["n_prompt"] + row["n_gen"] != tokens:
        raise EdgestillError(f"llama-bench timed {row['n_prompt']} + {row['n_gen']} tokens instead of {tokens}")
    seconds = [int(sample) / 1e9 / tokens for sample in row["samples_ns"]]
    mean = float(np.mean([1 / second for second in seconds]))
    if abs(mean / float(row["avg_ts"]) - 1) > 1e-3:
        raise EdgestillError(f"llama-bench's samples give {mean:.2f} tokens/s, it says {row['avg_ts']}")
    return seconds
