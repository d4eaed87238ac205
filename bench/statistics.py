"""Statistics of measurements: bootstrap intervals over launches, supported percentiles, ratios.

Inferences of one process share its memory layout, its caches and its neighbours, so samples of one launch are not
independent: the launch is the unit (Kalibera & Jones, *Rigorous benchmarking in reasonable time*, 2013). A run affords
three to ten of them, and a bootstrap of three can't leave the range of three numbers: it misses the truth one time in
four. So launches get Student's interval (:func:`summarise`), and the bootstrap is for documents and examples, of which
there are many; its tails are moved out by the rule of Hesterberg, *What teachers should know about the bootstrap*,
2014 ("expanded percentile interval").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .records import Summary

__all__ = [
    "Interval",
    "bootstrap_interval",
    "ratio_interval",
    "student_interval",
    "summarise",
    "supported_percentiles",
]

Floats = npt.NDArray[np.float64]
Statistic = Literal["mean", "median", "max", "sum"]
Reducer = Callable[[Any], Any]
Launches = Sequence[Sequence[float]]

PERCENTILES = (90, 95, 99)
_CHUNK_ELEMENTS = 1 << 21  # 16 MiB of float64 at a time, whatever the number of resamples

_REDUCERS: dict[str, Reducer] = {
    "mean": lambda x: x.mean(axis=1),
    "median": lambda x: np.median(x, axis=1),
    "max": lambda x: x.max(axis=1),
    "sum": lambda x: x.sum(axis=1),
}


class Interval(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    samples: npt.ArrayLike,
    statistic: Statistic | Reducer,
    *,
    groups: npt.ArrayLike | None = None,
    within: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """A ``level`` confidence interval ``(low, high)`` of a statistic of ``samples [n]`` or ``[n, k]``.

    ``statistic`` is a name, or a function that maps ``[R, n]`` (or ``[R, n, k]``) to ``[R]``, one value a resample.
    ``groups [n]`` says which samples belong together (a launch, a window of text): whole groups are resampled;
    with ``within`` samples are resampled inside the drawn groups too, right for few groups of noisy samples.
    The same seed gives the same interval. Raises :class:`ValueError` for fewer than two independent units.
    """
    values = np.asarray(samples, dtype=np.float64)
    reducer = _REDUCERS[statistic] if isinstance(statistic, str) else statistic
    members = _members(len(values), groups)
    if len(members) < 2:
        raise ValueError(f"an interval needs at least 2 independent samples or groups, got {len(members)}")
    generator = np.random.default_rng(seed)
    drawn = _resample(values, members, reducer, within and groups is not None, resamples, generator)
    return _tails(drawn, level, len(members))


def student_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The mean of ``values [n]``, one an independent unit, and half the width of Student's interval on it.

    >>> centre, half = student_interval([1.0, 2.0, 3.0])
    >>> centre, round(half, 3)
    (2.0, 2.484)
    """
    from scipy.special import stdtrit  # Student's quantile, without the machinery of scipy.stats

    units = np.asarray(values, dtype=np.float64)
    if len(units) < 2:
        raise ValueError(f"an interval needs at least 2 independent samples or groups, got {len(units)}")
    quantile = float(stdtrit(len(units) - 1, (1 + level) / 2))
    return float(units.mean()), float(quantile * units.std(ddof=1) / math.sqrt(len(units)))


def ratio_interval(
    a: Launches,
    b: Launches,
    *,
    statistic: Statistic = "median",
    paired: bool = True,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """statistic(a) / statistic(b) with its interval; ``a`` and ``b`` hold samples per launch.

    ``paired``: launch ``i`` of both ran next to each other (interleaved), so both are drawn together and slow phases
    of the machine cancel; with unequal numbers of launches they are drawn apart. Inside launches samples are always
    drawn apart. With a single launch only the samples inside it are resampled.
    """
    left, right = [np.asarray(x, dtype=np.float64) for x in a], [np.asarray(x, dtype=np.float64) for x in b]
    if not left or not right or any(x.size == 0 for x in [*left, *right]):
        raise ValueError("a ratio needs at least one sample in every launch of both sides")
    reducer = _REDUCERS[statistic]
    generator = np.random.default_rng(seed)
    together = paired and len(left) == len(right)
    first = generator.integers(len(left), size=(resamples, len(left)))
    second = first if together else generator.integers(len(right), size=(resamples, len(right)))
    over, under = (reducer(_inside(x, chosen, generator)) for x, chosen in ((left, first), (right, second)))
    drawn = over / under
    fewest = min(len(left), len(right))
    units = fewest if fewest > 1 else min(left[0].size, right[0].size)
    low, high = _tails(drawn, level, units) if units > 1 else (drawn.min(), drawn.max())
    value = reducer(np.concatenate(left)[None])[0] / reducer(np.concatenate(right)[None])[0]
    return Interval(float(value), float(low), float(high))


def supported_percentiles(n: int, *, level: float = 0.95) -> tuple[int, ...]:
    """Which of the 90th, 95th and 99th percentiles ``n`` samples support.

    Percentile ``p`` is supported when the largest sample bounds it with confidence ``level``, that is when
    ``1 - (p/100)**n >= level``: p90 needs 29 samples, p95 59, p99 299 (the binomial bound that MLPerf LoadGen's early
    stopping uses with no sample above it).

    >>> supported_percentiles(28), supported_percentiles(29), supported_percentiles(299)
    ((), (90,), (90, 95, 99))
    """
    return tuple(p for p in PERCENTILES if 1 - (p / 100) ** n >= level)


def summarise(
    samples_per_launch: Launches,
    statistic: Literal["median", "mean", "max", "sum", "exact"] = "median",
    *,
    level: float = 0.95,
) -> Summary:
    """The summary of raw samples, one list per launch: value, interval, and the percentiles that ``n`` supports.

    The interval is Student's over launches, each reduced to its own median or mean; of logarithms where all are
    positive (noise multiplies, and no time is below zero). With one launch the interval speaks of that launch alone,
    not of the next: between two order statistics for the median (distribution-free; six samples or more), Student's
    for the mean. None for ``max`` and ``exact`` (nothing sees beyond the largest sample), nor for a single sample.
    Raises :class:`ValueError` when there is no sample, or when samples called exact differ.
    """
    launches = [np.asarray(launch, dtype=np.float64) for launch in samples_per_launch if len(launch)]
    if not launches:
        raise ValueError("no samples to summarise")
    values = np.concatenate(launches)
    if not np.isfinite(values).all():
        raise ValueError("samples hold NaN or infinity")
    n = len(values)
    if statistic == "exact":
        if values.min() != values.max():
            raise ValueError(f"samples called exact differ: {values.min()} to {values.max()}")
        return Summary(float(values[0]), "exact", n, level=level)
    reducer = _REDUCERS[statistic]
    value = float(reducer(values[None, :])[0])
    percentiles = {f"p{p}": float(np.quantile(values, p / 100, method="higher")) for p in supported_percentiles(n)}
    if statistic in ("max", "sum"):
        return Summary(value, statistic, n, level=level, percentiles=percentiles if statistic == "max" else {})
    low: float | None
    high: float | None
    if len(launches) > 1:
        low, high = _over_launches(np.array([reducer(launch[None, :])[0] for launch in launches]), level)
    elif statistic == "median":
        low, high = _order_statistics(values, level)
    else:
        low, high = _over_launches(values, level) if n > 1 else (None, None)
    if low is not None and high is not None:  # the middle of all samples need not be that of the launches' middles
        low, high = min(low, value), max(high, value)
    return Summary(value, statistic, n, low, high, level, percentiles)


def _over_launches(units: Floats, level: float) -> tuple[float, float]:
    if units.min() > 0:
        centre, half = student_interval(np.log(units), level)
        return math.exp(centre - half), math.exp(centre + half)
    centre, half = student_interval(units, level)
    return centre - half, centre + half


def _order_statistics(values: Floats, level: float) -> tuple[float | None, float | None]:
    """The narrowest symmetric pair of sorted samples that holds the median with probability ``level``, by the binomial
    distribution with p = 1/2 (Conover, *Practical nonparametric statistics*); none where even the range does not."""
    from scipy.special import bdtr

    n = len(values)
    left_out = int(np.searchsorted(2 * bdtr(np.arange(n // 2), n, 0.5), 1 - level, side="right"))
    if not left_out:
        return None, None
    ordered = np.sort(values)
    return float(ordered[left_out - 1]), float(ordered[n - left_out])


def _members(n: int, groups: npt.ArrayLike | None) -> list[npt.NDArray[np.intp]]:
    """The indices of the samples of each independent unit."""
    if groups is None:
        return list(np.arange(n)[:, None])
    labels = np.asarray(groups)
    if labels.shape != (n,):
        raise ValueError(f"groups have shape {labels.shape}, samples {n} rows")
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.unique(labels, return_inverse=True)[1][order])) + 1)


def _resample(
    values: Floats,
    members: list[npt.NDArray[np.intp]],
    reducer: Reducer,
    within: bool,
    resamples: int,
    generator: np.random.Generator,
) -> Floats:
    """The statistic of ``resamples`` resamples, in chunks of bounded memory; groups of unequal size one by one."""
    count = len(members)
    largest = max(len(member) for member in members)
    width = values[0].size if values.ndim > 1 else 1
    step = max(1, _CHUNK_ELEMENTS // (count * largest * width))
    table = np.stack(members) if all(len(member) == largest for member in members) else None
    drawn = []
    for start in range(0, resamples, step):
        chosen = generator.integers(count, size=(min(step, resamples - start), count))
        if within:
            rows = _inside([values[member] for member in members], chosen, generator)
            drawn.append(np.asarray(reducer(rows), dtype=np.float64))
        elif table is not None:
            index = table[chosen].reshape(len(chosen), -1)
            drawn.append(np.asarray(reducer(values[index]), dtype=np.float64))
        else:  # whole groups of unequal size: resamples differ in length
            drawn += [
                np.asarray(reducer(values[np.concatenate([members[i] for i in row])][None]), dtype=np.float64)
                for row in chosen
            ]
    return np.concatenate(drawn)


def _inside(groups: Sequence[Floats], chosen: npt.NDArray[np.intp], generator: np.random.Generator) -> Floats:
    """Samples ``[R, G * m]`` drawn inside the ``chosen [R, G]`` groups; ``m`` is the largest group's size, so that
    groups that were cut short (a launch that ran into its time limit) weigh as much as the others."""
    sizes = np.array([len(group) for group in groups])
    padded = np.zeros((len(groups), sizes.max(), *groups[0].shape[1:]))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    shape = (*chosen.shape, int(sizes.max()))
    inner = (generator.random(shape) * sizes[chosen][:, :, None]).astype(np.intp)
    drawn = padded[chosen[:, :, None], inner]
    return np.asarray(drawn.reshape(len(chosen), -1, *drawn.shape[3:]))


def _tails(drawn: Floats, level: float, units: int) -> tuple[float, float]:
    """The expanded percentile interval of resampled statistics with ``units`` independent units."""
    from scipy.stats import norm, t

    tail = (1 - level) / 2
    expanded = float(norm.cdf(math.sqrt(units / (units - 1)) * t.ppf(tail, units - 1)))
    low, high = np.quantile(drawn, [expanded, 1 - expanded])
    return float(low), float(high)
