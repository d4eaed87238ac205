"""A profile for people: tables on stderr, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from .bench.peaks import MEMORY, Peaks
from .bench.profile import Operator, Profiled, ProfiledPhase
from .terminal import print_table, stderr

__all__ = ["show_profiles"]

_OPERATORS, _NODES = 8, 3


def show_profiles(profiles: Sequence[Profiled]) -> None:
    """Each profile: a table of operators a phase; then all phases against the machine's roof."""
    for profile in profiles:
        _profile(profile)
    reached = [(p, phase) for p in profiles for phase in p.phases if phase.roofline is not None]
    if reached:
        rows = [_reached(profile, phase) for profile, phase in reached]
        columns = ("", "op/byte", "GB/s", "GFLOP/s", "bound by", "reached")
        print_table("against what this machine can do", columns, rows)
    peaks = next((profile.peaks for profile in profiles if profile.peaks is not None), None)
    if peaks is not None:
        _say(_roof(peaks))
    reasons = dict.fromkeys(
        f"{p.subject}: no roofline: {phase.roofline_reason}" for p in profiles for phase in p.phases
        if phase.roofline_reason
    )  # fmt: skip
    for reason in list(reasons)[:6]:
        _say(reason)


def _profile(profile: Profiled) -> None:
    for phase in profile.phases:
        if not phase.operators:
            continue
        timed = phase.operators[0].ms is not None
        what = f"{phase.tokens} token{'s' * (phase.tokens != 1)}" + (f" after {phase.past}" if phase.past else "")
        title = f"{profile.subject}, {phase.name} of {what}" + ("" if timed else ": counted, not measured")
        shown = [*phase.operators[:_OPERATORS], *phase.nodes[:_NODES]]
        known = any(row.flops is not None for row in shown)
        sizes = any(row.size_bytes is not None for row in shown)
        columns = (
            "operator",
            "share",
            *(["ms"] if timed else []),
            "calls",
            *(["M op"] if known else []),
            *(["MB"] if sizes else []),
        )
        rows = [_operator(row, timed, known, sizes) for row in shown]
        print_table(title, columns, rows)
        if phase.cost is not None and phase.plain_ms is not None and phase.profiled_ms is not None:
            share = "" if phase.explained is None else f"; operators are {phase.explained:.0%} of that"
            _say(f"{phase.plain_ms:.3g} ms a pass, {phase.profiled_ms:.3g} ms profiled ({phase.cost:+.0%}){share}")
    if profile.reason:
        _say(f"{profile.subject}: no operators: {profile.reason}")
    elif profile.note:
        _say(f"{profile.subject}: {profile.note}" + ("; the machine was busy" if profile.busy else ""))


def _operator(row: Operator, timed: bool, known: bool, sizes: bool) -> list[str]:
    name = f"  {_short(row.name, 34)}" if row.name else row.op
    cells = [name, "—" if row.share is None else f"{row.share:.1%}"]
    if timed:
        cells.append("—" if row.ms is None else f"{row.ms:.3g}")
    cells.append(f"{row.calls:g}")
    if known:
        cells.append(_millions(row.flops))
    if sizes:
        cells.append(_millions(row.size_bytes))
    return cells


def _reached(profile: Profiled, phase: ProfiledPhase) -> list[str]:
    roof = phase.roofline
    assert roof is not None
    return [
        f"{_short(profile.subject, 20)} {phase.name}", f"{roof.intensity:.3g}", f"{roof.bytes_per_s / 1e9:.3g}",
        f"{roof.flops_per_s / 1e9:.3g}", roof.bound, f"{roof.fraction:.0%}",
    ]  # fmt: skip


def _roof(peaks: Peaks) -> str:
    parts = []
    for peak in peaks.peaks.values():
        unit = "GB/s" if peak.kind in MEMORY else "GFLOP/s"
        name = peak.kind.replace("_", " ")
        parts.append(f"{name} {peak.rate / 1e9:.3g} {unit}" if peak.rate else f"{name}: {peak.reason}")
    busy = ", while others used the machine" if peaks.busy else ""
    return f"this machine, {peaks.threads} threads, {peaks.date[:10]}{busy}: {', '.join(parts)}"


def _millions(value: float | None) -> str:
    return "—" if value is None else f"{value / 1e6:.3g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _say(text: str) -> None:
    stderr.print(text, style="dim", markup=False, soft_wrap=True)
