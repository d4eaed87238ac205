"""Whether the bench holds: false alarms, slow-downs found, memory as others see it, its own cost, the quick look."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.artifact import Artifact
from edgestill.bench.compare import compare
from edgestill.bench.environment import LoadProbe
from edgestill.bench.measure import Subject, measure_speed
from edgestill.bench.paired import paired_ratio
from edgestill.benchmark import BenchRequest, bench_config
from edgestill.errors import EdgestillError
from edgestill.recipe import BenchConfig
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

from ..context import Context, busy_note
from ..processes import PROGRAMS, launch
from ..registry import Taken, Unavailable, figure

SLOWDOWN = 0.05
COMPARISONS, TINY_COMPARISONS = 100, 2
LENGTH = 32
HARNESS_SECONDS = 6.0


@dataclass(frozen=True)
class _Told:
    """What the comparisons said: of the artifact with itself, and with the slowed copy of itself."""

    count: int
    false_alarms: int
    found: int
    launches: float
    floor: float
    busy: str


@figure(
    "aa_false", group="measure", title="comparisons of an artifact with itself that say 'different', nominal 1 %",
    unit="of 100", limit=5, sense="at_most", peer="none: the truth is known", slow="an hour on two quiet cores",
)  # fmt: skip
def aa_false(context: Context, variant: str) -> Taken:
    told = context.once("comparisons", lambda: _comparisons(context))
    return Taken(100 * told.false_alarms / told.count, _how(told), doubt=told.busy, void=context.void)


@figure(
    "slowdown_found", group="measure", title="comparisons that find a true slow-down of 5 %", unit="of 100", limit=90,
    sense="at_least", peer="none: the truth is known", slow="an hour on two quiet cores",
)  # fmt: skip
def slowdown_found(context: Context, variant: str) -> Taken:
    told = context.once("comparisons", lambda: _comparisons(context))
    how = f"the slow copy burns {SLOWDOWN:.0%} of each pass's processor time; {_how(told)}"
    return Taken(100 * told.found / told.count, how, doubt=told.busy, void=context.void)


def _how(told: _Told) -> str:
    busy = f"; {told.busy}" if told.busy else ""
    return (
        f"{told.count} whole measurements of {told.launches:.1f} launches on average, noise floor {told.floor:.1%} "
        f"(median), onnx:int8 encoder, 1 x {LENGTH} tokens, 1 thread{busy}"
    )


def _comparisons(context: Context) -> _Told:
    """Measure an artifact, itself again and a slow copy of it, each time from the start with a seed of its own."""
    count = TINY_COMPARISONS if context.tiny else COMPARISONS
    floors: list[float] = []
    launches: list[int] = []
    alarms = found = 0
    with context.artifact("encoder", "onnx:int8") as artifact, tempfile.TemporaryDirectory() as scratch:
        names = ("base", "again", "slow")
        subjects = [Subject(name, _copy(artifact, Path(scratch) / name)) for name in names]
        ids = np.random.default_rng(0).integers(5, artifact.manifest.vocab_size, (1, LENGTH))
        with LoadProbe() as probe:
            for index in range(count):
                context.progress(
                    f"comparison {index + 1} of {count}; so far {alarms} false alarms, {found} slow-downs found"
                )
                config = _config(context.tiny, index)
                rows = measure_speed(
                    subjects, config, ids=ids, task="feature-extraction", open_worker=_open, kinds=("speed",)
                )
                told = {row.subject: row for row in compare(rows, "base", metrics=["latency_ms"])}
                if told["again"].ratio is None:
                    raise EdgestillError(f"nothing was measured: {told['again'].reason}")
                alarms += told["again"].outcome in ("better", "worse")
                found += told["slow"].outcome == "worse"
                protocol = next(row.protocol for row in rows if row.metric == "latency_ms")
                floors.append(protocol["noise_floor"])
                launches.append(protocol["launches"])
    return _Told(count, alarms, found, statistics.mean(launches), statistics.median(floors), busy_note(probe))


def _config(tiny: bool, seed: int) -> BenchConfig:
    """What `edgestill bench` does unasked, on one thread; less where nothing is judged."""
    config = bench_config(BenchRequest((), threads=1, length=LENGTH)).model_copy(update={"seed": seed})
    if tiny:
        config = config.model_copy(update={"launches": 3, "most_launches": 3, "repeats": 12, "max_seconds": 1.0})
    return config


def _copy(artifact: Artifact, out: Path) -> Path:
    """The same files by hard links: one page cache for all."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(artifact.path, out, copy_function=link)
    return out


def _open(folder: Path, options: SessionOptions, *, cold: bool = False) -> AbstractContextManager[Any]:
    if folder.name != "slow":
        return LocalWorker(folder, options, cold=cold)
    return LocalWorker(folder, options, cold=cold, command=_program("worker_slow_ours", options.threads, str(SLOWDOWN)))


def _program(name: str, threads: int, *before: str) -> list[str]:
    tail = ["--threads", str(threads), "--parent", str(os.getpid())]
    return [sys.executable, "-P", str(PROGRAMS / f"{name}.py"), *before, *tail]


@figure(
    "memory_ratio", group="measure", title="peak memory of a worker, ours over /usr/bin/time -v", unit="ratio",
    limit=1.02, sense="at_most", variants=("onnx:int8", "onnx:fp32", "gguf:q8_0"), peer="/usr/bin/time -v",
)  # fmt: skip
def memory_ratio(context: Context, variant: str) -> Taken:
    """The larger of ours over theirs and theirs over ours: within 2 % either way."""
    tool = shutil.which("time") or "/usr/bin/time"
    if not Path(tool).is_file():
        raise Unavailable("GNU time is not installed: apt-get install time")
    kind = "encoder" if variant.startswith("onnx") else "decoder"
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    with context.artifact(kind, variant) as artifact:  # type: ignore[arg-type]
        for _ in range(max(2, context.repeats)):
            ours.append([float(_work(LocalWorker(artifact.path, SessionOptions(threads=1)), artifact))])
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder) / "time.txt"
                command = [tool, "-v", "-o", str(report), *_program("worker_unreset_ours", 1)]
                command = command[: command.index("--parent")]  # its parent is `time`, not this process
                _work(LocalWorker(artifact.path, SessionOptions(threads=1), command=command), artifact)
                found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", report.read_text())
            if found is None:
                raise Unavailable(f"{tool} is not GNU time: apt-get install time")
            theirs.append([int(found[1]) * 1024.0])
    ratio = paired_ratio(ours, theirs, level=0.95)
    worst = [max(x, 1 / x) for x in ratio]
    how = (
        f"peak_rss_bytes of {len(ours)} fresh workers over the maximum resident set of as many others, "
        f"{ours[0][0] / 1e6:.1f} and {theirs[0][0] / 1e6:.1f} MB, ratio {ratio.value:.4f}, {context.model_note(kind)}"  # type: ignore[arg-type]
    )
    return Taken(worst[0], how, (1.0, max(worst)) if max(worst) > 1 else None)


def _work(worker: LocalWorker, artifact: Artifact) -> int:
    """What the bench does in a memory launch; the peak by the worker's own count."""
    ids = np.random.default_rng(0).integers(5, artifact.manifest.vocab_size, (1, LENGTH))
    with worker:
        worker.time_forward(ids, np.ones_like(ids), repeats=3, warmup=0)
        return int(worker.memory()["peak_rss"])


@figure(
    "harness_cpu", group="measure", title="processor time that the harness costs a worker while it is timed",
    unit="fraction", limit=0.01, sense="at_most", peer="the kernel's own accounting of threads",
)  # fmt: skip
def harness_cpu(context: Context, variant: str) -> Taken:
    """With one thread the model runs on the worker's main thread; whatever other threads use is ours."""
    shares = []
    seconds = 1.0 if context.tiny else HARNESS_SECONDS
    with context.artifact("encoder", "onnx:int8") as artifact, LoadProbe() as probe:
        ids = np.random.default_rng(0).integers(5, artifact.manifest.vocab_size, (1, LENGTH))
        for _ in range(context.repeats):
            with LocalWorker(artifact.path, SessionOptions(threads=1)) as worker:
                worker.time_forward(ids, np.ones_like(ids), repeats=3, warmup=0)
                shares.append(_share_of_others(worker, ids, seconds))
    how = (
        f"other threads' share of all processor time in {seconds:g} s of timed inferences (memory sampled every 10 ms, "
        f"requests read), from /proc/PID/task/*/schedstat; {context.repeats} workers, onnx:int8, "
        f"{context.model_note('encoder')}"
    )
    interval = (min(shares), max(shares)) if len(shares) > 1 else None
    # A starved worker is woken as often and gets less done: its share is too large on a busy machine.
    return Taken(statistics.median(shares), how, interval, doubt=busy_note(probe), void=context.void)


def _share_of_others(worker: LocalWorker, ids: Any, seconds: float) -> float:
    before = _thread_seconds(worker.pid)
    latest: dict[int, float] = dict(before)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            latest.update(_thread_seconds(worker.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    worker.time_forward(ids, np.ones_like(ids), repeats=1_000_000, warmup=0, max_seconds=seconds)
    stop.set()
    watcher.join()
    latest.update(_thread_seconds(worker.pid))
    spent = {thread: value - before.get(thread, 0.0) for thread, value in latest.items()}
    total = sum(spent.values())
    return (total - spent[worker.pid]) / total


def _thread_seconds(pid: int) -> dict[int, float]:
    """Processor seconds of each living thread of a process."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(folder.name)] = int((folder / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # it ended meanwhile
            continue
    return found


@figure(
    "quick_time", group="measure", title="`edgestill bench ARTIFACT --quick`, from start to end", unit="s", limit=15,
    sense="at_most", peer="none",
)  # fmt: skip
def quick_time(context: Context, variant: str) -> Taken:
    with context.artifact("encoder", "onnx:int8") as artifact, LoadProbe() as probe:
        command = [sys.executable, "-m", "edgestill", "bench", str(artifact.path), "--quick", "--json"]
        command += ["--threads", str(context.threads)]
        taken = [launch(command, threads=context.threads).seconds for _ in range(context.repeats)]
    how = f"slowest of {len(taken)} runs, onnx:int8, {context.model_note('encoder')}"
    return Taken(max(taken), how, doubt=busy_note(probe), void=context.void if context.tiny else "")
