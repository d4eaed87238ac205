"""``python -m tests.fuzz --count 10000 --seed 0``: damage files of every format and see that each gives a clear error.

Exit code 0 when nothing was found, 1 otherwise. ``--only 417`` runs one case again, in this process with ``--here``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from .drive import drive, preload  # noqa: E402
from .runner import Tally, fuzz, make_case  # noqa: E402
from .seeds import make_seeds  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", default="", help="of: model gguf onnx coreml (default: all)")
    parser.add_argument("--keep", type=Path, help="keep what gave a finding here")
    parser.add_argument("--only", type=int, help="run this one case")
    parser.add_argument("--here", action="store_true", help="with --only: without a process of its own, for a debugger")
    options = parser.parse_args(arguments)
    kinds = frozenset(options.kinds.split()) or None
    with tempfile.TemporaryDirectory(prefix="edgestill-fuzz-seeds-") as folder:
        seeds = make_seeds(Path(folder), kinds)
        preload()
        if options.here:
            case = make_case(options.only, seeds, Path(folder), options.seed)
            print(case, file=sys.stderr)
            drive(case.seed.kind, case.folder, case.seed.student, lambda stage: print(stage, file=sys.stderr))
            return 0
        if options.only is not None:
            options.first, options.count = options.only, 1
        started = time.monotonic()

        def tick(number: int, tally: Tally) -> None:
            done = number - options.first + 1
            if done % 100 == 0:
                rate = done / (time.monotonic() - started)
                print(f"{done} files, {rate:.1f} a second, {len(tally.findings)} findings", file=sys.stderr, flush=True)

        tally = fuzz(seeds, options.count, options.seed, first=options.first, keep=options.keep, tick=tick)
    for finding in tally.findings:
        print(f"case {finding.case}: {finding.file} ({finding.label}): {finding.what}\n{finding.trace}")
    print(", ".join(f"{name}: {count}" for name, count in sorted(tally.outcomes.items())))
    print(", ".join(f"{name}: {count}" for name, count in tally.messages.most_common()))
    print(f"{options.count} damaged files, {len(tally.findings)} findings, peak {tally.peak_bytes >> 20} MB")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
