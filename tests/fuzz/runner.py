"""Runs damaged files, each in a forked process of its own with limits on memory, time and address space."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgestill.artifact import ARTIFACT_FILE, open_artifact
from edgestill.errors import BadInput, EdgestillError, Unsupported

from .drive import drive, reseal
from .mutations import mutate
from .seeds import Seed

__all__ = ["Case", "Finding", "Limits", "Tally", "fuzz", "make_case", "run_case"]


@dataclass(frozen=True)
class Limits:
    """What one damaged file may cost: processor and wall seconds, and memory beside what was there before."""

    cpu_s: int = 20
    wall_s: float = 300.0
    memory_bytes: int = 512 << 20
    address_bytes: int = 8 << 30


@dataclass(frozen=True)
class Case:
    """A damaged copy of a seed in ``folder``; ``label`` says what was done to which file."""

    number: int
    seed: Seed
    folder: Path
    label: str
    resealed: bool


@dataclass(frozen=True)
class Finding:
    """What should not have happened."""

    case: int
    file: str
    label: str
    what: str
    trace: str = ""


@dataclass
class Tally:
    """``outcomes`` counts ``refused`` (a clear error), ``harmless`` (the change did not matter: nothing was wrong) and
    ``contained`` (native code died in its process, and the worker said so in one line) a kind of file."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


def make_case(number: int, seeds: Sequence[Seed], root: Path, run_seed: int) -> Case:
    """The ``number``-th damaged copy of one of ``seeds``, the same for the same ``run_seed``."""
    chooser = random.Random(f"{run_seed}:{number}")
    seed = chooser.choice(seeds)
    folder = root / f"case-{number}"
    shutil.copytree(seed.folder, folder, copy_function=_link)
    path = folder / seed.file
    label, damaged = mutate(path.name, path.read_bytes(), chooser)
    path.unlink()  # it is a link to the healthy one
    path.write_bytes(damaged)
    resealed = False
    if seed.kind != "model" and seed.file != ARTIFACT_FILE and chooser.random() < 0.9:
        manifest = folder / ARTIFACT_FILE
        content = manifest.read_bytes()
        manifest.unlink()
        manifest.write_bytes(content)
        reseal(folder)
        resealed = True
    return Case(number, seed, folder, label, resealed)


def _link(source: str, target: str) -> None:
    os.link(source, target)


def run_case(case: Case, limits: Limits, tally: Tally) -> None:
    """Drive one case in a forked process and count what happened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # never returns
        os.close(reader)
        _child(case, limits, writer)
    os.close(writer)
    said, hung = _listen(reader, child, limits.wall_s)
    _, status, usage = os.wait4(child, 0)
    peak = usage.ru_maxrss * 1024 - int(said.get("resident", usage.ru_maxrss * 1024))
    tally.peak_bytes = max(tally.peak_bytes, peak)
    result = said.get("result")
    kind = case.seed.kind

    def find(what: str) -> None:
        tally.findings.append(Finding(case.number, case.seed.file, case.label, what, said.get("trace", "")))

    if hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        find(f"it took over {limits.cpu_s} s ({said.get('stage', 'reading')})")
    elif result is None and said.get("stage") == "native":
        _contained(case, tally, find)
    elif result is None:
        find(f"the process died with status {status}")
    elif result == "bug":
        find(f"{said['error']}: {said['message'][:200]}")
    else:
        tally.outcomes[f"{kind} {result}"] += 1
        if result == "refused":
            tally.messages[str(said["error"])] += 1
            problem = _unclear(str(said["message"]), str(said["hint"]))
            if problem:
                find(f"{problem}: {said['message']!r}")
        elif case.resealed is False and kind != "model" and case.seed.file != ARTIFACT_FILE:
            find("a changed payload was opened")
    if peak > limits.memory_bytes:
        find(f"it took {peak >> 20} MB")


def _unclear(message: str, hint: str) -> str:
    if not message.strip() or "\n" in message:
        return "not one line"
    if not hint.strip():
        return "no hint"
    return "over 1,000 characters" if len(message) > 1000 else ""


def _contained(case: Case, tally: Tally, find: Callable[[str], None]) -> None:
    """Native code took its process with it: the real worker must turn that into one clear error."""
    import numpy as np

    from edgestill.runtimes.session import SessionOptions
    from edgestill.runtimes.transports.local import LocalWorker

    try:
        with LocalWorker(case.folder, SessionOptions(1), timeout=120) as worker:
            worker.forward(np.array([[1, 2, 3]], np.int64), np.ones((1, 3), np.int64))
    except EdgestillError as error:
        tally.outcomes[f"{case.seed.kind} contained"] += 1
        tally.messages[type(error).__name__] += 1
        if problem := _unclear(error.message, error.hint):
            find(f"{problem}: {error.message!r}")
    else:
        find("native code died here, but not in a worker")


def _child(case: Case, limits: Limits, writer: int) -> None:
    code = 1
    try:
        faulthandler.disable()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + limits.address_bytes,) * 2)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + limits.cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def say(**fields: str) -> None:
            os.write(writer, json.dumps(fields).encode() + b"\n")

        say(resident=str(_resident()))
        try:
            drive(case.seed.kind, case.folder, case.seed.student, lambda stage: say(stage=stage))
            say(result="harmless")
        except (BadInput, Unsupported, EdgestillError) as error:
            say(result="refused", error=type(error).__name__, message=error.message[:3000], hint=error.hint)
        except BaseException as error:
            trace = traceback.format_exc()
            say(result="bug", error=type(error).__name__, message=str(error)[:500], trace=trace[-6000:])
        code = 0
    finally:
        os._exit(code)


def _listen(reader: int, child: int, wall_s: float) -> tuple[dict[str, str], bool]:
    """What the child said, and whether it had to be killed."""
    said: dict[str, str] = {}
    buffer, deadline, hung = b"", time.monotonic() + wall_s, False
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            hung = True
            break
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        buffer += chunk
    os.close(reader)
    for line in buffer.splitlines():
        said |= json.loads(line)
    return said, hung


def _resident() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def fuzz(
    seeds: Sequence[Seed],
    count: int,
    run_seed: int,
    *,
    first: int = 0,
    limits: Limits | None = None,
    keep: Path | None = None,
    tick: Callable[[int, Tally], None] = lambda number, tally: None,
) -> Tally:
    """Run cases ``first`` to ``first + count``; damaged folders of findings are kept below ``keep``."""
    for seed in seeds:
        if seed.kind != "model":
            open_artifact(seed.folder)
    tally, limits = Tally(), limits or Limits()
    with tempfile.TemporaryDirectory(prefix="edgestill-fuzz-", dir=seeds[0].folder.parent) as scratch:
        for number in range(first, first + count):
            case = make_case(number, seeds, Path(scratch), run_seed)
            known = len(tally.findings)
            run_case(case, limits, tally)
            if len(tally.findings) > known and keep is not None:
                shutil.copytree(case.folder, keep / case.folder.name, dirs_exist_ok=True)
                (keep / f"{case.folder.name}.json").write_text(
                    json.dumps([dataclasses.asdict(f) for f in tally.findings[known:]], indent=1)
                )
            shutil.rmtree(case.folder)
            tick(number, tally)
    return tally
