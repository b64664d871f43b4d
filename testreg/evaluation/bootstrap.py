"""Metrics over a set of images, and bootstrap intervals for the difference between two models on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Difference = tuple[float, float, float]
"""A difference, and the lower and upper bound of its 95 % interval."""


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of sums over images, as a mean or a global IoU is.

    The bootstrap draws images anew, and needs only new sums for that, no new forward of a model.
    """

    rows: Array
    """(n, k): the k numbers that each of n images adds to the sums."""
    of_sum: Callable[[Array], Array]
    """Maps sums (..., k) over images to the metric (...,)."""

    @property
    def value(self) -> float:
        """The metric over all images."""
        return float(self.of_sum(self.rows.sum(0)))


Scores = Mapping[str, Metric]
"""The metrics of one model by name."""


def mean_of(values: Any) -> Metric:
    """The metric that is the mean of a value for each image, (n,). Values that are not finite are left out."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.isfinite(values)
    rows = np.stack([np.where(counts, values, 0.0), counts], axis=1)
    return Metric(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]))


def ratio_of(numerators: Any, denominators: Any) -> Metric:
    """The metric that is the sum of numerators (n,) over the sum of denominators (n,), e.g. pixel accuracy."""
    rows = np.stack([np.asarray(numerators), np.asarray(denominators)], axis=1).astype(np.float64)
    return Metric(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]))


def mean_iou_of(intersections: Any, unions: Any) -> Metric:
    """The mIoU: intersections and unions (n, classes) are summed over images, divided, and averaged over classes.

    Classes without a true or predicted pixel are left out.
    """
    classes = np.shape(intersections)[1]
    rows = np.concatenate([np.asarray(intersections), np.asarray(unions)], axis=1).astype(np.float64)

    def of_sum(sums: Array) -> Array:
        is_defined = sums[..., classes:] > 0
        ious = np.where(is_defined, ratio(sums[..., :classes], sums[..., classes:]), 0.0)
        return ratio(ious.sum(-1), is_defined.sum(-1))

    return Metric(rows, of_sum)


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, NaN or infinite where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)


def difference(before: Metric, after: Metric, resamples: int, seed: int) -> Difference:
    """`after` minus `before`, with the bounds of its 95 % interval by the paired bootstrap over images.

    Paired: the same images are drawn for both metrics. The bounds are NaN if there is only one image, or if the metric
    is not defined.

    Raises:
        ValueError: the metrics are of different numbers of images.
    """
    if len(before.rows) != len(after.rows):
        raise ValueError(f"the metrics are of {len(before.rows)} and of {len(after.rows)} images, not of the same")
    count = len(before.rows)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples if count > 1 else 0):
        weights = random.multinomial(count, np.full(count, 1 / count)).astype(np.float64)
        drawn.append(after.of_sum(weights @ after.rows) - before.of_sum(weights @ before.rows))
    defined = np.asarray([each for each in drawn if np.isfinite(each)])
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return after.value - before.value, float(low), float(high)
