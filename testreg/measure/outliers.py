"""Which patch tokens are outliers: the rule, and the residual norms that it is applied to."""

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
MIN_DEVIATION = 0.05  # least deviation of log norms in a component: norms within 5 % of each other are not told apart
LOWEST_RATIO = 1e-3  # lower norms, over the median, count as this


@dataclass(frozen=True)
class OutlierRule:
    """A token is an outlier if its norm exceeds max(median + k * 1.4826 * MAD, min_ratio * median) of its image.

    Median and median absolute deviation are taken over the patches of one image after one block, so the rule needs no
    tuning to a model's scale, resolution or depth. 1.4826 * MAD estimates a standard deviation; `min_ratio` keeps
    images whose norms hardly vary from yielding outliers. An absolute `threshold` replaces both (paper, table of
    appendix A: 75 for OpenCLIP ViT-B/16, 150 for DINOv2 ViT-L/14).

    With `mixture`, the limit is where the log norms of an image part into two Gaussians, if they do: outliers are those
    of the upper one. No k is needed, and outliers may be up to half of the patches. Of all ways to part the sorted
    norms in two, the one of the largest classification likelihood is taken (Celeux and Govaert, 1992), and only if it
    beats one Gaussian by the Bayesian information criterion (Schwarz, 1978). The upper mean must be `min_ratio` times
    the lower one or more, and so must each outlier. An image that does not part has no outliers: its limit is infinite.

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
        """Norms (..., N) of an image's patches -> the norm (..., 1) above which a token is an outlier."""
        median = norms.median(-1, keepdim=True).values
        if self.threshold is not None:
            return torch.full_like(median, self.threshold)
        if self.mixture:
            return mixture_limit(norms, self.min_ratio)
        return torch.maximum(self.normal(norms), self.min_ratio * median)

    def normal(self, norms: Tensor) -> Tensor:
        """Norms (..., N) of an image's patches -> the norm (..., 1) up to which they vary: median + k sigma."""
        median = norms.median(-1, keepdim=True).values
        return median + self.k * 1.4826 * (norms - median).abs().median(-1, keepdim=True).values

    def describe(self) -> str:
        if self.threshold is not None:
            return f"norm > {self.threshold:g}"
        if self.mixture:
            return f"norm in the upper of two components of the image's log norms, {self.min_ratio:g} x apart or more"
        return f"norm > max(median + {self.k:g} * 1.4826 * MAD, {self.min_ratio:g} * median) of the image's patches"


def mixture_limit(norms: Tensor, min_ratio: float) -> Tensor:
    """The limit (..., 1) of `OutlierRule(mixture=True)` for the norms (..., N) of an image's patches: where their
    logarithms part into two Gaussians, or infinity."""
    ordered, count = norms.sort(-1).values, norms.shape[-1]
    logs = ordered.cpu().double()
    logs = (logs / logs.median(-1, keepdim=True).values).clamp(min=LOWEST_RATIO).log()
    below = torch.arange(1, count)  # how many norms are in the lower component, for each way to part them
    sums, squares = logs.cumsum(-1), logs.square().cumsum(-1)

    def mean_and_cost(size: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a component, and -2 log likelihood of its norms, up to a constant for each norm."""
        mean = total / size
        variance = (square / size - mean.square()).clamp(min=0)
        floored = variance.clamp(min=MIN_DEVIATION**2)
        return mean, size * (floored.log() + variance / floored - 2 * (size / count).log())

    lower_mean, lower = mean_and_cost(below, sums[..., :-1], squares[..., :-1])
    upper_mean, upper = mean_and_cost(
        count - below, sums[..., -1:] - sums[..., :-1], squares[..., -1:] - squares[..., :-1]
    )
    _, all_in_one = mean_and_cost(torch.tensor(count), sums[..., -1:], squares[..., -1:])
    gain = all_in_one - lower - upper - 3 * math.log(count)  # the criterion's penalty for three more parameters
    is_allowed = (upper_mean - lower_mean >= math.log(min_ratio)) & (2 * below > count)
    no_split = gain.new_zeros(*gain.shape[:-1], 1)  # one more candidate, so that `max` finds one
    gain, index = torch.cat([gain.masked_fill(~is_allowed, -math.inf), no_split], -1).max(-1, keepdim=True)
    index, is_split = index.to(ordered.device), (gain > 0).to(ordered.device)
    # A wide upper component includes the largest normal norms, which are too close to the lower mean to be outliers.
    mean = torch.cat([lower_mean, no_split], -1).exp().to(ordered).gather(-1, index)
    mean = mean * ordered.median(-1, keepdim=True).values
    return torch.maximum(ordered.gather(-1, index), min_ratio * mean).masked_fill(~is_split, math.inf)


@dataclass(frozen=True)
class Detection:
    """Which patches count as outliers: the rule, the block after which it is applied, and ignored positions."""

    rule: OutlierRule
    block: int
    ignored: frozenset[Position] = frozenset()
    """Positions that do not count: artefacts that are there whatever the image shows."""
    onset: int | None = None
    """Attribution counts the outliers after this block and all later ones; None: those after `block` alone."""

    def counts(self, depth: int) -> Tensor:
        """The blocks after which outliers count for attribution, as a mask (L,)."""
        blocks = torch.arange(depth)
        return blocks == self.block if self.onset is None else blocks >= self.onset

    def outliers(self, norms: Tensor, num_prefix: int, grid: Grid, *, include_prefix: bool = False) -> Tensor:
        """Norms (..., T) of prefix tokens and a grid of patches -> which are outliers (..., T)."""
        outlier = norms > self.rule.limit(norms[..., num_prefix:])
        outlier[..., :num_prefix] &= include_prefix
        outlier[..., num_prefix:] &= ~ignored_patches(self.ignored, grid).to(norms.device)
        return outlier


def ignored_patches(ignored: Collection[Position], grid: Grid) -> Tensor:
    """Which of a grid's patches (N,) lie at `ignored` positions."""
    mask = torch.zeros(grid, dtype=torch.bool)
    for position in ignored:
        if len(position) == len(grid) and all(place < size for place, size in zip(position, grid, strict=True)):
            mask[position] = True
    return mask.flatten()


def autocast_off(device: torch.device) -> torch.autocast:
    """Within this context, autocast is off; statistics are summed in it, since the model may run under autocast.

    Autocast computes matrix products of float32 tensors (`@`, einsum) in half precision, where sums saturate or
    overflow. It does not do so with norms, means and other sums.
    """
    return torch.autocast(device.type, enabled=False)


def check_finite(norms: Tensor, images: Tensor) -> None:
    """Raise ValueError unless the norms of these images' tokens are all finite: NaN would never count as an outlier."""
    if norms.isfinite().all():
        return
    if not images.isfinite().all():
        raise ValueError(
            "an image has pixels that are not finite (NaN or infinity): leave it out, or mend its transform"
        )
    raise ValueError("the norms of the tokens are not finite: run the model in float32 or bfloat16")


@torch.no_grad()
def token_norms(tower: Tower, images: Tensor) -> Tensor:
    """Residual norms (L, B, T) after each of the L blocks, in float32, of images (B, 3, h, w) or clips."""
    with recorded_norms(tower, images) as norms:
        tower.run(images)
    return torch.stack(norms)
