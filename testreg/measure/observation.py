"""The pass of a diagnosis: what a tower shows on batches of images, as sums.

The residual stream is measured at 2L+1 *hook points*, for L blocks: in front of the blocks, and after the attention and
after the MLP of each. All figures follow from sums over images, so that memory is that of a batch, the batch size does
not matter, and the sums of several processes add up.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower
from testreg.io.processes import Sums, add
from testreg.measure.attention import Recorder
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.outliers import OutlierRule, check_finite, exactly, ignored_patches

BIN = math.log(1.01)  # width of a histogram bin: quantiles are exact to half of it, 0.5 %
LOWEST, HIGHEST = math.log(2.0**-7), math.log(2.0**13)  # norms beyond, over the median, count as these
BINS = math.ceil((HIGHEST - LOWEST) / BIN)


class Observations:
    """Sums over images, in float64 on the CPU.

    Hook point 0 is in front of the blocks, 2i+1 is after the attention of block i, and 2i+2 after its MLP.
    """

    def __init__(self, depth: int) -> None:
        self.image_size: list[int] | None = None
        """Height and width of the last image; None before the first."""
        self.unreadable_images = 0
        self.hook_points: list[Sums] = [{} for _ in range(2 * depth + 1)]
        """Empty where the stream cannot be observed."""
        self.attention: list[Sums] = [{} for _ in range(depth)]
        self.excess = torch.zeros(depth, 2 * depth + 1, dtype=torch.float64)
        """[d, p] sums, over the outliers after block d, ratio - 1 at hook point p; NaN where it cannot be observed."""
        self.positions: defaultdict[tuple[int, int], Sums] = defaultdict(dict)
        """Sums for each patch, by the grid of patches, since images may be of several sizes."""

    def add(self, other: Observations) -> Observations:
        """Add the sums over other images, in place."""
        self.image_size = other.image_size or self.image_size
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
    ignored: Collection[tuple[int, int]] = (),
    on_images: Callable[[int], object] = lambda count: None,
) -> Observations:
    """What a tower shows on batches (B, 3, h, w) of images, of which there may be none, in this process alone.

    Args:
        ignored: positions (row, column) that do not count as outliers.
        on_images: called with the number of images after each batch.

    Raises:
        ValueError: norms are not finite.
    """
    seen = Observations(tower.depth)
    with tower.evaluating():
        for batch in batches:
            _add_batch(seen, tower, batch, rule, ignored)
            on_images(len(batch))
    return seen


@torch.no_grad()
def _add_batch(
    sums: Observations, tower: Tower, images: Tensor, rule: OutlierRule, ignored: Collection[tuple[int, int]]
) -> None:
    """Add one batch (B, 3, h, w) to the sums."""
    sums.image_size = list(images.shape[-2:])
    batch = _BatchObserver(sums, tower, images, rule, ignored)
    with batch.observing():
        tower.run(images)
    unknown = torch.full_like(batch.ratios[0], math.nan)
    ratios = torch.stack([unknown if ratio is None else ratio for ratio in batch.ratios])  # (2L+1, B, N)
    outlier = torch.stack(batch.outlier[2::2]).float()  # (L, B, N)
    with exactly(outlier.device):
        sums.excess += torch.einsum("dbn,pbn->dp", outlier, ratios - 1).cpu().double()
    counts = {"events": outlier.sum(1), "embedding": ratios[0].sum(0), "images": torch.tensor(len(images))}
    add(sums.positions[batch.grid], counts)


class _BatchObserver:
    """Measures one batch at each hook point while it passes through the blocks, and adds the figures to the sums."""

    def __init__(
        self,
        sums: Observations,
        tower: Tower,
        images: Tensor,
        rule: OutlierRule,
        ignored: Collection[tuple[int, int]],
    ) -> None:
        self.sums, self.tower, self.images, self.rule, self.ignored = sums, tower, images, rule, ignored
        self.ratios: list[Any] = []  # (B, N) of each hook point passed, or None where it cannot be observed
        self.outlier: list[Any] = []  # masks of the same shape
        self.entered: Tensor | None = None  # the tokens (B, T, C) that the running block got
        self.residual_sum = _ResidualSum()
        self.attention = Recorder(of_all=True)

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns; not asked for before a block runs, so that towers which take no images say so first."""
        return self.tower.grid(self.images)

    @functools.cached_property
    def patches(self) -> slice:
        return self.tower.patches(self.images)

    @contextmanager
    def observing(self) -> Iterator[None]:
        blocks = [block.module for block in self.tower.blocks]
        linears = [mlp.fc2 for block in self.tower.blocks for mlp in block.mlps]
        with (
            recording_inputs(blocks, self._before_block),
            recording_outputs(blocks, self._after_block),
            recording_outputs(linears, self.residual_sum.start),
            self.residual_sum,
            self.attention,
        ):
            yield

    def _before_block(self, index: int, tokens: Tensor) -> None:
        self.entered = self.tower.batch_first(tokens)
        if not self.ratios:
            self._measure(self.entered)
        self.residual_sum.clear()
        self.attention.rows.clear()

    def _after_block(self, index: int, tokens: Tensor) -> None:
        tokens = self.tower.batch_first(tokens)
        if self.attention.rows:
            drawn = torch.stack([rows.mean(1) for rows in self.attention.rows]).mean(0)  # (B, T)
            to_outliers = (drawn[:, self.patches] * self.outlier[-1]).sum()
            to_prefix = drawn[:, : self.tower.num_prefix].sum(0)
            images = torch.tensor(len(drawn))
            add(self.sums.attention[index], {"outliers": to_outliers, "prefix": to_prefix, "images": images})
        assert self.entered is not None
        before_mlp = self.residual_sum.before_mlp(self.tower, self.entered, tokens)
        self.residual_sum.clear()  # so that it does not follow what is computed here
        self._measure(before_mlp)
        self._measure(tokens)

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

    def before_mlp(self, tower: Tower, entered: Tensor, left: Tensor) -> Tensor | None:
        """The stream (B, T, C) between attention and MLP of a block that got and gave such tokens."""
        if self.sum is None:
            return None
        num_tokens = left.shape[1]  # test-time registers are behind
        total, before = (tower.batch_first(each)[:, :num_tokens] for each in self.sum)
        in_turn = torch.equal(total, left) and not torch.equal(before, entered)
        return before if in_turn else None


def _residual_sums(
    prefix: Tensor, patches: Tensor, norms: Tensor, grid: tuple[int, int], rule: OutlierRule, counted: Tensor
) -> tuple[Sums, Tensor, Tensor]:
    """Figures of the prefix tokens (B, P, C) and the patches (B, N, C) at one hook point, summed over a batch.

    `norms` (B, N) are those of the patches. Only patches that are `counted` (N,) may be outliers.

    Returns:
        The sums; the norm of each patch (B, N) over the median norm of its image; which patches (B, N) are outliers.
    """
    median = norms.median(-1, keepdim=True).values  # (B, 1)
    ratio = norms / median
    outlier = (norms > rule.limit(norms)) & counted
    cosine = neighbour_cosine(patches, grid)
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


def neighbour_cosine(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity (B, N) of each of the patches (B, N, C) to those above, below, left and right of it."""
    unit = F.normalize(patches, dim=-1).unflatten(1, grid)
    across = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)  # (B, rows, columns - 1)
    down = (unit[:, 1:] * unit[:, :-1]).sum(-1)  # (B, rows - 1, columns)

    def at_both_ends(across: Tensor, down: Tensor) -> Tensor:
        return F.pad(across, (1, 0)) + F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1))

    count = at_both_ends(torch.ones_like(across), torch.ones_like(down))
    return (at_both_ends(across, down) / count.clamp(min=1)).flatten(1)
