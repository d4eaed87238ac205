"""Write ``report.html`` (one file, no network, no script) and ``MODEL_CARD.md`` from facts and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ...files import atomic_write
from ..gates import GateResult
from ..metrics import METRICS
from ..pick import Choice
from ..records import Measurement, Verdict
from . import context
from .card import markdown, usage
from .facts import RunFacts
from .student import calibration_plots, cost_rows, student_tables
from .table import TORCH_SUBJECTS, heading, summary_table

__all__ = ["ReportFiles", "build_report", "html_environment", "trusted"]

_FOLDER = Path(__file__).parent
_FORM_NAMES = {"onnx": "ONNX", "gguf": "GGUF", "coreml": "Core ML"}


class ReportFiles(NamedTuple):
    """What was written, and what it says to ship."""

    html: Path
    card: Path
    choice: Choice


def build_report(
    run: RunFacts,
    measurements: Sequence[Measurement],
    verdicts: Sequence[Verdict],
    gates: Sequence[GateResult],
    out: Path,
) -> ReportFiles:
    """Write ``report.html`` and ``MODEL_CARD.md`` into the folder ``out``, each whole or not at all.

    Equal arguments give equal bytes. Everything that comes from a model, a recipe or a data set is escaped.
    """
    page, card, choice = render(run, measurements, verdicts, gates)
    atomic_write(out / "report.html", page)
    atomic_write(out / "MODEL_CARD.md", card)
    return ReportFiles(out / "report.html", out / "MODEL_CARD.md", choice)


def render(
    run: RunFacts, measurements: Sequence[Measurement], verdicts: Sequence[Verdict], gates: Sequence[GateResult]
) -> tuple[str, str, Choice]:
    """The texts of both files and the choice."""
    judged = context.latest(verdicts)
    choice = context.choose(run, measurements, verdicts, gates)
    table = summary_table(
        measurements, judged, task=run.task, subjects=_order(run, measurements, judged),
        contents={artifact.name: artifact.manifest.contents for artifact in run.artifacts}, baseline=run.baseline,
    )  # fmt: skip
    forms = [form for form in _FORM_NAMES if any(a.manifest.format == form for a in run.artifacts)]
    headline, _, reasons = choice.sentence.partition(": ")
    shared = {"run": run, "choice": choice, "table": table, "heading": heading, "version": __version__}
    page = html_environment().get_template("template.html.jinja").render(
        **shared,
        style=trusted((_FOLDER / "style.css").read_text(encoding="utf-8")),
        headline=headline,
        reasons=[reason.strip() for reason in reasons.rstrip(".").split(";") if reason.strip()],
        others=[(_FORM_NAMES.get(f, f), name) for f, name in choice.by_format.items() if name != choice.name],
        tiles=context.tiles(run, choice, table, judged),
        notices=context.notices(run, measurements, judged, gates),
        series=context.series(run),
        plots=_drawn(context.plots(run, measurements, judged, choice)),
        panels=_drawn(context.panels(run)),
        distilled=context.distilled(run),
        card_tables=student_tables(run, measurements),
        reliability=[
            {"title": plot.title, "svg": trusted(plot.svg), "names": plot.names, "caption": plot.caption}
            for plot in calibration_plots(run, measurements)
        ],
        cost=cost_rows(run),
        forms=forms,
        form_names=_FORM_NAMES,
        verdicts=judged,
        checks=context.ordered_checks,
        quarantined={artifact.name for artifact in run.artifacts if artifact.quarantined},
        gates=sorted(gates, key=lambda gate: ("fail", "inconclusive", "not_measured", "pass").index(gate.outcome)),
        facts=context.fact_groups(run, measurements),
        measurements=measurements,
        number=context.number,
        show=lambda metric, value: METRICS[metric].show(value),
    )  # fmt: skip
    card = _environment(html=False).get_template("card.md.jinja").render(
        **shared,
        passed=[verdict for verdict in judged if verdict.passed],
        failed=[verdict for verdict in judged if not verdict.passed],
        shipped=[artifact for artifact in run.artifacts if not artifact.quarantined],
        distilled=context.distilled(run),
        card_tables=student_tables(run, measurements),
        cost=cost_rows(run),
        teacher=(run.teacher.name != run.baseline and run.teacher.name) or run.teacher.source or run.teacher.name,
        data=context.fact_groups(run, measurements)[1 if run.student is None else 2][1],
        usage=usage,
    )  # fmt: skip
    return page, card, choice


def _order(run: RunFacts, measurements: Sequence[Measurement], verdicts: Sequence[Verdict]) -> list[str]:
    """Teacher, student, then artifacts as the recipe names them, failed ones last."""
    failed = {verdict.subject for verdict in verdicts if not verdict.passed}
    names = sorted((artifact.name for artifact in run.artifacts), key=lambda name: name in failed)
    measured = {row.subject for row in measurements}
    return [name for name in (run.baseline, *TORCH_SUBJECTS) if name in measured and name not in names] + names


def html_environment() -> Any:
    """Jinja's environment for pages: what comes from outside is escaped."""
    return _environment(html=True)


def _environment(*, html: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=html, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["md"] = markdown
    return environment


def trusted(text: str) -> Any:
    """Mark a text of our own (style, charts whose labels were escaped when drawn) as not to be escaped again."""
    from markupsafe import Markup

    return Markup(text)


def _drawn(charts: Sequence[context.Plot]) -> list[dict[str, Any]]:
    return [
        {"title": c.title, "svg": trusted(c.svg), "narrow": trusted(c.narrow), "caption": c.caption} for c in charts
    ]
