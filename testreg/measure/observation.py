"""Measure a vision tower on batches of images for a diagnosis, and add the figures up.

The residual stream is measured at *hook points*: in front of the first block, and after the attention and after the MLP
of each block. *Outliers* are patches whose norm is far above the others'. The *ratio* of a patch is its norm over the
median norm of the image's patches.

Only sums over images are kept, from which all figures can be computed. So memory is needed for one batch only, the
batch size does not matter, and the sums of several processes can be added up.

Attention is measured in all images, but only that of a sample of the tokens (`sampling`).

Shapes: L blocks, hence 2L+1 hook points; B images or clips; T tokens, P of which are prefix tokens (such as CLS) and N
are patches; C width; D width of a head; n sampled queries.
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
from testreg.measure.sampling import SampledAttention, far_queries

BIN = math.log(1.01)  # the width of a bin in the histogram of log ratios: quantiles are exact to half of it, 0.5 %
LOWEST, HIGHEST = math.log(2.0**-7), math.log(2.0**13)  # the histogram's range; ratios outside count at its ends
NUM_BINS = math.ceil((HIGHEST - LOWEST) / BIN)
TINY = 1e-12  # divisors are at least this, so that nothing is divided by zero


class Observations:
    """What was observed of a tower: sums over images, in float64 on the CPU.

    Hook point 0 is in front of the first block. Hook point 2i+1 is after the attention of block i, and hook point 2i+2
    after its MLP.
    """

    def __init__(self, depth: int) -> None:
        self.image_size: list[int] | None = None
        """Height and width of the last image; None before the first."""
        self.num_frames: int | None = None
        """The number of frames of a clip; None for images."""
        self.unreadable_images = 0
        self.hook_points: list[Sums] = [{} for _ in range(2 * depth + 1)]
        """The sums at each hook point; empty where the residual stream cannot be observed."""
        self.attention: list[Sums] = [{} for _ in range(depth)]
        """The sums of each block's attention; empty where attention is not measured, or cannot be observed."""
        self.excess = torch.zeros(depth, 2 * depth + 1, dtype=torch.float64)
        """Where the outliers of each block have their high norms, (L, 2L+1): the element [d, p] is the sum of
        (ratio - 1) at hook point p, over the patches that are outliers after block d; NaN if it cannot be observed."""
        self.positions: defaultdict[Grid, Sums] = defaultdict(dict)
        """Sums for each position of the grid of patches, by the grid, since images may have several sizes."""

    def add(self, other: Observations) -> Observations:
        """Add the sums of `other`, over other images, to these in place; returns this object."""
        self.image_size = other.image_size or self.image_size
        self.num_frames = other.num_frames or self.num_frames
        self.unreadable_images += other.unreadable_images
        pairs = zip(self.hook_points + self.attention, other.hook_points + other.attention, strict=True)
        for ours, theirs in (*pairs, *((self.positions[grid], more) for grid, more in other.positions.items())):
            add(ours, theirs)
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
    """Measure a tower on batches (B, 3, h, w) of images, or (B, frames, 3, h, w) of clips; there may be no batches.

    Returns the sums over the images of this process.

    Args:
        rule: decides which patches are outliers.
        ignored: positions at which patches never count as outliers.
        attention: whether to measure attention, which takes at most a tenth of the time of a forward.
        on_images: called after each batch with how many images or clips it has.
        on_norms: called after each batch with the norms (B, L, T) of the tokens after each block.

    Raises:
        ValueError: norms are not finite.
    """
    observations = Observations(tower.depth)
    with tower.evaluating():
        for batch in batches:
            on_norms(_add_batch(observations, tower, batch, rule, ignored, attention))
            on_images(len(batch))
    return observations


@torch.no_grad()
def _add_batch(
    sums: Observations,
    tower: Tower,
    images: Tensor,
    rule: OutlierRule,
    ignored: Collection[Position],
    attention: bool,
) -> Tensor:
    """Run one batch, and add what is observed to the sums; returns the norms (B, L, T) of tokens after each block."""
    sums.image_size, sums.num_frames = list(images.shape[-2:]), tower.num_frames
    batch = _BatchObserver(sums, tower, images, rule, ignored)
    with batch.observing(attention):
        tower.run(images)
    unknown = torch.full_like(batch.ratios[0], math.nan)
    ratios = torch.stack([unknown if ratio is None else ratio for ratio in batch.ratios])  # (2L+1, B, N)
    outlier = torch.stack(batch.outlier[2::2]).float()  # (L, B, N)
    with autocast_off(outlier.device):
        sums.excess += torch.einsum("dbn,pbn->dp", outlier, ratios - 1).cpu().double()
    at_positions = {
        "outliers": outlier.sum(1),  # (L, N), in how many images a position is an outlier after each block
        "embedding": ratios[0].sum(0),  # (N,), the ratios in front of the first block
        "images": torch.tensor(len(images)),
    }
    add(sums.positions[batch.grid], at_positions)
    return torch.stack(batch.norms[2::2], 1)


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
        # Each list has an element for each hook point that was passed; it is None if this cannot be observed.
        self.ratios: list[Any] = []  # (B, N)
        self.outlier: list[Any] = []  # (B, N), whether a patch is an outlier
        self.norms: list[Any] = []  # (B, T)
        self.block_input: Tensor | None = None  # the tokens (B, T, C) that the current block got
        self.residual_sum = _ResidualSum()
        self.attention = SampledAttention(tower, images, self._add_attention)

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid of patches. It is not computed before a block runs, so a model that takes no images fails first."""
        return self.tower.grid(self.images)

    @contextmanager
    def observing(self, attention: bool) -> Iterator[None]:
        """Within the context, the forward that runs is measured."""
        blocks = [block.module for block in self.tower.blocks]
        linears = [mlp.fc2 for block in self.tower.blocks for mlp in block.mlps]
        with (
            recording_inputs(blocks, self._before_block),
            recording_outputs(blocks, self._after_block),
            recording_outputs(linears, self.residual_sum.follow),
            self.residual_sum,
            self.attention if attention else nullcontext(),
        ):
            yield

    def _before_block(self, index: int, tokens: Tensor) -> None:
        self.block_input = self.tower.arranged(tokens, self.images)
        self.attention.begin(index)
        if not self.ratios:
            self._measure(self.block_input)
        self.residual_sum.clear()

    def _after_block(self, index: int, tokens: Tensor) -> None:
        self.attention.end()
        tokens = self.tower.arranged(tokens, self.images)
        assert self.block_input is not None
        stream_before_mlp = self.residual_sum.stream_before_mlp(self.tower, self.images, self.block_input, tokens)
        self.residual_sum.clear()  # so that it does not follow the computations below
        self._measure(stream_before_mlp)
        self._measure(tokens)

    def _add_attention(
        self, block: int, weights: Tensor, queries: Tensor, share: Tensor, values: Tensor | None
    ) -> None:
        """Add the attention of a sample of the tokens in a block, see `OnSample`."""
        is_far, where = far_queries(queries, self.grid, self.tower.num_prefix), self.attention.patches
        with autocast_off(weights.device):
            more = _attention_sums(weights, share, is_far, where, self.outlier[-1])
            if values is not None and self.outlier[-1].any():
                values_of_patches = values[:, :, where].to(weights.dtype)
                more |= _value_sums(weights[..., where], values_of_patches, self.outlier[-1], share)
        add(self.sums.attention[block], more)

    def _measure(self, tokens: Tensor | None) -> None:
        """Add the figures of the tokens (B, T, C) at the next hook point, if they can be observed (if not, `tokens` is
        None)."""
        norms = ratio = outlier = None
        if tokens is not None:
            where = self.attention.patches
            norms, patches = tokens.float().norm(dim=-1), tokens[:, where].float()
            counted = ~ignored_patches(self.ignored, self.grid).to(patches.device)
            check_finite(norms[:, where], self.images)
            prefix_norms = norms[:, : self.tower.num_prefix]
            more, ratio, outlier = _residual_sums(prefix_norms, patches, norms[:, where], self.grid, self.rule, counted)
            add(self.sums.hook_points[len(self.ratios)], more)
        self.norms.append(norms)
        self.ratios.append(ratio)
        self.outlier.append(outlier)


class _ResidualSum(TorchFunctionMode):
    """Finds the residual stream between attention and MLP, which is not the input or output of any module.

    A block ends with a sum: the residual stream plus the MLP's output, which may have passed LayerScale or a norm. This
    class follows everything that is computed from the MLP's output, up to the first sum with a tensor that does not
    depend on it. If the block returns this sum, the other tensor is the residual stream. The stream cannot be found in
    blocks that add attention and MLP at once, that have a norm after the sum, or that are compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.computed_from_mlp: list[Tensor] = []  # the output of the MLP's second linear, and what depends on it
        self.sum: tuple[Tensor, Tensor] | None = None  # the sum, and its summand that does not depend on the MLP

    def follow(self, index: int, output: Tensor) -> None:
        """Begin to follow what is computed from `output`, the output of an MLP's second linear."""
        self.computed_from_mlp.append(output)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        others = [arg for arg in args if not self._is_computed_from_mlp(arg)]
        if len(others) < len(args) and isinstance(out, Tensor):
            self.computed_from_mlp.append(out)
            if self.sum is None and func in (torch.add, Tensor.add) and len(others) == 1:
                (other,) = others
                if isinstance(other, Tensor) and other.shape == out.shape:  # a bias has fewer dimensions
                    self.sum = out, other
        return out

    def _is_computed_from_mlp(self, value: Any) -> bool:
        """Whether an argument of a function, or an element of it, was computed from the MLP's output."""
        values = value if isinstance(value, list | tuple) else (value,)
        return any(each is known for each in values for known in self.computed_from_mlp)

    def stream_before_mlp(
        self, tower: Tower, images: Tensor, block_input: Tensor, block_output: Tensor
    ) -> Tensor | None:
        """The residual stream (B, T, C) between attention and MLP; None if it was not found.

        Args:
            block_input: the tokens (B, T, C) that the block got. If the sum's other tensor equals them, it is no stream
                between attention and MLP.
            block_output: the tokens (B, T, C) that it returned.
        """
        if self.sum is None:
            return None
        num_tokens = block_output.shape[1]  # inside a block of a patched model, the registers come after these tokens
        total, stream = (tower.arranged(each, images)[:, :num_tokens] for each in self.sum)
        is_between = torch.equal(total, block_output) and not torch.equal(stream, block_input)
        return stream if is_between else None


def _residual_sums(
    prefix_norms: Tensor, patches: Tensor, norms: Tensor, grid: Grid, rule: OutlierRule, counted: Tensor
) -> tuple[Sums, Tensor, Tensor]:
    """The figures of the tokens at one hook point, summed over a batch.

    Args:
        prefix_norms: the norms of the prefix tokens, (B, P).
        patches: (B, N, C).
        norms: the norms of the patches, (B, N).
        counted: whether a patch may be an outlier, (N,).

    Returns:
        The sums; the ratio of each patch, (B, N); whether a patch is an outlier, (B, N).
    """
    median = norms.median(-1, keepdim=True).values  # (B, 1)
    ratio = norms / median
    outlier = (norms > rule.limit(norms)) & counted
    cosine = neighbour_cosine(patches, norms, grid)
    at_outliers = patches[outlier]  # (number of outliers, C)
    exact = ratio.cpu().double()
    sums = {
        "images": torch.tensor(len(norms)),
        "patches": torch.tensor(norms.numel()),
        "median": median.sum(),
        "maximum": exact.amax(1).sum(),
        "histogram": exact.log().clamp(LOWEST, HIGHEST).histc(NUM_BINS, LOWEST, LOWEST + NUM_BINS * BIN),
        # Moments about 1, the median ratio. The mean is close to 1, so central moments follow with little rounding.
        "moments": torch.stack([(exact - 1).pow(power).sum() for power in range(1, 5)]),
        "outliers": outlier.sum(),
        "outlier_ratio": ratio[outlier].sum(),
        "outlier_cosine": cosine[outlier].sum(),
        "normal_cosine": cosine[~outlier].sum(),
        "channels": at_outliers.sum(0),
        "channel_energy": at_outliers.square().sum(0),
        "prefix": (prefix_norms / median).sum(0),
    }
    return sums, ratio, outlier


def _attention_sums(weights: Tensor, share: Tensor, is_far: Tensor, patches: slice, outlier: Tensor) -> Sums:
    """The attention that tokens draw, and the column ratio, summed over a batch.

    The column ratio is the most attention that a patch of an image draws from queries far from it, over the median of
    what the image's patches draw from such queries.

    Args:
        weights: the attention weights (B, heads, n, T) of n queries.
        share: the share of all tokens that each query stands for, (n,); the shares add up to 1.
        is_far: whether a query is far from a patch, (n, N).
        patches: where the patches are among the tokens.
        outlier: whether a patch is an outlier, (B, N).
    """
    drawn = torch.einsum("bhqt,q->bht", weights, share.to(weights.dtype))
    # Queries near the patch do not count for the column ratio: patches attend to their neighbours, so a patch with a
    # neighbour in the sample would seem to draw too much.
    weight_of_query = share.unsqueeze(1) * is_far  # (n, N)
    drawn_from_afar = torch.einsum("bqt,qt->bt", weights[..., patches].mean(1), weight_of_query.to(weights.dtype))
    drawn_from_afar = drawn_from_afar / weight_of_query.sum(0).clamp(min=TINY)  # (B, N)
    return {
        "images": torch.tensor(len(weights)),
        "prefix": drawn[..., : patches.start].mean(1).sum(0),
        "to_outliers": (drawn[..., patches] * outlier.unsqueeze(1)).sum((0, 2)),  # (heads,)
        "column_ratio": (drawn_from_afar.amax(1) / drawn_from_afar.median(1).values.clamp(min=TINY)).sum(),
    }


def _value_sums(weights: Tensor, values: Tensor, outlier: Tensor, share: Tensor) -> Sums:
    """Sums over a batch for each head: the outliers' value norms over the median, and the second moments, a matrix
    (D, D), of what queries take from the outliers' values.

    Args:
        weights: the attention weights (B, heads, n, N) of n queries to the patches.
        values: the values of the patches, (B, heads, N, D).
        outlier: whether a patch is an outlier, (B, N).
        share: the share of all tokens that each query stands for, (n,); the shares add up to 1.
    """
    norms = values.norm(dim=-1)  # (B, heads, N)
    ratio = norms / norms.median(-1, keepdim=True).values.clamp(min=TINY)
    taken = ((weights * outlier[:, None, None]) @ values).cpu().double()  # (B, heads, n, D)
    return {
        "outliers": outlier.sum(),
        "values": (ratio * outlier.unsqueeze(1)).sum((0, 2)),  # (heads,)
        "taken": torch.einsum("bhqd,q,bhqe->hde", taken, share.cpu().double(), taken),
    }


def neighbour_cosine(patches: Tensor, norms: Tensor, grid: Grid) -> Tensor:
    """The mean cosine similarity (B, N) of each patch to its neighbours.

    These are the patches above, below, left and right of it, and in clips those before and after it.

    Args:
        patches: (B, N, C).
        norms: the norms of the patches, (B, N).
    """
    patches, norms = patches.unflatten(1, grid), norms.clamp(min=TINY).unflatten(1, grid)
    total, count = torch.zeros_like(norms), torch.zeros_like(norms)
    for dim, size in enumerate(grid, start=1):
        (one, other), (norm, other_norm) = (
            (each.narrow(dim, 0, size - 1), each.narrow(dim, 1, size - 1)) for each in (patches, norms)
        )
        # The products are divided by the norms: dividing the patches first would need a copy of them.
        cosine = (one * other).sum(-1) / (norm * other_norm)
        for first in (0, 1):  # each of the two is a neighbour of the other
            total.narrow(dim, first, size - 1).add_(cosine)
            count.narrow(dim, first, size - 1).add_(1)
    return (total / count.clamp(min=1)).flatten(1)
