"""Does a model know how sure it may be? Its confidence against how often it is right, in bins.

Confidence is the probability of the model's first choice: the next token, a class, or what a probe says. The expected
calibration error is ``Σ n_b/N · |accuracy_b − confidence_b|`` over bins (Guo et al., *On calibration of modern neural
networks*, 2017). Bins are of equal width (Guo's, and what published figures mean) or of equal mass (as many examples in
each: no bin is nearly empty, so that the curve is steadier; Nguyen & O'Connor, *Posterior calibration and exploratory
analysis*, 2015). The error is taken over bins of equal width, the curve is drawn over bins of equal mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "Reliability", "Scheme", "assign_bins", "reliability"]

Array = npt.NDArray[Any]
Scheme = Literal["equal_width", "equal_mass"]
BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability curve: of each bin that holds something how many examples, their mean ``confidence`` and their
    ``accuracy`` (both 0 to 1), by rising confidence; ``error`` is the expected calibration error over these bins."""

    scheme: Scheme
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    error: float


def assign_bins(confidence: Array, bins: int = BINS, scheme: Scheme = "equal_width") -> npt.NDArray[np.int64]:
    """The bin ``[N]`` of each confidence ``[N]``.

    ``equal_width``: bin b holds ``b/bins <= confidence < (b+1)/bins``, the last one 1 too. ``equal_mass``: ranks are
    cut into runs whose sizes differ by one at most; equal confidences are never parted: they go to the bin of their
    middle rank, so bins may come out unequal where many are equal.

    >>> assign_bins(np.array([0.0, 0.49, 0.5, 1.0]), 2).tolist()
    [0, 0, 1, 1]
    >>> assign_bins(np.array([0.90, 0.99, 0.95, 0.91]), 2, "equal_mass").tolist()
    [0, 1, 1, 0]
    """
    values = np.asarray(confidence, np.float64)
    if scheme == "equal_width":
        return np.minimum((values * bins).astype(np.int64), bins - 1)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts + (counts - 1) // 2
    return np.asarray(middle * bins // len(values), np.int64)[inverse]


def reliability(confidence: Array, right: Array, *, bins: int = BINS, scheme: Scheme = "equal_width") -> Reliability:
    """The curve of ``confidence [N]`` (0 to 1) against ``right [N]`` (0 or 1); ``ValueError`` for nothing, or NaN."""
    sure, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if sure.ndim != 1 or sure.shape != hit.shape or not len(sure):
        raise ValueError(f"confidence {sure.shape} and right {hit.shape} must be lists of one length, not empty")
    if not ((sure >= 0) & (sure <= 1 + 1e-9)).all():
        raise ValueError("confidence is not between 0 and 1")
    place = assign_bins(sure, bins, scheme)
    counts = np.bincount(place, minlength=bins)
    full = counts > 0
    means = [np.bincount(place, values, bins)[full] / counts[full] for values in (sure, hit)]
    error = float((counts[full] * np.abs(means[0] - means[1])).sum() / len(sure))
    listed = [tuple(float(value) for value in mean) for mean in means]
    return Reliability(scheme, tuple(int(count) for count in counts[full]), listed[0], listed[1], error)
