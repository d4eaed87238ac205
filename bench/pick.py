"""Which artifact to ship, and why in one sentence. The rule is fixed and printed, so that anybody can disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..artifact import Task
from ..errors import UsageError
from .compare import find_row
from .metrics import METRICS
from .records import Measurement, Verdict

__all__ = ["HEADLINE", "RULE", "Candidate", "Choice", "headline_metric", "headline_value", "pareto_front", "pick"]

# The metric of accuracy that decides, per task; the first that was taken.
HEADLINE: Mapping[Task, tuple[str, ...]] = {
    "feature-extraction": ("spearman", "cosine"),
    "text-classification": ("accuracy", "top1_agreement", "kl"),
    "token-classification": ("f1", "accuracy", "top1_agreement", "kl"),
    "text-generation": ("kl",),
}

# Share of, and amount beyond, the best artifact's accuracy that counts as equally good.
_TOLERANCE = {"kl": (1.10, 0.005), "perplexity_ratio": (1.02, 0.0)}
_POINTS = 0.01

RULE = (
    "Only artifacts that passed verification and every gate are considered; those that ran in their runtime here are "
    "preferred to those that were only interpreted. Of these, the ones as accurate as the best (within 0.01 of its "
    "Spearman or accuracy; KL within 10 % and 0.005 nats) that no other beats in size, accuracy and speed at once. "
    "Of these, the smallest product of model size and latency (text generation: seconds per decoded token)."
)


@dataclass(frozen=True)
class Candidate:
    """An artifact that could be shipped: its variant name and its format."""

    name: str
    format: str


@dataclass(frozen=True)
class Choice:
    """``name`` is what to ship (``None``: nothing can be), ``sentence`` says why in one sentence with its figures.

    ``by_format`` holds the same choice inside each format, ``front`` the names that no other beats, ``rejected``
    the reason for each candidate that can't be shipped.
    """

    name: str | None
    sentence: str
    front: tuple[str, ...] = ()
    by_format: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    rule: str = RULE


@dataclass(frozen=True)
class _Facts:
    candidate: Candidate
    verdict: Verdict
    size: float
    accuracy: float | None
    seconds: float | None

    def point(self, lower_is_better: bool) -> tuple[float, float, float]:
        loss = 0.0 if self.accuracy is None else self.accuracy if lower_is_better else -self.accuracy
        return self.size, loss, self.seconds if self.seconds is not None else float("inf")


def pick(
    candidates: Sequence[Candidate],
    measurements: Sequence[Measurement],
    verdicts: Sequence[Verdict],
    *,
    task: Task,
    baseline: str = "teacher",
    blocked: Mapping[str, str] | None = None,
) -> Choice:
    """Choose by :data:`RULE`. ``blocked`` maps names to why a gate forbids them (``"fails the gate on kl"``).

    The last verdict of a subject counts. Raises :class:`UsageError` when there is no candidate at all.
    """
    if not candidates:
        raise UsageError("no artifact to choose from", hint="give the recipe an [[export]]")
    judged = {verdict.subject: verdict for verdict in verdicts}
    metric = headline_metric(measurements, task, [candidate.name for candidate in candidates])
    rejected: dict[str, str] = {}
    usable: list[_Facts] = []
    for candidate in candidates:
        facts, reason = _facts(candidate, measurements, judged, metric, task, blocked or {})
        if facts is None:
            rejected[candidate.name] = reason
        else:
            usable.append(facts)
    if not usable:
        first, why = next(iter(rejected.items()))
        more = f" (and {len(rejected) - 1} more can't be shipped)" if len(rejected) > 1 else ""
        return Choice(None, f"Nothing to ship: {first} {why}{more}.", rejected=rejected)
    lower = metric is not None and METRICS[metric].better == "lower"
    front = pareto_front({facts.candidate.name: facts.point(lower) for facts in usable})
    preferred = [facts for facts in usable if facts.verdict.level == "device_verified"] or usable
    best = _best(preferred, metric)
    forms = dict.fromkeys(facts.candidate.format for facts in usable)
    by_format = {
        form: _best([f for f in usable if f.candidate.format == form], metric).candidate.name for form in forms
    }
    sentence = _sentence(best, measurements, metric, task, baseline)
    return Choice(best.candidate.name, sentence, front, by_format, rejected)


def headline_metric(measurements: Iterable[Measurement], task: Task, names: Sequence[str]) -> str | None:
    """The first metric of :data:`HEADLINE` that was taken of any of ``names``."""
    taken = {row.metric for row in measurements if row.subject in names and row.summary is not None}
    return next((metric for metric in HEADLINE[task] if metric in taken), None)


def headline_value(measurements: Iterable[Measurement], name: str, metric: str) -> float | None:
    """Mean over the data sets, against the teacher (labels need no reference)."""
    values = [
        row.summary.value
        for row in measurements
        if row.subject == name and row.metric == metric and row.against in ("teacher", None) and row.summary
    ]
    return fmean(values) if values else None


def pareto_front(points: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """Names whose point (every coordinate: lower is better) no other point beats; equal points stay together.

    >>> pareto_front({"a": (1, 5), "b": (2, 3), "c": (2, 4)})
    ('a', 'b')
    """

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    return tuple(name for name, point in points.items() if not any(beats(other, point) for other in points.values()))


def _facts(
    candidate: Candidate,
    measurements: Sequence[Measurement],
    judged: Mapping[str, Verdict],
    metric: str | None,
    task: Task,
    blocked: Mapping[str, str],
) -> tuple[_Facts | None, str]:
    name = candidate.name
    verdict = judged.get(name)
    if verdict is None:
        return None, "was not verified"
    if not verdict.passed:
        failed = ", ".join(check.name for check in verdict.failures) or verdict.note or "no reason given"
        return None, f"failed verification ({failed})"
    if name in blocked:
        return None, blocked[name]
    size = _value(measurements, name, "model_bytes")
    if size is None:
        return None, "has no measured size"
    accuracy = headline_value(measurements, name, metric) if metric else None
    if metric is not None and accuracy is None:
        return None, f"has no measured {metric}"
    return _Facts(candidate, verdict, size, accuracy, _seconds(measurements, name, task)), ""


def _best(usable: Sequence[_Facts], metric: str | None) -> _Facts:
    """Apply the rule to candidates that may all be shipped."""
    lower = metric is not None and METRICS[metric].better == "lower"
    kept = list(usable)
    if metric is not None:
        known = [facts.accuracy for facts in usable if facts.accuracy is not None]
        if lower:
            share, amount = _TOLERANCE.get(metric, (1.0, 0.0))
            limit = min(known) * share + amount
            kept = [facts for facts in usable if facts.accuracy is not None and facts.accuracy <= limit]
        else:
            limit = max(known) - _POINTS
            kept = [facts for facts in usable if facts.accuracy is not None and facts.accuracy >= limit]
    front = pareto_front({facts.candidate.name: facts.point(lower) for facts in kept})
    kept = [facts for facts in kept if facts.candidate.name in front]
    timed = [facts for facts in kept if facts.seconds is not None]
    if timed:
        return min(timed, key=lambda facts: (facts.size * (facts.seconds or 0.0), facts.candidate.name))
    return min(kept, key=lambda facts: (facts.size, facts.candidate.name))


def _seconds(measurements: Sequence[Measurement], name: str, task: Task) -> float | None:
    if task == "text-generation":
        rate = _value(measurements, name, "decode_tokens_per_s")
        return 1 / rate if rate else None
    latency = _value(measurements, name, "latency_ms")
    return None if latency is None else latency / 1e3


def _value(measurements: Sequence[Measurement], name: str, metric: str) -> float | None:
    row = find_row(measurements, name, metric)
    return row.summary.value if row is not None and row.summary is not None else None


def _sentence(best: _Facts, measurements: Sequence[Measurement], metric: str | None, task: Task, baseline: str) -> str:
    """Only facts that were measured; what is missing is left out."""
    size = METRICS["model_bytes"].show(best.size)
    base_size = _value(measurements, baseline, "model_bytes")
    parts = [f"{size}, {base_size / best.size:.1f}× smaller than the {baseline}" if base_size else size]
    if metric is not None and best.accuracy is not None:
        parts.append(_accuracy(best, measurements, metric, baseline))
    if best.seconds is not None:
        base = _seconds(measurements, baseline, task)
        row = find_row(measurements, baseline, "latency_ms")
        runtime = f" in {row.runtime}" if row else ""
        if task == "text-generation":
            speed = f"{1 / best.seconds:.0f} tokens/s"
        else:
            speed = METRICS["latency_ms"].show(best.seconds * 1e3)
        parts.append(speed + (f", {_factor(base / best.seconds)} the {baseline}{runtime}" if base else ""))
    where = {
        "device_verified": f"verified in {best.verdict.runtime} {best.verdict.runtime_version}".rstrip(),
        "program_verified": "its program verified by interpretation, not yet on a device",
    }[best.verdict.level]
    return f"Ship {best.candidate.name}: {'; '.join(parts)}; {where}."


def _accuracy(best: _Facts, measurements: Sequence[Measurement], metric: str, baseline: str) -> str:
    """Each data set's own figure, the mean when there are more than three."""
    label = {"kl": "KL", "spearman": "Spearman", "top1_agreement": "top-1 agreement"}.get(metric, metric)
    label += "" if metric == "accuracy" else f" to the {baseline}"
    rows = [
        row
        for row in measurements
        if row.subject == best.candidate.name and row.metric == metric and row.against in ("teacher", None)
    ]
    shown = [(row.data, METRICS[metric].show(row.summary.value)) for row in rows if row.summary is not None]
    if len(shown) > 3 or best.accuracy is None:
        return f"{label} {METRICS[metric].show(best.accuracy or 0.0)} (mean of {len(shown)} data sets)"
    return f"{label} {' and '.join(text + (f' on {data}' if data else '') for data, text in shown)}"


def _factor(speedup: float) -> str:
    return f"{speedup:.1f}× as fast as" if speedup >= 1 else f"{1 / speedup:.1f}× slower than"
