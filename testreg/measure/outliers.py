"""Which patch tokens are outliers: the rule, and the norms that it is applied to.

*Outliers* are patch tokens whose norm in the residual stream is far above that of the other patches of their image.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from testreg.families import Grid, Tower
from testreg.measure.hooks import recorded_norms

Position = tuple[int, ...]
"""Row and column of a patch in the grid; of a clip's patch, its place in time, row and column."""

MIN_FRACTION = 1e-3  # a model has outliers if at least this share of the patches are outliers after some block
MIN_DEVIATION = 0.05  # a component has at least this deviation of log norms, so norms within 5 % are not told apart
LOWEST_RATIO = 1e-3  # norms that are lower than this, over the median, are raised to it before the logarithm is taken


@dataclass(frozen=True)
class OutlierRule:
    """A token is an outlier if its norm exceeds max(median + k * 1.4826 * MAD, min_ratio * median) of its image.

    The median and the median absolute deviation (MAD) are taken over the patches of one image after one block. So the
    rule needs no tuning to a model's scale, resolution or depth. 1.4826 * MAD estimates a standard deviation. Without
    `min_ratio`, images whose norms hardly vary would have outliers. An absolute `threshold` replaces both limits (table
    of appendix A of the paper: 75 for OpenCLIP ViT-B/16, 150 for DINOv2 ViT-L/14).

    With `mixture`, the log norms of an image are divided into two Gaussian components, and the patches of the upper
    component are outliers. No k is needed, and up to half of the patches may be outliers. Of all ways to divide the
    sorted norms in two, the rule takes the one with the largest classification likelihood (Celeux and Govaert, 1992).
    It must be better than a single Gaussian by the Bayesian information criterion (Schwarz, 1978), and the geometric
    mean of the upper component must be at least `min_ratio` times that of the lower one. Otherwise the image has no
    outliers: its limit is infinite. Norms below `min_ratio` times the lower mean are never outliers.

    Example:
        >>> norms = torch.tensor([9.0, 10.0, 11.0, 10.0, 9.5, 80.0])  # of the patches of an image
        >>> norms > testreg.OutlierRule().limit(norms)
        tensor([False, False, False, False, False,  True])
        >>> norms > testreg.OutlierRule(mixture=True).limit(norms)
        tensor([False, False, False, False, False,  True])
    """

    k: float = 5.0
    min_ratio: float = 2.0
    threshold: float | None = None
    mixture: bool = False

    def __post_init__(self) -> None:
        for name in ("k", "min_ratio", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} of the outlier rule must be a positive number, got {value}")
        if self.mixture and self.threshold is not None:
            raise ValueError("an outlier rule is a mixture or has a threshold, not both")

    def limit(self, norms: Tensor) -> Tensor:
        """The norm (..., 1) above which a token is an outlier, from the norms (..., N) of an image's patches."""
        median = norms.median(-1, keepdim=True).values
        if self.threshold is not None:
            return torch.full_like(median, self.threshold)
        if self.mixture:
            return mixture_limit(norms, self.min_ratio)
        return torch.maximum(self.normal(norms), self.min_ratio * median)

    def normal(self, norms: Tensor) -> Tensor:
        """The largest normal norm (..., 1), median + k * 1.4826 * MAD, of an image's patches with norms (..., N)."""
        median = norms.median(-1, keepdim=True).values
        return median + self.k * 1.4826 * (norms - median).abs().median(-1, keepdim=True).values

    def describe(self) -> str:
        """The rule in words."""
        if self.threshold is not None:
            return f"norm > {self.threshold:g}"
        if self.mixture:
            return f"norm in the upper of two components of the image's log norms, {self.min_ratio:g} x apart or more"
        return f"norm > max(median + {self.k:g} * 1.4826 * MAD, {self.min_ratio:g} * median) of the image's patches"


def mixture_limit(norms: Tensor, min_ratio: float) -> Tensor:
    """The limit (..., 1) of `OutlierRule(mixture=True)`, from the norms (..., N) of an image's patches.

    It is infinite where the norms are not divided into two components.
    """
    ordered, count = norms.sort(-1).values, norms.shape[-1]
    logs = ordered.cpu().double()
    logs = (logs / logs.median(-1, keepdim=True).values).clamp(min=LOWEST_RATIO).log()
    num_lower = torch.arange(1, count)  # how many norms are in the lower component, for each way to divide them
    sums, squares = logs.cumsum(-1), logs.square().cumsum(-1)

    def mean_and_cost(size: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a component, and -2 log likelihood of its log norms, up to a constant for each norm.

        A component has `size` log norms with the sum `total` and the sum of squares `square`.
        """
        mean = total / size
        variance = (square / size - mean.square()).clamp(min=0)
        floored = variance.clamp(min=MIN_DEVIATION**2)
        return mean, size * (floored.log() + variance / floored - 2 * (size / count).log())

    lower_mean, lower_cost = mean_and_cost(num_lower, sums[..., :-1], squares[..., :-1])
    upper_mean, upper_cost = mean_and_cost(
        count - num_lower, sums[..., -1:] - sums[..., :-1], squares[..., -1:] - squares[..., :-1]
    )
    _, cost_of_one = mean_and_cost(torch.tensor(count), sums[..., -1:], squares[..., -1:])
    gain = cost_of_one - lower_cost - upper_cost - 3 * math.log(count)  # a penalty for the three more parameters
    is_allowed = (upper_mean - lower_mean >= math.log(min_ratio)) & (2 * num_lower > count)
    no_split = gain.new_zeros(*gain.shape[:-1], 1)  # the candidate of a single component, with no gain
    gain, index = torch.cat([gain.masked_fill(~is_allowed, -math.inf), no_split], -1).max(-1, keepdim=True)
    index, is_split = index.to(ordered.device), (gain > 0).to(ordered.device)
    # If the upper component is wide, it includes normal norms, which are too close to the lower mean to be outliers.
    mean = torch.cat([lower_mean, no_split], -1).exp().to(ordered).gather(-1, index)
    mean = mean * ordered.median(-1, keepdim=True).values
    return torch.maximum(ordered.gather(-1, index), min_ratio * mean).masked_fill(~is_split, math.inf)


@dataclass(frozen=True)
class Detection:
    """Decides which patches count as outliers: by a rule, after one block or several, but not at ignored positions."""

    rule: OutlierRule
    block: int
    """The block after which outliers are detected, the *detection block*."""
    ignored: frozenset[Position] = frozenset()
    """Positions at which patches never count as outliers, since they have high norms whatever the image shows."""
    onset: int | None = None
    """The onset block, after which the outliers are there. Attribution counts the outliers after this block and after
    every later one; if it is None, only those after `block`."""

    def counts(self, depth: int) -> Tensor:
        """Whether the outliers after each block count for attribution, (L,) for L = `depth` blocks."""
        blocks = torch.arange(depth)
        return blocks == self.block if self.onset is None else blocks >= self.onset

    def outliers(self, norms: Tensor, num_prefix: int, grid: Grid, *, include_prefix: bool = False) -> Tensor:
        """Whether each token is an outlier, (..., T).

        Args:
            norms: (..., T), of the prefix tokens and then of the patches.
            grid: the grid of the patches.
            include_prefix: whether prefix tokens may be outliers.
        """
        outlier = norms > self.rule.limit(norms[..., num_prefix:])
        outlier[..., :num_prefix] &= include_prefix
        outlier[..., num_prefix:] &= ~ignored_patches(self.ignored, grid).to(norms.device)
        return outlier


def ignored_patches(ignored: Collection[Position], grid: Grid) -> Tensor:
    """Whether each of a grid's patches lies at an ignored position, (N,)."""
    mask = torch.zeros(grid, dtype=torch.bool)
    for position in ignored:
        if len(position) == len(grid) and all(place < size for place, size in zip(position, grid, strict=True)):
            mask[position] = True
    return mask.flatten()


def autocast_off(device: torch.device) -> torch.autocast:
    """A context in which autocast is off.

    The model may run under autocast, which computes matrix products of float32 tensors (`@`, einsum) in half precision.
    Sums would saturate or overflow there. Norms, means and other sums need no such context.
    """
    return torch.autocast(device.type, enabled=False)


def check_finite(norms: Tensor, images: Tensor) -> None:
    """Raise ValueError if a norm of the images' tokens is not finite: NaN would never count as an outlier."""
    if norms.isfinite().all():
        return
    if not images.isfinite().all():
        raise ValueError(
            "an image has pixels that are not finite (NaN or infinity): leave it out, or mend its transform"
        )
    raise ValueError("the norms of the tokens are not finite: run the model in float32 or bfloat16")


@torch.no_grad()
def token_norms(tower: Tower, images: Tensor) -> Tensor:
    """Run images (B, 3, h, w) or clips, and return the norms (L, B, T) of the tokens after each block, in float32."""
    with recorded_norms(tower, images) as norms:
        tower.run(images)
    return torch.stack(norms)
