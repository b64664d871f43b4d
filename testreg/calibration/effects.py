"""Measure the effect of moving some neurons, on images that had no part in ranking them.

A neuron is *moved* by patching the model: its activation is taken from the patches and placed on extra tokens, the
registers. *Outliers* are patches with huge norms. *Former outliers* are patches that are outliers in the *plain* model,
which is not patched, after the *onset block* (the block after which the outliers are there) or later.

The *effect* of moving neurons (`testreg.records.calibration.Effect`) says: Are the outliers gone after every block? Do
former outliers draw no more attention than other patches, and resemble their neighbours? Does everything else stay as
it was?

Shapes: L blocks, B images, T tokens, P prefix tokens (such as CLS), N patches, C width.
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
from testreg.records.options import Start
from testreg.register import patched

Head = Callable[[nn.Module, Tensor], Tensor]
"""A function of the user that computes scores (B, classes) from a model and images (B, 3, h, w). The images are on the
model's device and in its dtype."""

CACHE_BYTES = 2**28  # memory for the inputs of blocks that are kept while sets of neurons are compared
NORMAL_PATCHES = 64  # how many patches are sampled from each image, at most, to measure how normal patches change
HOTTER = 1.01  # an image is hotter if its hottest patch draws over this many times what the plain model's hottest does
MUCH_HOTTER = 1.1  # maps are hotter if the mean attention to the hottest patch grows by more than this factor
MAX_SINK = 1.5  # former outliers are a sink if they draw more than this many times the attention of other patches


def worst_of(effects: Sequence[Effect]) -> Effect:
    """Combine the effects of one set of neurons at several image sizes: each figure is the worst over the sizes."""
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
    """The faults of the attention maps of a patched model, in words; empty if the maps are clean.

    A fault is that former outliers are a sink (`MAX_SINK`), or that the hottest patch draws much more attention than in
    the plain model (`MUCH_HOTTER`).
    """
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
    """What was read off one forward of the plain or a patched model on a batch."""

    of_patches: Tensor
    """Three figures of each patch in each block, (3, L, B, N): its norm after the block, its mean cosine similarity to
    its neighbours (four, in an image) after the block, and the attention that it draws in the block, averaged over
    queries and attention heads."""
    hottest: Tensor
    """The share of the attention to patches that goes to each image's hottest patch in the last block, (B,). It is the
    attention that CLS gives; without CLS, that which patches give on average. 0 if attention is not seen."""
    tokens: Tensor
    """The prefix tokens and patches after the last block, (B, P + N, C), float32."""
    classes: Tensor | None
    """The best class of each image by the user's head, (B,); None without a head."""

    @property
    def norms(self) -> Tensor:
        """The norms of the patches after each block, (L, B, N)."""
        return self.of_patches[0]


@dataclass(frozen=True)
class Baseline:
    """What was read off the plain model on a batch. Patched models are compared with it.

    Shapes: L blocks, B images, N patches, K of them sampled, C width.
    """

    images: tuple[PackedImage, ...]
    limit: Tensor  # (L, B, 1), the norm above which a patch is an outlier
    counted: Tensor  # (N,), whether a patch may be an outlier
    outlier: Tensor  # (L, B, N), whether a patch is an outlier after each block
    former: Tensor  # (B, N), whether a patch is a former outlier
    excess: Tensor  # (L, B), how far norms are above normal, summed over the outliers, see `Effect.excess`
    attention_and_unlikeness: Tensor  # (L, B, 3), see `_attention_and_unlikeness`
    hottest: Tensor  # (B,), the attention share of the hottest patch
    sampled: Tensor  # (B, K), the indices of the sampled patches: no outliers, as far as there are enough others
    features: Tensor  # (B, 1 + K, C), the pooled token and the sampled patches after the last block
    classes: Tensor | None  # (B,), the best class by the user's head

    @property
    def others(self) -> Tensor:
        """Whether a patch is counted and no former outlier, (B, N)."""
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
            attention_and_unlikeness=self.attention_and_unlikeness[:, images],
            hottest=self.hottest[images],
            sampled=self.sampled[images],
            features=self.features[images],
            classes=None if self.classes is None else self.classes[images],
        )


class EffectMeter:
    """Measures the effect of moving sets of neurons, on held-out images. The plain model is run on them only once.

    Outliers, new ones included, are counted after the onset block and after every later block. Earlier blocks do not
    count: some patches, such as bright ones, have high norms there that are harmless, and that no neuron of a later
    block can remove. Nothing is missed, since an outlier that appears earlier and lasts is still there after the onset.
    The count begins at the same block for all sets of neurons. So a set whose first neuron is in a late block has no
    advantage: the outliers between the onset and this block count as left.

    Args:
        images: the held-out images, few enough to be kept in memory.
        detection: decides which patches are outliers.
        onset: the onset block.
        head: a function of the user, see `Head`; None measures no classes.

    Raises:
        ValueError: norms are not finite; the user's head does not run the model exactly once, or does not return
            scores. `effect` raises this error as well.
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
        self._set_baselines([self._baseline(tuple(batch), seed) for batch in lists])

    def _set_baselines(self, baselines: Sequence[Baseline]) -> None:
        """Set the baselines of all batches, and add up their figures."""
        self.baselines = baselines
        self.block_cache = BlockCache(self.tower)  # this cache is given no memory, so it keeps nothing
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
                    "attention_and_unlikeness": plain.attention_and_unlikeness.sum(1),
                    "hottest": plain.hottest.sum(),
                    "features": torch.stack([pooled.sum(0), patches.sum(0)]),
                    "count": torch.tensor([len(pooled), len(patches)]),
                },
            )
        self.plain_sums = all_reduce_sum(sums)
        # The means (2, C) of the pooled tokens and of the sampled patches.
        self.mean_features = self.plain_sums["features"] / self.plain_sums["count"].unsqueeze(-1)

    def split(self, number: int) -> tuple[EffectMeter, EffectMeter]:
        """Divide the images between two meters, with similar shares of the outliers in both.

        The images are sorted by their share of all outliers, averaged over the blocks from the onset on. The first
        meter gets `number` of them, at even intervals; the second gets the others.
        """
        num_outliers = self.plain_sums["outliers"][self.onset :].clamp(min=1)  # (L',) after each block from the onset
        shares = [(plain.outlier.sum(-1)[self.onset :].T.cpu() / num_outliers).sum(-1) for plain in self.baselines]
        shares_here = torch.cat(shares).tolist() if shares else []
        sorted_images = sorted(
            (-share, image, process)
            for process, of_process in enumerate(all_gather(shares_here))
            for image, share in enumerate(of_process)
        )
        interval = len(sorted_images) / number
        in_first = {sorted_images[int(turn * interval)][1:] for turn in range(number)}
        parts = []
        for is_first in (True, False):
            is_wanted = [((image, rank()) in in_first) == is_first for image in range(len(shares_here))]
            part = copy.copy(self)
            part._set_baselines(list(self._baselines_of(is_wanted)))
            parts.append(part)
        return parts[0], parts[1]

    def _baselines_of(self, is_wanted: Sequence[bool]) -> Iterator[Baseline]:
        """The baselines of the images of this process for which `is_wanted`, which has an entry for each of them, is
        true."""
        start = 0
        for plain in self.baselines:
            end = start + len(plain.images)
            if images := [i for i, keep in enumerate(is_wanted[start:end]) if keep]:
                yield plain.take(images)
            start = end

    @property
    def num_images(self) -> int:
        """How many images the meter has, in all processes together."""
        return int(self.plain_sums["count"][0])

    @property
    def outlier_fraction(self) -> float:
        """The fraction of the plain model's patches that are outliers after the block `detection.block`."""
        return float(self.plain_sums["outliers"][self.detection.block] / self.plain_sums["patches"])

    @property
    def effect_of_nothing(self) -> Effect:
        """The effect of moving no neurons: all outliers remain, and the attention figures are the plain model's."""
        sink, hottest = self._attention_figures(self.plain_sums)
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
            unlike=None if not self.plain_sums["former"] else 1.0,
        )

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Within the context, blocks are not run again while the cache has what comes out of them (`BlockCache`)."""
        self.block_cache = BlockCache(self.tower, CACHE_BYTES // max(1, len(self.baselines)))
        try:
            yield
        finally:
            self.block_cache = BlockCache(self.tower)

    def effect(self, neurons: Sequence[Neuron], num_registers: int = 1, start: Start = "zeros") -> Effect:
        """Measure the effect of moving neurons to a number of registers, with one forward of each image."""
        sums: Sums = {}
        with (
            self.block_cache.reused(neurons, (num_registers, start)),
            patched(self.model, unscored(neurons), num_registers=num_registers, start=start),
        ):
            for batch, baseline in enumerate(self.baselines):
                self.block_cache.begin(batch)
                self._add_comparison(baseline, sums)
        after, before = all_reduce_sum(sums), self.plain_sums
        min_outliers = MIN_FRACTION * float(before["patches"])  # a fraction of hardly any outliers would mean nothing
        remaining = (after["outliers"] / before["outliers"].clamp(min=min_outliers))[self.onset :]
        excess = (after["excess"] / before["excess"].clamp(min=min_outliers))[self.onset :]
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
        return sink, None if sink is None else float(sums["hottest"] / self.plain_sums["count"][0])

    def _sink(self, sums: Sums) -> float | None:
        """The figure `Effect.sink`: how many times as much attention a former outlier draws as another patch.

        It is the largest over the blocks behind the onset block, the first of which is the first that attends to the
        outliers. If the onset block is the last block, that block is used. Returns None if there are no former
        outliers, no other patches, or if attention was not seen.
        """
        num_former, num_others = self.plain_sums["former"], self.plain_sums["others"]
        attention = sums["attention_and_unlikeness"][min(self.onset + 1, self.tower.depth - 1) :]  # (L', 3), L' blocks
        if not num_former or not num_others or not attention[:, 1].all():
            return None
        return float(((attention[:, 0] / num_former) / (attention[:, 1] / num_others)).max())

    def _unlike(self, sums: Sums) -> float | None:
        """The figure `Effect.unlike`: 1 - cosine of former outliers to their neighbours, as a fraction of what it is in
        the plain model, averaged over the blocks from the onset on. Returns None if there are no former outliers."""
        before, after = (each["attention_and_unlikeness"][self.onset :, 2] for each in (self.plain_sums, sums))
        return float((after / before.clamp(min=1e-6)).mean()) if self.plain_sums["former"] else None

    def _run(self, images: Tensor) -> Figures:
        """Run a batch through the model as it is, plain or patched, and read the figures off the forward."""
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
        """Run a batch through the plain model, and keep what patched models are compared with; `seed` is for the sample
        of normal patches."""
        images = _unpacked(packed)
        figures = self._run(images)
        norms = figures.norms
        limit = self.detection.rule.limit(norms)
        outlier = norms > limit  # (L, B, N)
        counted = ~ignored_patches(self.detection.ignored, self.tower.grid(images)).to(norms.device)
        num_sampled = min(NORMAL_PATCHES, max(1, norms.shape[-1] // 2))
        random = torch.rand(norms.shape[-1], generator=torch.Generator().manual_seed(seed)).to(norms.device)
        sampled = random.expand(len(images), -1).masked_fill(outlier.any(0), -1).topk(num_sampled).indices
        outlier = outlier & counted
        former = outlier[self.onset :].any(0)
        return Baseline(
            images=packed,
            limit=limit,
            counted=counted,
            outlier=outlier,
            former=former,
            excess=self._excess(norms, outlier),
            attention_and_unlikeness=_attention_and_unlikeness(figures, former, ~former & counted),
            hottest=figures.hottest,
            sampled=sampled,
            features=self._features(figures.tokens, sampled),
            classes=figures.classes,
        )

    def _features(self, tokens: Tensor, sampled: Tensor) -> Tensor:
        """The pooled token and the sampled patches, (B, 1 + K, C), by the indices `sampled` (B, K).

        The pooled token is CLS, or the mean of the sampled patches if there is no CLS.
        """
        num_prefix = self.tower.num_prefix
        patches = tokens.gather(1, (sampled + num_prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        pooled = tokens[:, :1] if num_prefix else patches.mean(1, keepdim=True)
        return torch.cat([pooled, patches], 1)

    def _excess(self, norms: Tensor, outlier: Tensor) -> Tensor:
        """The excess (L, B) of the norms (L, B, N), see `Effect.excess`: how far the ratio of a norm to `rule.normal`
        exceeds 1, summed over the plain model's outliers."""
        return ((norms / self.detection.rule.normal(norms) - 1).clamp(min=0) * outlier).sum(-1)

    def _add_comparison(self, plain: Baseline, sums: Sums) -> None:
        """Run the patched model on the batch of a baseline, and add to the sums how it differs from the plain model."""
        figures = self._run(_unpacked(plain.images))
        figures = replace(figures, of_patches=self.block_cache.finish(figures.of_patches))
        norms = figures.norms
        # The norm of an outlier must exceed the limits of both models. By the plain model's limit alone, patches would
        # count if all norms had grown. By the patched model's limit alone, patches would count that are hardly above
        # the others once all norms are nearly equal.
        outlier = norms > torch.maximum(plain.limit, self.detection.rule.limit(norms))
        mean_pooled, mean_patch = self.mean_features.to(plain.features)
        before, after = (
            torch.cat([features[:, :1] - mean_pooled, features[:, 1:] - mean_patch], 1)
            for features in (plain.features, self._features(figures.tokens, plain.sampled))
        )
        cosine = F.cosine_similarity(before, after, dim=-1)  # (B, 1 + K)
        more = {
            "outliers": (outlier & plain.counted).sum((1, 2)),
            "excess": self._excess(norms, plain.outlier).sum(1),
            "attention_and_unlikeness": _attention_and_unlikeness(figures, plain.former, plain.others).sum(1),
            "hottest": figures.hottest.sum(),
            "hotter": (figures.hottest > HOTTER * plain.hottest).sum(),
            "cosine": torch.stack([cosine[:, 0].sum(), cosine[:, 1:].sum()]),
        }
        if plain.classes is not None and figures.classes is not None:
            more["agreed"] = (plain.classes == figures.classes).sum()
        add(sums, more)


class _Reader:
    """Reads figures off a batch of images while it passes through the blocks."""

    def __init__(self, tower: Tower, images: Tensor) -> None:
        self.tower, self.images = tower, images
        self.of_patches: list[Tensor] = []
        """The three figures (3, B, N) of each block that has run, see `Figures.of_patches`."""
        self.norms_of_tokens: list[Tensor] = []
        """The norms (B, T) of all tokens after each block that has run."""
        self.hottest: Tensor | None = None
        """The attention share (B,) of the hottest patch in the last block."""
        self.attention_drawn: list[Tensor] = []
        """The attention (B, N) that patches draw in the running block; several, if the block attends several times."""
        self.attention = SampledAttention(tower, images, self._read_attention)

    @property
    def blocks_run(self) -> int:
        return len(self.of_patches)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the context, figures are read off the forward that runs."""
        blocks = [block.module for block in self.tower.blocks]
        with (
            attention_kernel(self.tower.module, "sdpa", instead_of=UNSEEN),
            recording_inputs(blocks, self._before_block),
            recording_outputs(blocks, self._after_block),
            self.attention,
        ):
            yield

    def figures(self, classes: Tensor | None) -> Figures:
        """The figures of the forward that has run."""
        of_patches = torch.stack(self.of_patches, 1)
        hottest = of_patches.new_zeros(len(self.images)) if self.hottest is None else self.hottest
        return Figures(of_patches, hottest, self.tokens[:, : self.attention.patches.stop].float(), classes)

    def _before_block(self, index: int, tokens: Tensor) -> None:
        self.attention_drawn = []
        self.attention.begin(index)

    def _after_block(self, index: int, tokens: Tensor) -> None:
        self.attention.end()
        self.tokens = self.tower.arranged(tokens.detach(), self.images)
        norms, where = self.tokens.float().norm(dim=-1), self.attention.patches  # (B, T)
        cosine = neighbour_cosine(self.tokens[:, where].float(), norms[:, where], self.tower.grid(self.images))
        attention = torch.stack(self.attention_drawn).mean(0) if self.attention_drawn else torch.zeros_like(cosine)
        self.norms_of_tokens.append(norms)
        self.of_patches.append(torch.stack([norms[:, where], cosine, attention]))

    def _read_attention(
        self, block: int, weights: Tensor, queries: Tensor, share: Tensor, values: Tensor | None
    ) -> None:
        """Read how much attention each patch draws in a block, from the weights of a sample of the queries.

        `OnSample` explains the arguments.
        """
        where = self.attention.patches
        to_patches = weights[..., where].mean(1)  # (B, n, N)
        with autocast_off(weights.device):
            self.attention_drawn.append(torch.einsum("bqn,q->bn", to_patches, share.to(to_patches)))
        if block == self.tower.depth - 1:
            is_patch = (queries >= where.start) & (queries < where.stop)
            # The attention that CLS gives to each patch, (B, N); without CLS, that which patches give on average.
            given = to_patches[:, 0] if where.start else to_patches[:, is_patch].mean(1)
            self.hottest = given.amax(-1) / given.sum(-1).clamp(min=1e-12)


def _attention_and_unlikeness(figures: Figures, former: Tensor, others: Tensor) -> Tensor:
    """Three sums over the patches of each image in each block, (L, B, 3).

    They are the attention that former outliers draw, the attention that other patches draw, and 1 - cosine of former
    outliers to their neighbours. The masks `former` and `others` are (B, N).
    """
    _, cosine, attention = figures.of_patches
    return torch.stack(
        [(attention * former).sum(-1), (attention * others).sum(-1), ((1 - cosine) * former).sum(-1)], -1
    )


def _unpacked(packed: Sequence[PackedImage]) -> Tensor:
    """Turn images, which are kept in a form that takes less memory, into one batch (B, 3, h, w)."""
    (images,) = batched((each.image for each in packed), len(packed))
    return images


def _classes(scores: Tensor, num_images: int) -> Tensor:
    """The best class (B,) of each image, from the scores (B, classes) that the user's head returned."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != num_images:
        what = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"the head must give scores ({num_images}, classes) for {num_images} images, got {what}")
    return scores.argmax(-1)
