"""The pass of a diagnosis: what a tower shows on batches of images, as sums.

The residual stream is measured at 2L+1 *hook points*, for L blocks: in front of the blocks, and after the attention and
after the MLP of each. All figures follow from sums over images, so that memory is that of a batch, the batch size does
not matter, and the sums of several processes add up.

Attention is measured in all images, but of some tokens of each alone, which stand for the others (`sampling`).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Grid, Tower
from testreg.io.processes import Sums, add
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.outliers import OutlierRule, Position, autocast_off, check_finite, ignored_patches
from testreg.measure.sampling import SampledAttention, from_afar

BIN = math.log(1.01)  # width of a histogram bin: quantiles are exact to half of it, 0.5 %
LOWEST, HIGHEST = math.log(2.0**-7), math.log(2.0**13)  # norms beyond, over the median, count as these
TINY = 1e-12  # attention and norms are divided by no less
BINS = math.ceil((HIGHEST - LOWEST) / BIN)


class Observations:
    """Sums over images, in float64 on the CPU.

    Hook point 0 is in front of the blocks, 2i+1 is after the attention of block i, and 2i+2 after its MLP.
    """

    def __init__(self, depth: int) -> None:
        self.image_size: list[int] | None = None
        """Height and width of the last image; None before the first."""
        self.num_frames: int | None = None
        """The frames of a clip; None of images."""
        self.unreadable_images = 0
        self.hook_points: list[Sums] = [{} for _ in range(2 * depth + 1)]
        """Empty where the stream cannot be observed."""
        self.attention: list[Sums] = [{} for _ in range(depth)]
        self.excess = torch.zeros(depth, 2 * depth + 1, dtype=torch.float64)
        """[d, p] sums, over the outliers after block d, ratio - 1 at hook point p; NaN where it cannot be observed."""
        self.positions: defaultdict[Grid, Sums] = defaultdict(dict)
        """Sums for each patch, by the grid of patches, since images may be of several sizes."""

    def add(self, other: Observations) -> Observations:
        """Add the sums over other images, in place."""
        self.image_size = other.image_size or self.image_size
        self.num_frames = other.num_frames or self.num_frames
        self.unreadable_images += other.unreadable_images
        pairs = zip(self.hook_points + self.attention, other.hook_points + other.attention, strict=True)
        for mine, theirs in (*pairs, *((self.positions[grid], more) for grid, more in other.positions.items())):
            add(mine, theirs)
        self.excess += other.excess
        return self


def observe(
    tower: Tower,
    batches: Iterable[Tensor],
    rule: OutlierRule,
    *,
    ignored: Collection[Position] = (),
    attention: bool = True,
    on_images: Callable[[int], object] = lambda count: None,
    on_norms: Callable[[Tensor], object] = lambda norms: None,
) -> Observations:
    """What a tower shows on batches (B, 3, h, w) of images, or (B, frames, 3, h, w) of clips, of which there may be
    none, in this process alone.

    Args:
        ignored: positions that do not count as outliers.
        attention: whether to measure attention: a tenth of a forward's time, or less.
        on_norms: called with the norms (B, L, T) of the tokens after each block, of each batch.
        on_images: called with the number of images after each batch.

    Raises:
        ValueError: norms are not finite.
    """
    seen = Observations(tower.depth)
    with tower.evaluating():
        for batch in batches:
            on_norms(_add_batch(seen, tower, batch, rule, ignored, attention))
            on_images(len(batch))
    return seen


@torch.no_grad()
def _add_batch(
    sums: Observations,
    tower: Tower,
    images: Tensor,
    rule: OutlierRule,
    ignored: Collection[Position],
    attention: bool,
) -> Tensor:
    """Add one batch to the sums; returns the norms (B, L, T) of its tokens after each block."""
    sums.image_size, sums.num_frames = list(images.shape[-2:]), tower.num_frames
    batch = _BatchObserver(sums, tower, images, rule, ignored)
    with batch.observing(attention):
        tower.run(images)
    unknown = torch.full_like(batch.ratios[0], math.nan)
    ratios = torch.stack([unknown if ratio is None else ratio for ratio in batch.ratios])  # (2L+1, B, N)
    outlier = torch.stack(batch.outlier[2::2]).float()  # (L, B, N)
    with autocast_off(outlier.device):
        sums.excess += torch.einsum("dbn,pbn->dp", outlier, ratios - 1).cpu().double()
    counts = {"events": outlier.sum(1), "embedding": ratios[0].sum(0), "images": torch.tensor(len(images))}
    add(sums.positions[batch.grid], counts)
    return torch.stack(batch.norms, 1)


class _BatchObserver:
    """Measures one batch at each hook point while it passes through the blocks, and adds the figures to the sums."""

    def __init__(
        self,
        sums: Observations,
        tower: Tower,
        images: Tensor,
        rule: OutlierRule,
        ignored: Collection[Position],
    ) -> None:
        self.sums, self.tower, self.images, self.rule, self.ignored = sums, tower, images, rule, ignored
        self.ratios: list[Any] = []  # (B, N) of each hook point passed, or None where it cannot be observed
        self.outlier: list[Any] = []  # masks of the same shape
        self.norms: list[Tensor] = []  # (B, T) after each block
        self.entered: Tensor | None = None  # the tokens (B, T, C) that it got
        self.residual_sum = _ResidualSum()
        self.attention = SampledAttention(tower, images, self._add_attention)

    @functools.cached_property
    def grid(self) -> Grid:
        """Not asked for before a block runs, so that towers which take no images say so first."""
        return self.tower.grid(self.images)

    @functools.cached_property
    def patches(self) -> slice:
        return self.tower.patches(self.images)

    @contextmanager
    def observing(self, attention: bool) -> Iterator[None]:
        blocks = [block.module for block in self.tower.blocks]
        linears = [mlp.fc2 for block in self.tower.blocks for mlp in block.mlps]
        with (
            recording_inputs(blocks, self._before_block),
            recording_outputs(blocks, self._after_block),
            recording_outputs(linears, self.residual_sum.start),
            self.residual_sum,
            self.attention if attention else nullcontext(),
        ):
            yield

    def _before_block(self, index: int, tokens: Tensor) -> None:
        self.entered = self.tower.arranged(tokens, self.images)
        self.attention.begin(index)
        if not self.ratios:
            self._measure(self.entered)
        self.residual_sum.clear()

    def _after_block(self, index: int, tokens: Tensor) -> None:
        self.attention.end()
        tokens = self.tower.arranged(tokens, self.images)
        assert self.entered is not None
        before_mlp = self.residual_sum.before_mlp(self.tower, self.images, self.entered, tokens)
        self.residual_sum.clear()  # so that it does not follow what is computed here
        self.norms.append(tokens.float().norm(dim=-1))
        self._measure(before_mlp)
        self._measure(tokens)

    def _add_attention(
        self, block: int, weights: Tensor, queries: Tensor, share: Tensor, values: Tensor | None
    ) -> None:
        """Add what tokens of a block give to all, (B, heads, n, T), where values are (B, heads, T, D)."""
        far = from_afar(queries, self.grid, self.tower.num_prefix)
        with autocast_off(weights.device):
            more = _attention_sums(weights, share, far, self.patches, self.outlier[-1])
            if values is not None and self.outlier[-1].any():
                shown = weights[..., self.patches], values[:, :, self.patches].to(weights.dtype)
                more |= _value_sums(*shown, self.outlier[-1], share)
        add(self.sums.attention[block], more)

    def _measure(self, tokens: Tensor | None) -> None:
        """Add the figures of the tokens (B, T, C) at the next hook point; None where it cannot be observed."""
        ratio = outlier = None
        if tokens is not None:
            prefix, patches = tokens[:, : self.tower.num_prefix].float(), tokens[:, self.patches].float()
            counted = ~ignored_patches(self.ignored, self.grid).to(patches.device)
            norms = patches.norm(dim=-1)  # (B, N)
            check_finite(norms, self.images)
            more, ratio, outlier = _residual_sums(prefix, patches, norms, self.grid, self.rule, counted)
            add(self.sums.hook_points[len(self.ratios)], more)
        self.ratios.append(ratio)
        self.outlier.append(outlier)


class _ResidualSum(TorchFunctionMode):
    """Finds the residual stream between attention and MLP, which no module hands out.

    A block ends by adding to it what came from the MLP, through whatever LayerScale and norms. So it is the other
    summand of the first such sum, provided that this sum is what the block returns. It cannot be observed in blocks
    that add attention and MLP at once, or that have a norm behind the sum, or where compiled code adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.from_mlp: list[Tensor] = []  # all that was computed from the output of the second linear
        self.sum: tuple[Tensor, Tensor] | None = None  # and its summand that was not

    def start(self, index: int, output: Tensor) -> None:
        """Follow the output of an MLP's second linear."""
        self.from_mlp.append(output)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        others = [arg for arg in args if not self._is_from_mlp(arg)]
        if len(others) < len(args) and isinstance(out, Tensor):
            self.from_mlp.append(out)
            if self.sum is None and func in (torch.add, Tensor.add) and len(others) == 1:
                (other,) = others
                if isinstance(other, Tensor) and other.shape == out.shape:  # no bias
                    self.sum = out, other
        return out

    def _is_from_mlp(self, value: Any) -> bool:
        values = value if isinstance(value, list | tuple) else (value,)
        return any(each is known for each in values for known in self.from_mlp)

    def before_mlp(self, tower: Tower, images: Tensor, entered: Tensor, left: Tensor) -> Tensor | None:
        """The stream (B, T, C) between attention and MLP of a block that got and gave such tokens."""
        if self.sum is None:
            return None
        num_tokens = left.shape[1]  # test-time registers are behind
        total, before = (tower.arranged(each, images)[:, :num_tokens] for each in self.sum)
        in_turn = torch.equal(total, left) and not torch.equal(before, entered)
        return before if in_turn else None


def _residual_sums(
    prefix: Tensor, patches: Tensor, norms: Tensor, grid: Grid, rule: OutlierRule, counted: Tensor
) -> tuple[Sums, Tensor, Tensor]:
    """Figures of the prefix tokens (B, P, C) and the patches (B, N, C) at one hook point, summed over a batch.

    `norms` (B, N) are those of the patches. Only patches that are `counted` (N,) may be outliers.

    Returns:
        The sums; the norm of each patch (B, N) over the median norm of its image; which patches (B, N) are outliers.
    """
    median = norms.median(-1, keepdim=True).values  # (B, 1)
    ratio = norms / median
    outlier = (norms > rule.limit(norms)) & counted
    cosine = neighbour_cosine(patches, norms, grid)
    at_outliers = patches[outlier]  # (n, C)
    exact = ratio.cpu().double()
    sums = {
        "images": torch.tensor(len(norms)),
        "patches": torch.tensor(norms.numel()),
        "median": median.sum(),
        "maximum": exact.amax(1).sum(),
        "histogram": exact.log().clamp(LOWEST, HIGHEST).histc(BINS, LOWEST, LOWEST + BINS * BIN),
        # Moments about 1, the median: the mean is near, so nothing cancels when they are made central.
        "moments": torch.stack([(exact - 1).pow(power).sum() for power in range(1, 5)]),
        "outliers": outlier.sum(),
        "outlier_ratio": ratio[outlier].sum(),
        "outlier_cosine": cosine[outlier].sum(),
        "normal_cosine": cosine[~outlier].sum(),
        "channels": at_outliers.sum(0),
        "channel_energy": at_outliers.square().sum(0),
        "prefix": (prefix.norm(dim=-1) / median).sum(0),
    }
    return sums, ratio, outlier


def _attention_sums(weights: Tensor, share: Tensor, far: Tensor, patches: slice, outlier: Tensor) -> Sums:
    """Sums over a batch of what tokens draw of attention.

    Args:
        weights: (B, heads, n, T).
        share: what each query stands for, (n,).
        far: which queries are far from which patches, (n, N).
        outlier: which patches are outliers, (B, N).
    """
    drawn = torch.einsum("bhqt,q->bht", weights, share.to(weights.dtype))
    # Patches attend to their neighbours: those of the queries in the sample would draw more than others.
    counted = share.unsqueeze(1) * far  # (n, N)
    column = torch.einsum("bqt,qt->bt", weights[..., patches].mean(1), counted.to(weights.dtype))
    column = column / counted.sum(0).clamp(min=TINY)  # (B, N)
    return {
        "images": torch.tensor(len(weights)),
        "prefix": drawn[..., : patches.start].mean(1).sum(0),
        "to_outliers": (drawn[..., patches] * outlier.unsqueeze(1)).sum((0, 2)),  # (heads,)
        "column_ratio": (column.amax(1) / column.median(1).values.clamp(min=TINY)).sum(),
    }


def _value_sums(weights: Tensor, value: Tensor, outlier: Tensor, share: Tensor) -> Sums:
    """Sums over a batch of the values (B, heads, N, D) of those patches (B, N) that are outliers, and of what tokens,
    each of which stands for a share (n,) of all, take from them by weights (B, heads, n, N)."""
    norms = value.norm(dim=-1)  # (B, heads, N)
    ratio = norms / norms.median(-1, keepdim=True).values.clamp(min=TINY)
    taken = ((weights * outlier[:, None, None]) @ value).cpu().double()  # (B, heads, n, D)
    return {
        "outliers": outlier.sum(),
        "values": (ratio * outlier.unsqueeze(1)).sum((0, 2)),  # (heads,)
        "taken": torch.einsum("bhqd,q,bhqe->hde", taken, share.cpu().double(), taken),
    }


def neighbour_cosine(patches: Tensor, norms: Tensor, grid: Grid) -> Tensor:
    """Mean cosine similarity (B, N) of each of the patches (B, N, C) to those above, below, left and right of it; of a
    clip's patches, to those before and after it too.

    `norms` (B, N) are those of the patches.
    """
    patches, norms = patches.unflatten(1, grid), norms.clamp(min=TINY).unflatten(1, grid)
    total, count = torch.zeros_like(norms), torch.zeros_like(norms)
    for dim, size in enumerate(grid, start=1):
        (one, other), (norm, other_norm) = (
            (each.narrow(dim, 0, size - 1), each.narrow(dim, 1, size - 1)) for each in (patches, norms)
        )
        # Products are divided by norms, since to make all patches unit vectors would copy them.
        cosine = (one * other).sum(-1) / (norm * other_norm)
        for first in (0, 1):  # both are the other's neighbour
            total.narrow(dim, first, size - 1).add_(cosine)
            count.narrow(dim, first, size - 1).add_(1)
    return (total / count.clamp(min=1)).flatten(1)
