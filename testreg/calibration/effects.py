"""Measure the effect of moving some neurons, on images that had no part in their ranking.

A ranking says which neurons *may* cause the outliers. The patched model shows whether the outliers are gone after every
block, whether the patches that were outliers draw no more attention than others and resemble their neighbours, and
whether everything else stays as it was.

Shapes: L blocks, B images, T tokens, N patches, C width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.calibration.block_cache import BlockCache
from testreg.families import Tower
from testreg.families.kernels import attention_kernel
from testreg.io.images import batched, in_lists
from testreg.io.packing import PackedImage
from testreg.io.processes import Sums, add, all_gather, all_reduce_sum, rank
from testreg.measure.attention import UNSEEN
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.observation import neighbour_cosine
from testreg.measure.outliers import MIN_FRACTION, Detection, autocast_off, check_finite, ignored_patches
from testreg.measure.sampling import SampledAttention
from testreg.neurons import Neuron, unscored
from testreg.records.calibration import Effect, Verification
from testreg.records.record import Start
from testreg.register import patched

Head = Callable[[nn.Module, Tensor], Tensor]
"""Computes scores (B, classes) from a model and images (B, 3, h, w), which are on its device and in its dtype."""

CACHE_BYTES = 2**28  # memory for tokens between blocks, which are kept while sets of neurons are compared
NORMAL_PATCHES = 64  # number sampled from each image, to measure how normal patches change
HOTTER = 1.01  # an image counts as hotter if its hottest patch draws over this many times as much attention
MUCH_HOTTER = 1.1  # maps count as hotter if that attention, averaged over the images, grows by more than this factor
MAX_SINK = 1.5  # former outliers are a sink if they draw over this many times the attention of other patches


def worst_of(effects: Sequence[Effect]) -> Effect:
    """Combine the effects of one set of neurons at several image sizes: each figure is the worst of them."""
    worst = max(effects, key=lambda effect: effect.remaining)
    largest = {name: _largest(effects, name) for name in ("sink", "hottest", "hotter", "unlike")}
    return replace(
        worst,
        excess=max(effect.excess for effect in effects),
        change_pooled=max(effect.change_pooled for effect in effects),
        change_patches=max(effect.change_patches for effect in effects),
        agreement=min((effect.agreement for effect in effects if effect.agreement is not None), default=None),
        **largest,  # type: ignore[arg-type]
    )


def _largest(effects: Sequence[Effect], name: str) -> float | None:
    values = (getattr(effect, name) for effect in effects)
    return max((value for value in values if value is not None), default=None)


def what_is_wrong_with_maps(check: Verification) -> list[str]:
    """What keeps the attention maps of a patched model from being clean, in words: a sink that stays, or patches
    that got hotter."""
    faults = []
    sink, hottest = check.effect.sink, check.effect.hottest
    if sink is not None and sink > MAX_SINK:
        faults.append(f"former outliers still draw {sink:.1f} times as much attention as other patches")
    before = None if check.before is None else check.before.hottest
    if hottest is not None and before is not None and hottest > MUCH_HOTTER * before:
        faults.append(f"maps got hotter: the hottest patch draws {hottest:.1%} of the attention, {before:.1%} before")
    return faults


@dataclass(frozen=True)
class Figures:
    """The figures of one forward on a batch, with the plain model or a patched one."""

    patches: Tensor
    """(3, L, B, N): after each block, the norms of the patches, their cosines to their four neighbours, and the
    attention that they draw in the block, averaged over all tokens and heads."""
    hottest: Tensor
    """(B,), see `Effect.hottest`; 0 where attention cannot be seen."""
    tokens: Tensor
    """(B, P + N, C), float32, after the last block."""
    classes: Tensor | None
    """(B,), the class that the user's head gives each image."""

    @property
    def norms(self) -> Tensor:
        return self.patches[0]


@dataclass(frozen=True)
class Baseline:
    """The figures of the plain model on a batch, which patched models are compared with.

    Shapes: L blocks, B images, N patches, K of them sampled, C width.
    """

    images: tuple[PackedImage, ...]
    limit: Tensor  # (L, B, 1), norm above which a patch is an outlier
    counted: Tensor  # (N,), patches that may be outliers
    outlier: Tensor  # (L, B, N)
    former: Tensor  # (B, N), patches that are outliers after any block from the onset on
    excess: Tensor  # (L, B), summed over the outliers
    at_patches: Tensor  # (L, B, 3), see `_at_patches`
    hottest: Tensor  # (B,), see `Effect.hottest`
    sampled: Tensor  # (B, K), indices of normal patches
    features: Tensor  # (B, 1 + K, C), of the pooled token and the sampled patches, after the last block
    classes: Tensor | None  # (B,), the class that the user's head gives each image

    @property
    def others(self) -> Tensor:
        """(B, N), the counted patches that are not former outliers."""
        return ~self.former & self.counted

    def take(self, images: list[int]) -> Baseline:
        """The baseline of some of the images, by their indices in the batch."""
        return Baseline(
            images=tuple(self.images[i] for i in images),
            limit=self.limit[:, images],
            counted=self.counted,
            outlier=self.outlier[:, images],
            former=self.former[images],
            excess=self.excess[:, images],
            at_patches=self.at_patches[:, images],
            hottest=self.hottest[images],
            sampled=self.sampled[images],
            features=self.features[images],
            classes=None if self.classes is None else self.classes[images],
        )


class EffectMeter:
    """Measures the effect of sets of neurons, on held-out images that the plain model has seen once.

    Outliers, new ones included, are counted after the onset block and after every later block. Earlier blocks do not
    count: patches, bright ones say, have high norms there that mean nothing, and that no neuron of a later block can
    remove. Nothing is missed, since an outlier that arises earlier and lasts is still there after the onset.
    The count begins at the same block for all sets of neurons. So a set gains nothing by having its first neuron in a
    late block: the outliers between the onset and that block are left, and count.

    Args:
        images: the held-out images, few enough to be kept in memory.
        onset: the block after which the outliers are there.
        head: model, images (B, 3, h, w) on the model's device and in its dtype -> scores (B, classes).

    Raises:
        ValueError: norms are not finite; the head does not run the model once, or does not give scores. `effect` raises
            it as well.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        images: Sequence[PackedImage],
        detection: Detection,
        onset: int,
        *,
        batch_size: int,
        head: Head | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tower, self.detection, self.onset, self.head = model, tower, detection, onset, head
        grids = all_gather(tower.sequence_grid(images[0].image[None]) if images else None)
        self.grid = next(grid for grid in grids if grid)
        lists = in_lists(images, batch_size, lambda image: image.rows.shape, by_shape=tower.family.keeps_shape)
        self._compare_with([self._baseline(tuple(batch), seed) for batch in lists])

    def _compare_with(self, baselines: Sequence[Baseline]) -> None:
        self.baselines = baselines
        self.block_cache = BlockCache(self.tower)  # without memory, it keeps nothing
        sums: Sums = {}
        for plain in baselines:
            pooled, patches = plain.features[:, 0], plain.features[:, 1:].flatten(0, 1)
            add(
                sums,
                {
                    "outliers": plain.outlier.sum((1, 2)),
                    "patches": torch.tensor(plain.outlier[0].numel()),
                    "former": plain.former.sum(),
                    "others": plain.others.sum(),
                    "excess": plain.excess.sum(1),
                    "at_patches": plain.at_patches.sum(1),
                    "hottest": plain.hottest.sum(),
                    "features": torch.stack([pooled.sum(0), patches.sum(0)]),
                    "count": torch.tensor([len(pooled), len(patches)]),
                },
            )
        self.before = all_reduce_sum(sums)
        self.centre = self.before["features"] / self.before["count"].unsqueeze(-1)  # (2, C), of pooled and patches

    def split(self, number: int) -> tuple[EffectMeter, EffectMeter]:
        """Return meters of `number` of the images and of the other images, with similar shares of the outliers.

        The images are sorted by their share of the outliers, averaged over the blocks from the onset on, and the first
        meter gets `number` of them at even intervals.
        """
        of_all = self.before["outliers"][self.onset :].clamp(min=1)  # (L',)
        shares = [(plain.outlier.sum(-1)[self.onset :].T.cpu() / of_all).sum(-1) for plain in self.baselines]
        mine = torch.cat(shares).tolist() if shares else []
        ranked = sorted(
            (-share, image, process)
            for process, of_process in enumerate(all_gather(mine))
            for image, share in enumerate(of_process)
        )
        every = len(ranked) / number
        first = {ranked[int(turn * every)][1:] for turn in range(number)}
        parts = []
        for is_first in (True, False):
            part = copy.copy(self)
            part._compare_with(list(self._of_images([((i, rank()) in first) == is_first for i in range(len(mine))])))
            parts.append(part)
        return parts[0], parts[1]

    def _of_images(self, wanted: Sequence[bool]) -> Iterator[Baseline]:
        start = 0
        for plain in self.baselines:
            end = start + len(plain.images)
            if images := [i for i, keep in enumerate(wanted[start:end]) if keep]:
                yield plain.take(images)
            start = end

    @property
    def num_images(self) -> int:
        return int(self.before["count"][0])

    @property
    def outlier_fraction(self) -> float:
        """Fraction of the patches that are outliers after the detection block."""
        return float(self.before["outliers"][self.detection.block] / self.before["patches"])

    @property
    def untouched(self) -> Effect:
        """The figures of the plain model, as an effect that changes nothing."""
        sink, hottest = self._attention_figures(self.before)
        return Effect(
            neurons=0,
            remaining=1.0,
            worst_block=self.onset,
            excess=1.0,
            change_pooled=0.0,
            change_patches=0.0,
            agreement=None if self.head is None else 1.0,
            num_registers=0,
            sink=sink,
            hottest=hottest,
            hotter=None if sink is None else 0.0,
            unlike=None if not self.before["former"] else 1.0,
        )

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Within the context, sets of neurons share the blocks whose input is the same for them (`BlockCache`)."""
        self.block_cache = BlockCache(self.tower, CACHE_BYTES // max(1, len(self.baselines)))
        try:
            yield
        finally:
            self.block_cache = BlockCache(self.tower)

    def effect(self, neurons: Sequence[Neuron], num_registers: int = 1, start: Start = "zeros") -> Effect:
        """Measure the effect of moving these neurons to registers, in one run over the images."""
        sums: Sums = {}
        with (
            self.block_cache.reused(neurons, (num_registers, start)),
            patched(self.model, unscored(neurons), num_registers=num_registers, start=start),
        ):
            for batch, baseline in enumerate(self.baselines):
                self.block_cache.begin(batch)
                self._compare(baseline, sums)
        after, before = all_reduce_sum(sums), self.before
        least = MIN_FRACTION * float(before["patches"])  # a fraction of hardly any outliers would mean nothing
        remaining = (after["outliers"] / before["outliers"].clamp(min=least))[self.onset :]
        excess = (after["excess"] / before["excess"].clamp(min=least))[self.onset :]
        cosine = after["cosine"] / before["count"]
        sink, hottest = self._attention_figures(after)
        return Effect(
            neurons=len(neurons),
            remaining=float(remaining.max()),
            worst_block=self.onset + int(remaining.argmax()),
            excess=float(excess.max()),
            change_pooled=1 - float(cosine[0]),
            change_patches=1 - float(cosine[1]),
            agreement=float(after["agreed"] / before["count"][0]) if "agreed" in after else None,
            num_registers=num_registers,
            start=start,
            sink=sink,
            hottest=hottest,
            hotter=None if sink is None else float(after["hotter"] / before["count"][0]),
            unlike=self._unlike(after),
        )

    def _attention_figures(self, sums: Sums) -> tuple[float | None, float | None]:
        """The `sink` and the `hottest` of an `Effect`."""
        sink = self._sink(sums)
        return sink, None if sink is None else float(sums["hottest"] / self.before["count"][0])

    def _sink(self, sums: Sums) -> float | None:
        """See `Effect.sink`. It is read after the onset block, since a block attends to the outliers in its input."""
        numbers = self.before["former"], self.before["others"]
        drawn = sums["at_patches"][min(self.onset + 1, self.tower.depth - 1) :]  # (L', 3)
        if not all(numbers) or not drawn[:, 1].all():  # no outliers, or nothing was seen
            return None
        return float(((drawn[:, 0] / numbers[0]) / (drawn[:, 1] / numbers[1])).max())

    def _unlike(self, sums: Sums) -> float | None:
        before, after = (each["at_patches"][self.onset :, 2] for each in (self.before, sums))
        return float((after / before.clamp(min=1e-6)).mean()) if self.before["former"] else None

    def _run(self, images: Tensor) -> Figures:
        """Run a batch through the model, plain or patched, and read the figures off it."""
        tower = self.tower
        images = images.to(tower.device, tower.dtype)
        reader = _Reader(tower, images)
        with torch.no_grad(), reader.reading():
            scores = tower.run(images) if self.head is None else self.head(self.model, images)
        if reader.blocks_run != tower.depth:
            raise ValueError(
                f"the head ran {reader.blocks_run} blocks of a tower of {tower.depth}: it must run the model that it "
                "is given, once, as `lambda model, images: model(images)` does"
            )
        check_finite(torch.stack(reader.norms_of_tokens), images)
        return reader.figures(None if self.head is None else _classes(scores, len(images)))

    def _baseline(self, packed: tuple[PackedImage, ...], seed: int) -> Baseline:
        """Run a batch through the plain model, and keep what patched models are compared with."""
        images = _unpacked(packed)
        figures = self._run(images)
        norms = figures.norms
        limit = self.detection.rule.limit(norms)
        outlier = norms > limit  # (L, B, N)
        counted = ~ignored_patches(self.detection.ignored, self.tower.grid(images)).to(norms.device)
        number = min(NORMAL_PATCHES, max(1, norms.shape[-1] // 2))
        order = torch.rand(norms.shape[-1], generator=torch.Generator().manual_seed(seed)).to(norms.device)
        sampled = order.expand(len(images), -1).masked_fill(outlier.any(0), -1).topk(number).indices
        outlier = outlier & counted
        former = outlier[self.onset :].any(0)
        return Baseline(
            images=packed,
            limit=limit,
            counted=counted,
            outlier=outlier,
            former=former,
            excess=self._excess(norms, outlier),
            at_patches=_at_patches(figures, former, ~former & counted),
            hottest=figures.hottest,
            sampled=sampled,
            features=self._features(figures.tokens, sampled),
            classes=figures.classes,
        )

    def _features(self, tokens: Tensor, sampled: Tensor) -> Tensor:
        """The features (B, 1 + K, C) of the pooled token and of the patches with the indices `sampled` (B, K)."""
        num_prefix = self.tower.num_prefix
        patches = tokens.gather(1, (sampled + num_prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        pooled = tokens[:, :1] if num_prefix else patches.mean(1, keepdim=True)
        return torch.cat([pooled, patches], 1)

    def _excess(self, norms: Tensor, outlier: Tensor) -> Tensor:
        """The excess (L, B) of norms (L, B, N), summed over the plain model's outliers (see `Effect`)."""
        return ((norms / self.detection.rule.normal(norms) - 1).clamp(min=0) * outlier).sum(-1)

    def _compare(self, plain: Baseline, sums: Sums) -> None:
        """Add to the sums how the patched model differs from the plain one on a batch."""
        figures = self._run(_unpacked(plain.images))
        figures = replace(figures, patches=self.block_cache.finish(figures.patches))
        norms = figures.norms
        # An outlier must exceed the limits of both models. By the plain model's limit alone, patches would be outliers
        # if all norms had grown; by the patched model's alone, if they deviate a little from norms that became even.
        outlier = norms > torch.maximum(plain.limit, self.detection.rule.limit(norms))
        before, after = (
            torch.cat([features[:, :1] - self.centre[0].to(features), features[:, 1:] - self.centre[1].to(features)], 1)
            for features in (plain.features, self._features(figures.tokens, plain.sampled))
        )
        cosine = F.cosine_similarity(before, after, dim=-1)  # (B, 1 + K)
        added = {
            "outliers": (outlier & plain.counted).sum((1, 2)),
            "excess": self._excess(norms, plain.outlier).sum(1),
            "at_patches": _at_patches(figures, plain.former, plain.others).sum(1),
            "hottest": figures.hottest.sum(),
            "hotter": (figures.hottest > HOTTER * plain.hottest).sum(),
            "cosine": torch.stack([cosine[:, 0].sum(), cosine[:, 1:].sum()]),
        }
        if plain.classes is not None and figures.classes is not None:
            added["agreed"] = (plain.classes == figures.classes).sum()
        add(sums, added)


class _Reader:
    """Reads figures off a batch while it passes through the blocks."""

    def __init__(self, tower: Tower, images: Tensor) -> None:
        self.tower, self.images = tower, images
        self.patches: list[Tensor] = []  # (3, B, N) of each block that has run, see `Figures`
        self.norms_of_tokens: list[Tensor] = []
        self.hottest: Tensor | None = None
        self.drawn: list[Tensor] = []  # (B, N), what patches draw in each attention of the running block
        self.attention = SampledAttention(tower, images, self._see)

    @property
    def blocks_run(self) -> int:
        return len(self.patches)

    @contextmanager
    def reading(self) -> Iterator[None]:
        blocks = [block.module for block in self.tower.blocks]
        with (
            attention_kernel(self.tower.module, "sdpa", instead_of=UNSEEN),
            recording_inputs(blocks, self._before),
            recording_outputs(blocks, self._after),
            self.attention,
        ):
            yield

    def figures(self, classes: Tensor | None) -> Figures:
        patches = torch.stack(self.patches, 1)
        hottest = patches.new_zeros(len(self.images)) if self.hottest is None else self.hottest
        return Figures(patches, hottest, self.tokens[:, : self.attention.patches.stop].float(), classes)

    def _before(self, index: int, tokens: Tensor) -> None:
        self.drawn = []
        self.attention.begin(index)

    def _after(self, index: int, tokens: Tensor) -> None:
        self.attention.end()
        self.tokens = self.tower.arranged(tokens.detach(), self.images)
        norms, where = self.tokens.float().norm(dim=-1), self.attention.patches  # (B, T)
        cosine = neighbour_cosine(self.tokens[:, where].float(), norms[:, where], self.tower.grid(self.images))
        drawn = torch.stack(self.drawn).mean(0) if self.drawn else torch.zeros_like(cosine)
        self.norms_of_tokens.append(norms)
        self.patches.append(torch.stack([norms[:, where], cosine, drawn]))

    def _see(self, block: int, weights: Tensor, queries: Tensor, share: Tensor, values: Tensor | None) -> None:
        """Read off the attention (B, heads, n, T) that a sample of the tokens gives to all tokens in a block."""
        where = self.attention.patches
        given = weights[..., where].mean(1)  # (B, n, N)
        with autocast_off(weights.device):
            self.drawn.append(torch.einsum("bqn,q->bn", given, share.to(given)))
        if block == self.tower.depth - 1:
            is_patch = (queries >= where.start) & (queries < where.stop)
            row = given[:, 0] if where.start else given[:, is_patch].mean(1)  # (B, N)
            self.hottest = row.amax(-1) / row.sum(-1).clamp(min=1e-12)


def _at_patches(figures: Figures, former: Tensor, others: Tensor) -> Tensor:
    """Sums (L, B, 3): attention at the former outliers (B, N), attention at the others, and how unlike their neighbours
    the former outliers are."""
    _, cosine, drawn = figures.patches
    return torch.stack([(drawn * former).sum(-1), (drawn * others).sum(-1), ((1 - cosine) * former).sum(-1)], -1)


def _unpacked(packed: Sequence[PackedImage]) -> Tensor:
    """The images as one batch (B, 3, h, w)."""
    (images,) = batched((each.image for each in packed), len(packed))
    return images


def _classes(scores: Tensor, num_images: int) -> Tensor:
    """The best class (B,) of each image, by scores (B, classes)."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != num_images:
        what = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"the head must give scores ({num_images}, classes) for {num_images} images, got {what}")
    return scores.argmax(-1)
