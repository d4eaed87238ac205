"""Our latency of an ONNX artifact against what ONNX Runtime's own profiler says of the very same runs."""

from __future__ import annotations

import statistics

import numpy as np

from edgestill.bench.environment import LoadProbe
from edgestill.bench.statistics import bootstrap_interval
from edgestill.errors import EdgestillError
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

from ..context import Context, busy_note
from ..registry import Taken, figure

VARIANTS = ("onnx:fp32", "onnx:int8", "onnx:int4")
TOKENS, RUNS, TINY_RUNS = 128, 60, 10
MARGIN = 0.02


@figure(
    "ort_ratio", group="measure", title="distance of our latency from ONNX Runtime's own, same runs", unit="fraction",
    limit=MARGIN, variants=VARIANTS, peer="the profiler of onnxruntime (model_run)",
)  # fmt: skip
def ort_ratio(context: Context, variant: str) -> Taken:
    """``|ratio - 1|`` of our time around a forward pass to the runtime's own time of that pass.

    An equivalence test (two one-sided tests, Schuirmann 1987; here at 2.5 % each): the figure holds when the 95 %
    interval of the median ratio lies within ±2 %. Both clocks see the same runs, so a busy machine moves
    both; it can only lengthen what lies between them.
    """
    ratios: list[float] = []
    launches: list[int] = []
    times: list[float] = []
    runs = TINY_RUNS if context.tiny else RUNS
    with context.artifact("encoder", variant) as artifact, LoadProbe() as probe:
        length = min(TOKENS, artifact.manifest.max_length)
        ids = np.random.default_rng(0).integers(5, artifact.manifest.vocab_size, (1, length))
        for launch in range(max(2, context.repeats)):
            context.progress(f"{variant}: launch {launch + 1}")
            with LocalWorker(artifact.path, SessionOptions(threads=context.threads)) as worker:
                version = worker.info().version
                found = worker.profile(ids, repeats=runs)
            ours, theirs = found.phases[0].profiled_seconds, found.engine["model_run_s"]["forward"]
            if len(ours) != len(theirs):
                raise EdgestillError(f"{len(theirs)} runs in onnxruntime's profile of {len(ours)}")
            ratios += [a / b for a, b in zip(ours, theirs, strict=True)]
            launches += [launch] * len(ours)
            times += ours
    value = float(statistics.median(ratios)) - 1
    low, high = bootstrap_interval(ratios, "median", groups=launches, within=True)
    ends = (low - 1, high - 1)
    nearest = 0.0 if ends[0] <= 0 <= ends[1] else min(abs(end) for end in ends)
    how = (
        f"our time of a forward pass over onnxruntime {version}'s own of the same pass, median {1 + value:.4f}, batch "
        f"1 x {length} tokens, median pass {statistics.median(times) * 1e3:.3g} ms, {launches[-1] + 1} launches of "
        f"{runs} runs, {context.threads} threads, {context.model_note('encoder')}; two "
        "one-sided tests at 2.5 %"
    )
    busy = busy_note(probe)
    return Taken(
        abs(value), f"{how}; {busy}" if busy else how, (nearest, max(abs(end) for end in ends)), doubt=busy,
        void=context.void,
    )  # fmt: skip
