"""Documented devices and predictions for people: tables on stderr, called by :mod:`edgestill.show`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .bench.metrics import METRICS
from .bench.records import Measurement
from .bench_import import ImportResult
from .devices import Calibrated, DeviceSheet, TargetList
from .terminal import print_table, stderr

__all__ = ["show_calibrated", "show_imported", "show_predicted", "show_sheet", "show_targets"]

_PREDICTED = {
    "decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill", "latency_ms": "latency",
    "peak_memory_bytes": "memory", "memory_share": "of the device's",
}  # fmt: skip


def show_targets(result: TargetList) -> None:
    """Kinds of targets, then the devices that can be predicted."""
    rows = [(kind.address, kind.source, kind.description) for kind in result.kinds]
    print_table("targets", ("--target", "numbers are", ""), rows, text=3)
    lines = [
        (f"profile:{line.name}", line.processor, line.memory or "—", line.bandwidth or "—", line.points)
        for line in result.profiles
    ]
    print_table("documented devices", ("--target", "on", "memory", "bandwidth", "speeds"), lines, text=2)


def show_sheet(result: DeviceSheet) -> None:
    """Every number of a profile with its source."""
    profile = result.profile
    facts = {"memory": profile.memory, "for one process": profile.process_memory, "bandwidth": profile.bandwidth}
    rows = [(name, fact.shown if fact else "not known", fact.source if fact else "") for name, fact in facts.items()]
    print_table(f"{profile.title} ({profile.processor})", ("", "", "source"), rows, text=3)
    if result.points:
        table = [
            (p.model, f"{p.tokens_per_s:g} tok/s", f"{math.exp(p.log_efficiency):.0%}", p.source)
            for p in result.points
        ]  # fmt: skip
        print_table("published decode speeds", ("", "", "of bandwidth", "source"), table, text=4)
    if profile.prefill:
        anchors = [(f"{a.model} {a.format}", f"{a.tokens_per_s:g} tok/s", a.source) for a in profile.prefill]
        print_table("published prompt speeds", ("", "", "source"), anchors, text=3)
    if profile.bandwidth is not None:
        error = result.errors["decode"]
        told = (
            f"fitted on {len(result.points)} speeds: mean error {error.leave_one_out:.0%}"
            if result.points
            else f"never fitted: mean error {error.leave_one_device_out[profile.processor]:.0%} on unseen devices"
        )
        stderr.print(f"decode speed is predicted; {told}", style="dim", markup=False, soft_wrap=True)


def show_calibrated(result: Calibrated) -> None:
    """How other runtimes compare with llama.cpp on this machine."""
    rows = [
        (ratio.engine, ratio.what, f"{math.exp(ratio.log_ratio):.2f}×", ratio.subjects)
        for ratio in result.calibration.ratios
    ]
    print_table(f"against llama.cpp, {result.calibration.machine}", ("", "", "speed", "subjects"), rows, text=2)
    if result.calibration.busy:
        stderr.print("the machine was busy: calibrate again when it is not", style="yellow")
    stderr.print(f"written to {result.path}", style="dim", markup=False, soft_wrap=True)


def show_predicted(rows: Sequence[Measurement]) -> None:
    """Predicted ``rows``, a table a target, apart from what was measured: each value with its interval."""
    for target in dict.fromkeys(row.target for row in rows):
        here = [row for row in rows if row.target == target]
        metrics = [metric for metric in _PREDICTED if any(row.metric == metric for row in here)]
        taken = {(row.subject, row.metric): row for row in here}
        names = dict.fromkeys(row.subject for row in here)
        table = [[name, *(_cell(taken.get((name, metric))) for metric in metrics)] for name in names]
        title = f"predicted, not measured: {here[0].device} ({target})"
        print_table(title, ("", *(_PREDICTED[metric] for metric in metrics)), table)
        notes = [(row, row.protocol.get("method", {})) for row in here]
        told = dict.fromkeys(f"{row.subject}: {m['verdict']}" for row, m in notes if "verdict" in m)
        told |= dict.fromkeys(f"— {row.subject}: {row.reason}" for row in here if row.reason)
        for note in told:
            stderr.print(note, style="dim", markup=False, soft_wrap=True)
        errors = dict.fromkeys(
            f"{_PREDICTED.get(row.metric, row.metric)} {m['mean_error']:.0%} ({m['mean_error_of']})"
            for row, m in notes
            if "mean_error" in m and row.metric in _PREDICTED
        )
        if errors:
            stderr.print(f"mean errors: {', '.join(errors)}", style="dim", markup=False, soft_wrap=True)


def _cell(row: Measurement | None) -> str:
    if row is None or row.summary is None:
        return "—"
    found = row.summary
    text = METRICS[row.metric].show(found.value)
    if found.low is None or found.high is None or found.low == found.high:
        return text
    low, high = (METRICS[row.metric].show(end).split(" ")[0] for end in (found.low, found.high))
    return f"{text}\n{low}–{high}"


def show_imported(result: ImportResult) -> None:
    """What was read from other tools' files, a row a measurement."""
    rows = [
        (
            row.subject,
            row.device,
            f"{row.metric}{f' after {d}' if (d := row.protocol.get('depth')) else ''}",
            METRICS[row.metric].show(row.summary.value),
            f"n = {row.summary.n}",
        )
        for row in result.measurements
        if row.summary is not None
    ]
    tools = ", ".join(dict.fromkeys(row.origin or "" for row in result.measurements))
    print_table(f"measured by {tools}", ("", "", "", "", ""), rows, text=3)
    if result.out:
        stderr.print(f"added to {result.out}", style="dim", markup=False, soft_wrap=True)
