"""Metrics over images, and the interval of the difference between two models on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Difference = tuple[float, float, float]


@dataclass(frozen=True)
class Metric:
    """A metric that follows from a sum over images, so that images can be drawn anew without computing them anew."""

    rows: Array
    """(n, k), what each of n images adds."""
    of_sum: Callable[[Array], Array]
    """Sums (..., k) over images -> the metric (...,)."""

    @property
    def value(self) -> float:
        return float(self.of_sum(self.rows.sum(0)))


Scores = Mapping[str, Metric]


def mean_of(values: Any) -> Metric:
    """The mean of the values (n,) of images; those that are NaN do not count."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.isfinite(values)
    rows = np.stack([np.where(counts, values, 0.0), counts], axis=1)
    return Metric(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]))


def ratio_of(numerators: Any, denominators: Any) -> Metric:
    """The sum of the numerators (n,) over the sum of the denominators (n,), e.g. right pixels over pixels."""
    rows = np.stack([np.asarray(numerators), np.asarray(denominators)], axis=1).astype(np.float64)
    return Metric(rows, lambda sums: ratio(sums[..., 0], sums[..., 1]))


def mean_iou_of(intersections: Any, unions: Any) -> Metric:
    """The mean over classes of the global intersection (n, classes) over the global union (n, classes).

    Classes without a pixel, neither true nor predicted, do not count.
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
    """`after` less `before`, with the bounds of its 95 % interval by the paired bootstrap over images.

    The same images are drawn for both. An interval of one image, or of a metric that is not defined, is NaN.
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
