"""How near an artifact comes to its reference: from ``score()`` arrays to metrics with intervals.

Tokens of one text and pairs of one sentence are not independent, so intervals resample documents (text generation,
token classification) or sentences (embeddings), never tokens or pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Task
from ..errors import UsageError
from ..runtimes.session import SessionInfo
from .calibration import BINS, assign_bins, reliability
from .metrics import METRICS
from .records import Measurement, Summary
from .statistics import bootstrap_interval, supported_percentiles

__all__ = [
    "Estimate",
    "expected_calibration_error",
    "fidelity",
    "mean_estimate",
    "own_estimates",
    "pairwise_spearman",
    "softmax",
]

Array = npt.NDArray[Any]
CURVE_EXAMPLES = 20  # fewer in a bin, and a curve is noise


@dataclass(frozen=True)
class Estimate:
    """A metric's summary with the samples it came from; :meth:`measurement` adds who, where and how."""

    metric: str
    summary: Summary
    samples: tuple[float, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def measurement(
        self,
        *,
        subject: str,
        artifact_id: str,
        info: SessionInfo,
        device: str,
        threads: int,
        environment: Mapping[str, Any],
        protocol: Mapping[str, Any] | None = None,
        against: str | None = None,
        data: str | None = None,
        context: int | None = None,
        target: str = "host",
    ) -> Measurement:
        """The row for ``measurements.jsonl``; accuracy of an emulated device is still measured accuracy."""
        return Measurement(
            subject=subject, metric=self.metric, unit=METRICS[self.metric].unit, source="measured",
            summary=self.summary, samples=(self.samples,), artifact_id=artifact_id, runtime=info.runtime,
            runtime_version=info.version, backend=info.backend, device=device, threads=threads,
            protocol={**self.protocol, **(protocol or {})}, environment=environment, against=against, data=data,
            context=context, placement=info.placement, target=target,
        )  # fmt: skip


def fidelity(task: Task, scores: Mapping[str, Array], *, documents: npt.ArrayLike, seed: int = 0) -> list[Estimate]:
    """The accuracy metrics of ``scores`` (what ``score()`` of a session gave against a reference).

    ``documents [N]`` is the source text of each row of the reference (``reference.json``). Embeddings need the
    reference's own embeddings for Spearman: pass them as ``scores["reference_embeddings"] [N, D']``; cosine is left
    out where the sizes differ. Raises :class:`UsageError` for scores that are not finite.
    """
    for name in ("kl", "logprob", "confidence", "cosine", "embeddings", "logits"):
        if name in scores and not np.isfinite(scores[name]).all():
            raise UsageError(f"scores hold NaN or infinity in {name!r}", hint="verify the artifact: it is broken")
    sources = np.asarray(documents)
    match task:
        case "text-generation":
            return _generation(scores, sources[scores["window"]], seed)
        case "token-classification":
            return _distribution(scores, sources[scores["window"]], seed)
        case "text-classification":
            return _distribution(scores, sources, seed)
        case "feature-extraction":
            return _embeddings(scores, sources, seed)


def mean_estimate(metric: str, samples: npt.ArrayLike, *, groups: npt.ArrayLike | None = None, seed: int = 0,
                  protocol: Mapping[str, Any] | None = None) -> Estimate:  # fmt: skip
    """The mean of ``samples [n]`` with an interval over ``groups``, and the percentiles that ``n`` supports.

    Where all samples are the same 0 or 1 a bootstrap interval has no width; then it is the exact binomial one
    (Clopper and Pearson, 1934) of as many trials as there are groups.
    """
    values = np.asarray(samples, dtype=np.float64)
    units = len(values) if groups is None else len(np.unique(np.asarray(groups)))
    low, high = _interval(values, "mean", groups, seed)
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        edge = 0.025 ** (1 / units)
        low, high = (edge, 1.0) if values[0] == 1 else (0.0, 1 - edge)
    percentiles = {} if np.isin(values, (0, 1)).all() else _percentiles(values)
    summary = Summary(float(values.mean()), "mean", len(values), low, high, percentiles=percentiles)
    return Estimate(metric, summary, _rounded(values), {"independent_units": units, **(protocol or {})})


def own_estimates(scores: Mapping[str, Array], *, documents: npt.ArrayLike, seed: int = 0) -> list[Estimate]:
    """Perplexity, accuracy of the next token and its calibration of the reference model itself, from the ``score()``
    arrays of that model against its own reference."""
    groups = np.asarray(documents)[scores["window"]]
    surprise = -np.asarray(scores["reference_logprob"], np.float64)
    return [_geometric("perplexity", surprise, groups, seed), *_next_token(scores, groups, seed)]


def pairwise_spearman(embeddings: Array, reference: Array, *, seed: int = 0) -> Estimate:
    """Spearman correlation of the cosines of all pairs among ``embeddings [N, D]`` with those among ``reference
    [N, D']``.

    The interval resamples sentences, not pairs. Ranks are those of the whole set (Spearman's coefficient is Pearson's
    of the ranks), so that a resample with sentence weights ``w`` costs a few quadratic forms ``wᵀMw`` instead of a
    sort; pairs of a sentence with its own copy are left out.
    """
    from scipy.stats import rankdata

    count = len(embeddings)
    if count < 3 or len(reference) != count:
        raise UsageError(f"Spearman needs the same 3 or more sentences on both sides, got {count}, {len(reference)}")
    upper = np.triu_indices(count, 1)
    ranks = []
    for vectors in (embeddings, reference):
        unit = _unit(vectors)
        table = np.zeros((count, count))
        table[upper] = rankdata((unit @ unit.T)[upper])
        table[upper] -= table[upper].mean()  # numbers near 0 keep the sums below exact
        ranks.append(table)
    a, b = ranks
    forms = (a, b, a * a, b * b, a * b, np.triu(np.ones((count, count)), 1))

    def correlation(drawn: Array) -> Array:
        weights = np.stack([np.bincount(row, minlength=count) for row in drawn.astype(np.int64)]).astype(np.float64)
        sa, sb, saa, sbb, sab, n = (((weights @ (m + m.T)) * weights).sum(axis=1) / 2 for m in forms)
        n = np.maximum(n, 1)  # few sentences: a resample may hold one of them alone, and no pair
        covariance = sab - sa * sb / n
        spread = np.sqrt((saa - sa * sa / n) * (sbb - sb * sb / n))
        return np.asarray(np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0))

    everyone = np.arange(count, dtype=np.float64)
    value = float(correlation(everyone[None])[0])
    low, high = bootstrap_interval(everyone, correlation, seed=seed)
    protocol = {"pairs": count * (count - 1) // 2, "independent_units": count, "derived_from": "embeddings"}
    return Estimate("spearman", Summary(value, "derived", count, low, high), (), protocol)


def expected_calibration_error(
    confidence: Array, right: Array, *, groups: npt.ArrayLike | None = None, seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
) -> Estimate:  # fmt: skip
    """ECE of a first choice of which ``confidence [N]`` is the probability and ``right [N]`` whether it was true.

    15 bins of equal width; the interval resamples ``groups`` (documents). ``protocol["reliability"]`` is the curve to
    draw, over at most 15 bins of equal mass with 20 examples or more in each. See
    :mod:`edgestill.bench.calibration`. The samples are the confidences.
    """
    sure, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    curve = reliability(sure, hit, bins=max(1, min(BINS, len(sure) // CURVE_EXAMPLES)), scheme="equal_mass")
    bins = assign_bins(sure)

    def error(drawn: Array) -> Array:
        gaps = drawn[..., 0] - drawn[..., 1]
        inside = drawn[..., 2][..., None] == np.arange(BINS)
        return np.asarray(np.abs((gaps[..., None] * inside).sum(axis=1)).sum(axis=1) / drawn.shape[1])

    samples = np.stack([hit, sure, bins], axis=1)
    low, high = _interval(samples, error, groups, seed)
    facts = {
        "bins": BINS, "scheme": "equal_width", "derived_from": "confidence of the first choice",
        "reliability": dataclasses.asdict(curve), **(protocol or {}),
    }  # fmt: skip
    summary = Summary(reliability(sure, hit).error, "derived", len(sure), low, high)
    return Estimate("ece", summary, _rounded(sure), facts)


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    exponential = np.exp(shifted)
    return np.asarray(exponential / exponential.sum(axis=-1, keepdims=True))


def _generation(scores: Mapping[str, Array], groups: Array, seed: int) -> list[Estimate]:
    estimates = _distribution(scores, groups, seed)
    estimates.append(mean_estimate("top5_agreement", scores["top5"], groups=groups, seed=seed))
    estimates += _probability_changes(scores, groups, seed)
    surprise = -np.asarray(scores["logprob"], np.float64)
    estimates.append(_geometric("perplexity", surprise, groups, seed))
    excess = surprise + np.asarray(scores["reference_logprob"], np.float64)
    estimates.append(_geometric("perplexity_ratio", excess, groups, seed))
    return estimates + _next_token(scores, groups, seed)


def _next_token(scores: Mapping[str, Array], groups: Array, seed: int) -> list[Estimate]:
    return [
        mean_estimate("next_token_accuracy", scores["right"], groups=groups, seed=seed),
        expected_calibration_error(scores["confidence"], scores["right"], groups=groups, seed=seed),
    ]


def _distribution(scores: Mapping[str, Array], groups: Array, seed: int) -> list[Estimate]:
    kl = np.asarray(scores["kl"], np.float64)
    estimates = [mean_estimate("kl", kl, groups=groups, seed=seed), _derived("kl_median", kl, 0.5, "kl", groups, seed)]
    if 99 in supported_percentiles(len(kl)):
        estimates.append(_derived("kl_p99", kl, 0.99, "kl", groups, seed))
    # no interval: a bootstrap can't see beyond the largest sample
    estimates.append(Estimate("kl_max", Summary(float(kl.max()), "max", len(kl)), (), {"derived_from": "kl"}))
    estimates.append(mean_estimate("top1_agreement", scores["top1"], groups=groups, seed=seed))
    return estimates


def _probability_changes(scores: Mapping[str, Array], groups: Array, seed: int) -> list[Estimate]:
    """``delta_p``: by how much the probability of the true next token changed, artifact less reference, as
    llama-perplexity defines it; and the root of its mean square. Both tails have percentiles."""
    change = np.exp(np.asarray(scores["logprob"], np.float64))
    change -= np.exp(np.asarray(scores["reference_logprob"], np.float64))
    mean = mean_estimate("delta_p", change, groups=groups, seed=seed)
    tails = {f"p{100 - p}": float(np.quantile(change, 1 - p / 100)) for p in supported_percentiles(len(change))}
    quartiles = {"p25": float(np.quantile(change, 0.25)), "p75": float(np.quantile(change, 0.75))}
    both = {**mean.summary.percentiles, **tails, **quartiles}
    ordered = {name: both[name] for name in sorted(both, key=lambda name: int(name[1:]))}
    low, high = _interval(change, lambda drawn: np.sqrt((drawn**2).mean(axis=1)), groups, seed)
    square = Summary(float(np.sqrt((change**2).mean())), "derived", len(change), low, high)
    return [
        dataclasses.replace(mean, summary=dataclasses.replace(mean.summary, percentiles=ordered)),
        Estimate("delta_p_rms", square, (), {"derived_from": "delta_p"}),
    ]


def _derived(metric: str, values: Array, share: float, of: str, groups: Array, seed: int) -> Estimate:
    """The quantile ``share`` of another metric's samples."""
    low, high = _interval(values, lambda drawn: np.quantile(drawn, share, axis=1), groups, seed)
    summary = Summary(float(np.quantile(values, share)), "derived", len(values), low, high)
    return Estimate(metric, summary, (), {"derived_from": of})


def _embeddings(scores: Mapping[str, Array], groups: Array, seed: int) -> list[Estimate]:
    estimates = []
    if "cosine" in scores:
        estimates.append(mean_estimate("cosine", scores["cosine"], groups=groups, seed=seed))
    if "reference_embeddings" in scores and len(scores["embeddings"]) >= 3:
        estimates.append(pairwise_spearman(scores["embeddings"], scores["reference_embeddings"], seed=seed))
    return estimates


def _geometric(metric: str, logarithms: Array, groups: Array, seed: int) -> Estimate:
    """The geometric mean, ``exp`` of the mean of ``logarithms``; its samples are their exponentials."""
    low, high = _interval(logarithms, lambda drawn: np.exp(drawn.mean(axis=1)), groups, seed)
    summary = Summary(float(np.exp(logarithms.mean())), "geometric_mean", len(logarithms), low, high)
    return Estimate(metric, summary, _rounded(np.exp(logarithms)), {"independent_units": len(np.unique(groups))})


def _interval(values: Array, statistic: Any, groups: npt.ArrayLike | None, seed: int) -> tuple[Any, Any]:
    """The bootstrap interval, or ``(None, None)`` for a single independent unit."""
    units = len(values) if groups is None else len(np.unique(np.asarray(groups)))
    return bootstrap_interval(values, statistic, groups=groups, seed=seed) if units > 1 else (None, None)


def _percentiles(values: Array) -> dict[str, float]:
    return {f"p{p}": float(np.quantile(values, p / 100)) for p in (50, *supported_percentiles(len(values)))}


def _rounded(values: Array) -> tuple[float, ...]:
    """Six significant digits: more is noise, and thousands of them are written."""
    return tuple(float(f"{value:.6g}") for value in values)


def _unit(vectors: Array) -> npt.NDArray[np.float64]:
    wide = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0))
