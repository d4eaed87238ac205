"""Emulated cores and parity for people: tables on stderr, called by :mod:`edgestill.show`."""

from __future__ import annotations

from collections.abc import Sequence

from .bench.metrics import METRICS
from .bench.records import Measurement
from .emulation import BuiltRoot
from .parity import ParityResult
from .terminal import print_table, stderr

__all__ = ["show_instructions", "show_parity", "show_root"]

_COLUMNS = {
    "instructions": "all", "instructions_dot": "int8 dot", "instructions_mmla": "matrix",
    "instructions_fmla": "float fma", "instructions_load": "loads", "instructions_store": "stores",
    "decode_instructions": "a token",
}  # fmt: skip
_MARKS = {"differs": "✘", "failed": "✘", "missing": "?"}


def show_instructions(rows: Sequence[Measurement]) -> None:
    """A table a target, a row a subject, in millions; then why something is missing."""
    for target in dict.fromkeys(row.target for row in rows):
        here = {(row.subject, row.metric): row for row in rows if row.target == target}
        metrics = [name for name in _COLUMNS if any(metric == name for _, metric in here)]
        table = []
        for subject in dict.fromkeys(subject for subject, _ in here):
            taken = [here.get((subject, metric)) for metric in metrics]
            shown = [METRICS[row.metric].show(row.summary.value) if row and row.summary else "—" for row in taken]
            table.append([subject, *shown])
        length = next((row.context for row in here.values() if row.context), None)
        title = f"instructions of a pass over {length} tokens on {target}, emulated"
        print_table(title, ("", *(_COLUMNS[metric] for metric in metrics)), table)
        counted = [row for row in here.values() if row.metric in _COLUMNS and row.reason]
        for reason in list(dict.fromkeys(f"{row.subject}: {row.reason}" for row in counted))[:8]:
            stderr.print(f"— {reason}", style="dim", markup=False, soft_wrap=True)


def show_root(result: BuiltRoot) -> None:
    """Where the root file system is, and what is in it."""
    size = f"{result.size_bytes / 1e6:.0f} MB"
    rows = [*result.versions.items(), ("size", size), ("targets", ", ".join(result.targets))]
    print_table("aarch64 root file system", ("", ""), rows, text=2)
    stderr.print(result.path, markup=False, soft_wrap=True)


def show_parity(result: ParityResult) -> None:
    """A row a machine, then what is wrong or missing, with what helps."""
    rows = []
    for row in result.rows:
        changed = "—" if row.argmax_changes is None else f"{row.argmax_changes}/{row.positions}"
        far = "—" if row.rms is None else f"{row.rms:.2g}"
        rows.append((f"{_MARKS.get(row.status, '✔')} {row.name}", row.status, far, changed, row.source))
    title = f"{result.artifact}: {result.tokens} tokens, against {result.reference}, limit {result.limit:g}"
    print_table(title, ("", "", "rms", "argmax", ""), rows, text=2)
    for row in result.rows:
        if row.reason:
            stderr.print(f"— {row.name}: {row.reason}", markup=False, soft_wrap=True)
            if row.hint:
                stderr.print(f"  {row.hint}", style="dim", markup=False, soft_wrap=True)
    found = result.saturation
    if found:
        text = f"simulated: {found['fraction']:.2%} of int8 pairs overflow 16 bits"
        if found["fraction"]:
            text += f", a relative error of {found['relative_error']:.2g} in {found['worst_node']}"
        stderr.print(text, markup=False, soft_wrap=True)
