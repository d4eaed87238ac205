"""Results for people: one function, :func:`show`, that prints any result as tables on stderr."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench.accuracy_table import accuracy_tables
from .bench.metrics import METRICS
from .bench.records import Measurement, Verdict
from .bench_export import BenchExportResult
from .bench_import import ImportResult
from .benchmark import BenchResult
from .commands import ExportResult, VerifyResult
from .delivery import ArtifactResult, RunResult
from .devices import Calibrated, DeviceSheet, TargetList
from .distillation import DistillPlan
from .doctor import DoctorReport
from .emulation import BuiltRoot
from .loss_comparison import LossComparison
from .parity import ParityResult
from .plan import Plan
from .runner_build import RunnerResult
from .show_devices import show_calibrated, show_imported, show_predicted, show_sheet, show_targets
from .show_emulated import show_instructions, show_parity, show_root
from .show_profile import show_profiles
from .terminal import print_table, stderr

__all__ = ["show"]

_MARKS = {"device_verified": "✔", "program_verified": "(✔)", "failed": "✘", "not_verified": "?"}
_TITLES = {
    "model_bytes": "size", "latency_ms": "latency", "decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill",
    "load_ms": "load", "peak_memory_bytes": "memory", "top1_agreement": "top-1", "perplexity_ratio": "perplexity ×",
}  # fmt: skip


@functools.singledispatch
def show(result: Any) -> None:
    """Print a result for a person."""
    raise TypeError(f"nothing knows how to show a {type(result).__name__}")


@show.register
def _run(result: RunResult) -> None:
    _artifacts(result.artifacts, result.baselines)
    for name, reason in result.problems.items():
        stderr.print(f"✘ {name}: {reason}", style="red", markup=False)
    for gate in result.gates:
        if gate.outcome in ("fail", "inconclusive"):
            limit = f"{'<=' if gate.sense == 'at_most' else '>='} {gate.limit:g}"
            stderr.print(f"✘ gate {gate.metric} {limit}: {gate.subject} {gate.outcome} ({gate.reason})", markup=False)
    if result.headline:
        stderr.print(f"\n{result.headline}", style="bold", markup=False)
    if result.report:
        stderr.print(f"\nreport: {result.report}\ncard:   {result.model_card}", markup=False, soft_wrap=True)
    else:
        stderr.print(f"\nrun folder: {result.run} ({result.status})", markup=False, soft_wrap=True)


@show.register
def _plan(result: Plan) -> None:
    stderr.print(result.recipe_text, markup=False, highlight=False)
    print_table("model", ("", ""), list(result.facts.items()), text=2)
    if result.variants:
        rows = [(v.name, v.kind, _bytes(v.size_bytes)) for v in result.variants]
        print_table("artifacts", ("name", "of", "about"), rows, text=2)
    rows = [(step.name, step.note, _seconds(step.seconds)) for step in result.steps]
    print_table("steps", ("stage", "", "about"), rows, text=2)
    print_table(
        "needs",
        ("", "", "here"),
        [
            ("disk", _bytes(result.disk_bytes), _bytes(result.disk_free_bytes)),
            ("memory", _bytes(result.memory_bytes), _bytes(result.memory_free_bytes)),
            ("time", _seconds(result.seconds), result.time_note),
        ],
    )
    for problem in result.problems:
        stderr.print(f"✘ {problem.message}", style="red", markup=False, soft_wrap=True)
        if problem.hint:
            stderr.print(f"  {problem.hint}", style="dim", markup=False, soft_wrap=True)
    if not result.problems:
        stderr.print("nothing is missing", style="green")


@show.register
def _distill_plan(result: DistillPlan) -> None:
    sides = [("teacher", result.teacher), ("starts from", result.start), ("student", result.student)]
    known = [(name, side) for name, side in sides if side is not None]
    rows = [("layers", *(str(side.layers) for _, side in known))]
    rows += [
        (title, *(f"{getattr(side, key):,}" for _, side in known))
        for key, title in (("ffn", "FFN neurons"), ("heads", "query heads"), ("kv_heads", "key-value groups"),
                           ("vocab_size", "tokens"), ("parameters", "parameters"))
    ]  # fmt: skip
    rows += [
        (f"  {group}", *(f"{side.parameters_by_group[group]:,}" for _, side in known))
        for group in result.student.parameters_by_group
    ]
    rows += [
        (f"size at {name}", *(_bytes(side.bytes[name]) for _, side in known)) for name in result.student.bytes
    ]  # fmt: skip
    rows.append(("operations a token", *(f"{side.flops_per_token / 1e6:,.1f} M" for _, side in known)))
    print_table(result.recipe, ("", *(name for name, _ in known)), rows)
    measure = (result.layer_measure or "not measured").replace("_", " ")
    rows = [
        (str(layer.index), "kept" if layer.kept else "—", "" if layer.importance is None else f"{layer.importance:.4g}")
        for layer in result.layers
    ]
    print_table(f"layers, by {measure} on {result.measured_tokens:,} tokens", ("", "", "importance"), rows)
    if result.rounds > 1:
        stderr.print(f"in {result.rounds} rounds of pruning and distilling", markup=False)
    if result.cost is not None:
        cost = result.cost
        stderr.print(
            f"training: {cost.optimiser_steps:,} steps, {cost.student_tokens:,} tokens through the student, "
            f"{cost.teacher_tokens:,} through the teacher, {cost.flops:.2g} operations",
            markup=False, soft_wrap=True,
        )  # fmt: skip


@show.register
def _export(result: ExportResult) -> None:
    _artifacts(result.run.artifacts, result.run.baselines)
    for name, reason in result.run.problems.items():
        stderr.print(f"✘ {name}: {reason}", style="red", markup=False)
    stderr.print(f"\nartifacts: {Path(result.run.run) / 'artifacts'}", markup=False, soft_wrap=True)


@show.register
def _verify(result: VerifyResult) -> None:
    _verdict(result.verdict)


show.register(TargetList)(show_targets)
show.register(DeviceSheet)(show_sheet)
show.register(Calibrated)(show_calibrated)
show.register(ImportResult)(show_imported)
show.register(BuiltRoot)(show_root)
show.register(ParityResult)(show_parity)


@show.register
def _exported(result: BenchExportResult) -> None:
    counted = {"measurements": result.measurements, "comparisons": result.comparisons, "verdicts": result.verdicts,
               "gates": result.gates}  # fmt: skip
    told = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
    for one in result.files:
        stderr.print(f"{one.path}: {told} as {one.format}", markup=False, soft_wrap=True)


@show.register
def _bench(result: BenchResult) -> None:
    """A table a target; ``≈`` stands before a ratio that the noise leaves open."""
    predicted = [row for row in result.measurements if row.source == "predicted"]
    if predicted:  # in a table of its own: never in one row with what was measured
        show_predicted(predicted)
        measured = tuple(row for row in result.measurements if row.source != "predicted")
        result = dataclasses.replace(result, measurements=measured)
    emulated = [row for row in result.measurements if row.source == "emulated"]
    if emulated:  # instructions, no times
        show_instructions(emulated)
        measured = tuple(row for row in result.measurements if row.source != "emulated")
        result = dataclasses.replace(result, measurements=measured)
    right = [row for row in result.measurements if METRICS[row.metric].kind == "accuracy"]
    if right:
        for table in accuracy_tables(right):
            print_table(table.title, table.header, table.rows)
            for reason in table.reasons:
                stderr.print(f"— {reason}", style="dim", markup=False, soft_wrap=True)
        rest = tuple(row for row in result.measurements if METRICS[row.metric].kind != "accuracy")
        result = dataclasses.replace(result, measurements=rest)
    names = list(dict.fromkeys(row.subject for row in result.measurements))
    targets = list(dict.fromkeys(row.target for row in result.measurements))
    sizes = [row for row in result.measurements if row.metric == "model_bytes"]
    for target in targets:
        here = [row for row in result.measurements if row.target == target]
        here += [row for row in sizes if row.target != target]
        metrics = [metric for metric in _TITLES if any(row.metric == metric for row in here)]
        taken = {(row.subject, row.metric): row for row in here}
        ratios = {(c.subject, c.metric): c for c in result.comparisons if c.target == target}
        rows = []
        for name in names:
            cells = []
            for metric in metrics:
                row = taken.get((name, metric))
                text = METRICS[metric].show(row.summary.value) if row and row.summary else "—"
                found = ratios.get((name, metric))
                if found and found.ratio and name != names[0]:
                    text += f" ({'≈' * (found.outcome == 'inconclusive')}{found.ratio:.2f}×)"
                cells.append(text)
            rows.append([name, *cells])
        timed = next((row for row in here if row.metric == "latency_ms"), None)
        where = "" if target == "host" else f" on {target}" + (f", {timed.source}" if timed else "")
        print_table(f"median, against {names[0]}{where}", ("", *(_TITLES[metric] for metric in metrics)), rows)
        if timed is not None:
            _noise(timed)
    if result.profiles:
        show_profiles(result.profiles)
    for decision in result.decisions:
        mark = {"pass": "✔", "fail": "✘", "inconclusive": "?"}[decision.outcome]
        stderr.print(f"{mark} {decision.subject} on {decision.target}: {decision.reason}", markup=False, soft_wrap=True)
    for target, problem in result.problems.items():
        stderr.print(f"✘ {target}: {problem}", style="red", markup=False, soft_wrap=True)
    reasons = dict.fromkeys(
        f"{row.subject}: {row.reason}"
        for row in result.measurements
        if row.reason and METRICS[row.metric].kind != "sensor"
    )
    for reason in list(reasons)[:8]:
        stderr.print(f"— {reason}", style="dim", markup=False, soft_wrap=True)


def _noise(row: Measurement) -> None:
    """What the numbers above are worth: noise floor, launches, and whether the machine was busy."""
    floor, launches = row.protocol.get("noise_floor"), row.protocol.get("launches")
    if row.protocol.get("noise_floors") is not None:
        told = f"noise floor {floor:.1%}" if floor is not None else f"{row.protocol.get('noise_floor_reason')}"
        stderr.print(f"{launches} launch{'es' * (launches != 1)}, {told}", style="dim", markup=False)
    if row.environment.get("busy"):
        loads = row.environment.get("machine_load", [])
        share = max((load["others_fraction"] + load["steal_fraction"] for load in loads), default=0.0)
        stderr.print(f"busy machine: others used up to {min(share, 1):.0%} of it", style="yellow", markup=False)


@show.register
def _losses(result: LossComparison) -> None:
    """A row a loss; of each metric the data sets one after the other, winners marked."""
    won = {(w.metric, w.data): w.winner for w in result.winners}
    baselines = result.baselines
    columns = [(w.metric, w.data) for w in result.winners]
    for first in range(0, len(columns), 4):  # what fits 80 columns
        shown = columns[first : first + 4]
        rows = [
            [f"    {name}", *(_plain(figures.get(f"{metric}@{data}")) for metric, data in shown)]
            for name, figures in baselines.items()
        ]
        for row in result.rows:
            cells = []
            for metric, data in shown:
                found = row.metrics.get(f"{metric}@{data}")
                mark = "★ " if won[metric, data] == row.loss else ""
                spread = "" if found is None or found.sd is None else f" ± {found.sd:.2g}"
                cells.append("—" if found is None else f"{mark}{_plain(found.mean)}{spread}")
            rows.append([f"    {row.loss}", *cells])
        print_table("", ("", *(_title(f"{metric}@{data}") for metric, data in shown)), rows)
    count = len(result.seeds)
    stderr.print(f"     mean ± sd over {count} seed{'s' * (count > 1)}; test split", style="dim")
    for winner in result.winners:
        who = f"★ {winner.winner}" if winner.winner else "no winner"
        stderr.print(f"{winner.metric} on {winner.data}: {who} ({winner.reason})", markup=False, soft_wrap=True)
    stderr.print(f"students: {result.folder}", markup=False, soft_wrap=True)


def _plain(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


@show.register
def _doctor(result: DoctorReport) -> None:
    rows = [
        (f"{'✔' if f.available else '✘'} {f.name}", f.version or "", f.purpose, f.install or f.note)
        for f in result.findings
    ]
    print_table(f"Python {result.python}, {result.platform}", ("", "version", "for", ""), rows, text=4)
    stderr.print("ready for the main job" if result.ready else "the main job needs what is marked ✘ above")


def _artifacts(artifacts: Sequence[ArtifactResult], baselines: Mapping[str, Mapping[str, float | None]]) -> None:
    """One row an artifact, the baselines first; a column for each number that at least one has."""
    numbers = {**baselines, **{artifact.name: artifact.metrics for artifact in artifacts}}
    levels = {artifact.name: artifact.level for artifact in artifacts}
    keys = list(dict.fromkeys(key for metrics in numbers.values() for key in metrics))
    keys = [key for key in keys if key.partition("@")[0] in _WANTED and "load" not in key]
    if not numbers:
        return
    rows = []
    for name, metrics in numbers.items():
        cells = [_cell(key, metrics.get(key)) for key in keys]
        rows.append([f"{_MARKS[levels[name]]:>3} {name}" if name in levels else f"    {name}", *cells])
    print_table("", ("", *(_title(key) for key in keys)), rows)
    if baselines:
        stderr.print("     without a mark: in torch, for comparison", style="dim")
    if any(level == "program_verified" for level in levels.values()):
        stderr.print(" (✔) the program was verified by edgestill's interpreter, not on a Mac", style="dim")
    for artifact in artifacts:
        for failure in artifact.failures:
            stderr.print(f"✘ {artifact.name}: {failure}", style="red", markup=False, soft_wrap=True)


_WANTED = ("model_bytes", "latency_ms", "decode_tokens_per_s", "kl", "spearman", "accuracy", "peak_memory_bytes")


def _title(key: str) -> str:
    metric, _, data = key.partition("@")
    title = _TITLES.get(metric, metric)
    short = data if len(data) <= 9 else data[:7] + "…"
    return f"{title}\n{short}" if data else title


def _cell(key: str, value: float | None) -> str:
    return "—" if value is None else METRICS[key.partition("@")[0]].show(value).replace(" nats/token", "")


def _verdict(verdict: Verdict) -> None:
    rows = []
    for check in verdict.checks:
        sign = "<=" if check.sense == "at_most" else ">="
        limit = "" if check.limit is None else f"{sign} {check.limit:.3g}"
        value = "" if check.value is None else f"{check.value:.4g}"
        rows.append((f"{'✔' if check.passed else '✘'} {check.name}", check.question, value, limit, check.reason))
    print_table(
        f"{verdict.subject}: {verdict.level.replace('_', ' ')} in {verdict.runtime} {verdict.runtime_version}",
        ("check", "question", "value", "limit", "why"),
        rows,
    )
    if verdict.note:
        stderr.print(verdict.note, markup=False)


@show.register
def _runner(result: RunnerResult) -> None:
    rows = [
        (one.target, one.level, _bytes(one.size_bytes), f"{one.compiled} new, {one.reused} kept", _seconds(one.seconds))
        for one in result.binaries
    ]
    print_table("native runner", ("for", "level", "size", "units", "took"), rows, text=2)
    for one in result.binaries:
        stderr.print(str(one.path), markup=False, soft_wrap=True)
    stderr.print(f"{result.engine}, {result.compiler}; runs on the CPU only", style="dim", markup=False)


def _bytes(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.0f} min"
