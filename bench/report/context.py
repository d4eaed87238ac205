"""What the report shows beside its table: key figures, plots, notices and the facts about a run, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..compare import find_row
from ..gates import GateResult
from ..metrics import METRICS
from ..pick import Candidate, Choice, headline_metric, pick
from ..records import Check, Measurement, Verdict
from .facts import ModelFacts, RunFacts
from .plots import Axis, Point, line_panel, scatter
from .table import TORCH_SUBJECTS, Table

__all__ = [
    "Plot", "Tile", "choose", "distilled", "fact_groups", "latest", "notices", "number", "ordered_checks", "panels",
    "plots", "series", "tiles",
]  # fmt: skip

_SERIES_ORDER = ("onnx", "gguf", "coreml")
_NOT_CURVES = ("step", "tokens", "epoch")


@dataclass(frozen=True)
class Tile:
    """One key figure, its unit apart so that it can be set smaller."""

    label: str
    figure: str
    unit: str
    sub: str


@dataclass(frozen=True)
class Plot:
    """One chart: our own SVG, its title and what to know about it."""

    title: str
    svg: str
    caption: str = ""
    narrow: str = ""  # the same for a phone, where letters may not shrink with the chart


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "—" if value is None else f"{value:.4g}"


def latest(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The last verdict of each subject, failures first."""
    last = {verdict.subject: verdict for verdict in verdicts}
    return sorted(last.values(), key=lambda verdict: (verdict.passed, verdict.subject))


def choose(
    run: RunFacts, measurements: Sequence[Measurement], verdicts: Sequence[Verdict], gates: Sequence[GateResult]
) -> Choice:
    """What to ship of this run; the teacher's own artifacts are baselines while there is a student."""
    wanted = "teacher" if run.student is None else "student"
    candidates = [Candidate(a.name, a.manifest.format) for a in run.artifacts if a.of == wanted]
    if not candidates:
        return Choice(None, "Nothing to ship: no artifact was exported.")
    blocked = {gate.subject: f"fails the gate on {gate.metric}" for gate in gates if gate.outcome == "fail"}
    return pick(candidates, measurements, verdicts, task=run.task, baseline=run.baseline, blocked=blocked)


def series(run: RunFacts) -> dict[str, str]:
    """The colour class of each subject."""
    artifacts = {artifact.name: artifact.manifest.format for artifact in run.artifacts}
    return dict.fromkeys((run.baseline, *TORCH_SUBJECTS), "reference") | artifacts


def tiles(run: RunFacts, choice: Choice, table: Table, verdicts: Sequence[Verdict]) -> list[Tile]:
    """The figures of what is shipped that one would say aloud, and how many artifacts passed."""
    found = []
    row = next((row for row in table.rows if row.subject == choice.name), None)
    wanted = ["model_bytes", "kl", "spearman", "accuracy", "latency_ms", "decode_tokens_per_s"]
    if run.task == "text-generation" or run.student is None:
        wanted.append("peak_memory_bytes")
    seen: set[str] = set()
    for column, cell in zip(table.columns, row.cells if row else (), strict=False):
        if column.metric in wanted and column.metric not in seen and cell.value is not None:
            seen.add(column.metric)
            sub = f"{cell.ratio} the {run.baseline}’s" if cell.ratio else cell.interval
            figure, _, unit = cell.text.partition(" ")
            below = ", ".join(part for part in (column.data, sub) if part)
            found.append(Tile(column.title, figure, unit or column.unit, below))
    if run.student is not None:
        share = run.student.parameters / run.teacher.parameters
        layers = f"{run.student.layers} of {run.teacher.layers} layers"
        figure, _, unit = _count(run.student.parameters).partition(" ")
        found.append(Tile("Parameters", figure, unit, f"{share:.0%} of the teacher’s, {layers}"))
    passed = sum(verdict.passed for verdict in verdicts)
    failed = [verdict.subject for verdict in verdicts if not verdict.passed]
    sub = f"failed: {', '.join(failed)}" if failed else "all artifacts"
    found.append(Tile("Verified", f"{passed} of {len(verdicts)}", "", sub))
    return found


def notices(
    run: RunFacts, measurements: Sequence[Measurement], verdicts: Sequence[Verdict], gates: Sequence[GateResult]
) -> list[tuple[str, str]]:
    """Lines that a reader must not miss: ``("bad" | "", text)``."""
    lines = [("bad", problem) for problem in run.problems]
    for verdict in verdicts:
        if not verdict.passed:
            names = ", ".join(check.name for check in verdict.failures) or verdict.note or "no check"
            lines.append(("bad", f"{verdict.subject} failed verification ({names}) and must not be shipped."))
    lines += [("bad", f"{g.subject} fails the gate on {g.metric}: {g.reason}.") for g in gates if g.outcome == "fail"]
    busy = sorted({row.subject for row in measurements if row.environment.get("busy")})
    if busy:
        lines.append(
            ("", f"Other processes used the machine while {_some(busy)} were measured: timings may be too slow.")
        )
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def plots(
    run: RunFacts, measurements: Sequence[Measurement], verdicts: Sequence[Verdict], choice: Choice
) -> list[Plot]:
    """Size against accuracy and size against speed."""
    names = [artifact.name for artifact in run.artifacts]
    metric = headline_metric(measurements, run.task, names)
    found = []
    if metric is not None:
        rows = [r for r in measurements if r.metric == metric and r.against in ("teacher", None) and r.summary]
        data = next((row.data for row in rows), None)
        on = f" on {data}" if data else ""
        title = {"kl": "KL to the teacher", "spearman": "Spearman to the teacher"}.get(metric, metric)
        axis = Axis(f"{title}{_unit(metric)}", METRICS[metric].better == "lower")
        found.append(_plot(f"Size and {title}{on}", metric, axis, run, measurements, verdicts, choice, data))
    speed = "decode_tokens_per_s" if run.task == "text-generation" else "latency_ms"
    if any(row.metric == speed and row.summary for row in measurements):
        title = "decode speed" if run.task == "text-generation" else "latency"
        axis = Axis(f"{title.capitalize()}{_unit(speed)}", METRICS[speed].better == "lower")
        found.append(_plot(f"Size and {title}", speed, axis, run, measurements, verdicts, choice, None))
    return [plot for plot in found if plot.svg]


def _plot(
    title: str, metric: str, axis: Axis, run: RunFacts, measurements: Sequence[Measurement],
    verdicts: Sequence[Verdict], choice: Choice, data: str | None,
) -> Plot:  # fmt: skip
    marks = {verdict.subject: verdict.level for verdict in verdicts}
    colours = series(run)
    points, missing = [], []
    for name, colour in colours.items():
        row = find_row([r for r in measurements if r.against in ("teacher", None)], name, metric, data=data)
        size = find_row(measurements, name, "model_bytes")
        if row is None and colour == "reference":
            continue
        if row is None or row.summary is None or size is None or size.summary is None:
            missing += [name] if colour != "reference" else []
            continue
        mark = marks.get(name, "reference")
        summary, best = row.summary, name == choice.name
        points.append(
            Point(name, size.summary.value, summary.value, colour, mark, summary.low, summary.high, row.source, best)
        )
    far = _far_off(points)
    caption = []
    if far:
        caption.append("Off the chart: " + ", ".join(f"{p.name} (failed, {METRICS[metric].show(p.y)})" for p in far))
    if missing:
        caption.append(f"Not measured: {', '.join(missing)}")
    points = [point for point in points if point not in far]
    sizes = [point.x for point in points]
    wide = bool(sizes) and max(sizes) > 4 * min(sizes)
    across = Axis("Model size in MB", True, log=wide, scale=1e6)
    svg = scatter(points, across, axis, label=title)
    narrow = scatter(points, across, axis, label=title, width=350, height=330)
    return Plot(title, svg, ". ".join(caption) + ("." if caption else ""), narrow)


def _far_off(points: Sequence[Point]) -> list[Point]:
    """Failed points that would squeeze all others into a corner."""
    good = [point.y for point in points if point.mark != "failed"]
    if len(good) < 2:
        return []
    room = max(max(good) - min(good), abs(max(good)) * 0.02)
    return [p for p in points if p.mark == "failed" and not min(good) - room <= p.y <= max(good) + room]


def _unit(metric: str) -> str:
    unit = METRICS[metric].unit
    return "" if unit in ("correlation", "cosine", "fraction", "ratio") else f" in {unit}"


def panels(run: RunFacts) -> list[Plot]:
    """One training curve a panel, over the tokens that the student has seen (over steps, where nobody counted)."""
    if run.distill is None:
        return []
    over = "tokens" if any(row.get("tokens") for row in run.distill.curve) else "step"
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run.distill.curve:
        dev = {f"dev {name}": value for name, value in (row.get("dev") or {}).items() if "teacher" not in name}
        for name, value in {**row, **dev}.items():
            if name not in _NOT_CURVES and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(name, []).append((float(row.get(over, 0)), float(value)))
    if len(run.distill.losses) == 1 and len(curves.keys() & run.distill.losses.keys()) == 1:
        curves.pop("loss", None)  # it is the only component once more
    curves = dict(sorted(curves.items(), key=lambda item: item[0].startswith("dev ")))  # dev metrics after the losses
    charts = [
        Plot(name.replace("_", " "), line_panel({name: rows}, label=name, x_title=over))
        for name, rows in curves.items()
    ]
    return [chart for chart in charts if chart.svg]


def distilled(run: RunFacts) -> str:
    """One line about how the student was taught."""
    facts = run.distill
    if facts is None:
        return ""
    parts = [", ".join(f"{name.replace('_', ' ')} × {weight:g}" for name, weight in facts.losses.items() if weight)]
    parts.append(f"{facts.steps:,} steps" + (f", {facts.tokens_seen:,} tokens" if facts.tokens_seen else ""))
    if facts.seconds:
        parts.append(f"in {_duration(facts.seconds)}")
    if facts.keep:
        parts.append(f"teacher layers {', '.join(map(str, facts.keep))} kept")
    for name, after in facts.dev_after.items():
        before = facts.dev_before.get(name)
        if before is not None:
            parts.append(f"dev {name.replace('_', ' ')} {before:.4g} → {after:.4g}")
    return " · ".join(part for part in parts if part)


def fact_groups(run: RunFacts, measurements: Sequence[Measurement]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything about how a run was made and measured, as titled lists of pairs."""
    groups = [("Teacher", _model(run.teacher))]
    if run.student is not None:
        groups.append(("Student", _model(run.student)))
    data = [(item.name, _data(item.counts, item.source)) for item in run.data]
    groups.append(("Data", data))
    timed_rows = [row for row in measurements if "noise_floor" in row.protocol]
    timed = next((row for row in timed_rows if row.metric == "latency_ms"), timed_rows[0] if timed_rows else None)
    if timed is not None:
        groups.append(("Protocol of timings", _protocol(timed.protocol, timed.threads)))
    environment = run.environment or (timed.environment if timed else {})
    groups.append(("Machine", _machine(environment)))
    versions = run.versions or environment.get("versions", {})
    groups.append(("Versions", [(name, str(version)) for name, version in versions.items()]))
    stages = [(s.name, f"{s.status}" + (f" in {_duration(s.seconds)}" if s.seconds else "")) for s in run.stages]
    groups.append(("Stages", stages))
    lineage = [("recipe", run.recipe_sha256), ("teacher", run.teacher.model_id)]
    if run.student is not None:
        lineage.append(("student", run.student.model_id))
    lineage += [(artifact.name, artifact.manifest.artifact_id) for artifact in run.artifacts]
    lineage += [(f"seed of {name}", str(seed)) for name, seed in run.seeds.items()]
    groups.append(("Lineage (sha256)", lineage))
    return groups


def _model(model: ModelFacts) -> list[tuple[str, str]]:
    rows = [
        ("name", model.name), ("source", model.source), ("architecture", model.architecture),
        ("parameters", f"{model.parameters:,}"), ("layers", str(model.layers)),
        ("hidden size", str(model.hidden_size)), ("vocabulary", f"{model.vocab_size:,}"),
        ("weights", METRICS["size_bytes"].show(model.size_bytes)), ("licence", model.license or "not stated"),
    ]  # fmt: skip
    return [(key, value) for key, value in rows if value]


def _data(counts: Mapping[str, int], source: str) -> str:
    shown = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
    return f"{shown} · {source}" if source else shown


def _protocol(protocol: Mapping[str, object], threads: int) -> list[tuple[str, str]]:
    floor = protocol.get("noise_floor")
    noise = f"{floor:.1%} (A/A on {protocol.get('noise_floor_subject')})" if isinstance(floor, float) else None
    return [
        ("order", f"{protocol.get('order')}, seed {protocol.get('seed')}"),
        ("launches", f"{protocol.get('launches')} fresh processes each"),
        (
            "inferences",
            f"up to {protocol.get('repeats')} a launch, {protocol.get('max_seconds')} s at most",
        ),
        ("input", f"batch {protocol.get('batch_size')} × {protocol.get('length')} tokens"),
        ("threads", str(threads)),
        ("noise floor", noise or f"none: {protocol.get('noise_floor_reason')}"),
        ("memory", str(protocol.get("memory"))),
        ("cold load", str(protocol.get("cold_load"))),
    ]


def _machine(environment: Mapping[str, object]) -> list[tuple[str, str]]:
    if not environment:
        return []
    memory, flags = environment.get("memory_bytes"), environment.get("cpu_flags")
    rows = [
        ("processor", environment.get("cpu")), ("system", environment.get("system")),
        ("architecture", environment.get("machine")), ("cores", environment.get("cores_usable")),
        ("memory", f"{memory / 1e9:.1f} GB" if isinstance(memory, (int, float)) else None),
        ("features", ", ".join(flags) if isinstance(flags, (list, tuple)) else None),
        ("governor", environment.get("governor") or environment.get("governor_reason")),
    ]  # fmt: skip
    return [(key, str(value)) for key, value in rows if value]


def _count(value: int) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e5 else f"{value:,}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def ordered_checks(verdict: Verdict) -> list[Check]:
    """Failures first."""
    return sorted(verdict.checks, key=lambda check: check.passed)
