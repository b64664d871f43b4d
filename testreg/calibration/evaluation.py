"""Measure the patched model on images that did not rank its neurons: what does moving some of them do?

A ranking says which neurons *may* be the cause of outliers. What decides is the patched model: whether the outliers are
gone, after every block, and whether everything else stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.calibration.options import Head
from testreg.calibration.prefix import Prefix
from testreg.families import Tower
from testreg.io.images import batched
from testreg.io.packing import PackedImage
from testreg.io.processes import Sums, add, gathered, rank, summed
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.outliers import MIN_FRACTION, Detection, check_finite, ignored_patches
from testreg.neurons import Neuron, unscored
from testreg.register import patched

KEPT = 2**28  # bytes of tokens between blocks that are kept while sets are compared
NORMAL_PATCHES = 64  # of an image, whose change is measured


@dataclass(frozen=True)
class Effect:
    """What moving some neurons does, on held-out images."""

    neurons: int
    remaining: float
    """Outliers left after `worst_block`, as a fraction of those before. Such an outlier exceeds the limit of its image
    both as the plain and as the patched model sees it."""
    worst_block: int
    """The block, from the onset on, after which most outliers are left."""
    excess: float
    """Excess norm that the plain model's outliers keep, as a fraction of what they had, after the block from the onset
    on where that is most. The excess of a patch is how far its norm is above the normal one of its image (median + 5
    robust sigma), over the latter. Unlike a count, it tells whether neurons were left out that matter."""
    change_pooled: float
    """1 - cosine between the last block's CLS tokens without and with registers, or between the means of the normal
    patches where there is no CLS. What all images have in common is subtracted first: it would hide any change."""
    change_patches: float
    """1 - cosine between the normal patches without and with registers, likewise."""
    agreement: float | None
    """Fraction of the images that the user's head gives the same class as before; None without a head."""

    @property
    def change(self) -> float:
        """The larger of the two changes."""
        return max(self.change_pooled, self.change_patches)


def worst_of(effects: Sequence[Effect]) -> Effect:
    """The worst of each figure, for one set of neurons at several image sizes."""
    worst = max(effects, key=lambda effect: effect.remaining)
    return replace(
        worst,
        excess=max(effect.excess for effect in effects),
        change_pooled=max(effect.change_pooled for effect in effects),
        change_patches=max(effect.change_patches for effect in effects),
        agreement=min((effect.agreement for effect in effects if effect.agreement is not None), default=None),
    )


@dataclass(frozen=True)
class Baseline:
    """What the plain model makes of a batch. L blocks, B images, N patches, K of them sampled, C width."""

    images: tuple[PackedImage, ...]
    limit: Tensor  # (L, B, 1), norm above which a patch is an outlier
    counted: Tensor  # (N,), patches that may be outliers
    outlier: Tensor  # (L, B, N)
    excess: Tensor  # (L, B), summed over the outliers
    sampled: Tensor  # (B, K), indices of normal patches
    features: Tensor  # (B, 1 + K, C), of the pooled token and of these, after the last block
    classes: Tensor | None  # (B,), by the user's head

    def take(self, images: list[int]) -> Baseline:
        """The same of some of the images."""
        return Baseline(
            images=tuple(self.images[i] for i in images),
            limit=self.limit[:, images],
            counted=self.counted,
            outlier=self.outlier[:, images],
            excess=self.excess[:, images],
            sampled=self.sampled[images],
            features=self.features[images],
            classes=None if self.classes is None else self.classes[images],
        )


class Evaluator:
    """Measures the effect of sets of neurons, on held-out images that the plain model has seen once.

    Outliers are counted after the onset and after every block behind it, new ones too. In front of the onset they are
    not: early blocks have high norms of their own, of a bright patch say, which mean nothing, and which no neuron of a
    later block reaches. Nothing is missed, since an outlier that arises earlier and lasts is there after the onset
    as well. And since the count begins at the same block for all sets of neurons, none looks better for beginning late:
    all outliers between the onset and its first neuron are left.

    Args:
        images: few enough to be kept.
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
        self.grid = next(grid for grid in gathered(tower.grid(images[0].image[None]) if images else None) if grid)
        batches = [tuple(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        self._compare_with([self._baseline(batch, seed) for batch in batches])

    def _compare_with(self, baselines: Sequence[Baseline]) -> None:
        self.baselines = baselines
        self.prefix = Prefix(self.tower)  # keeps nothing
        self.known: dict[frozenset[tuple[int, int]], Effect] = {}
        """What sets of neurons were found to do."""
        sums: Sums = {}
        for plain in baselines:
            pooled, patches = plain.features[:, 0], plain.features[:, 1:].flatten(0, 1)
            add(
                sums,
                {
                    "outliers": plain.outlier.sum((1, 2)),
                    "patches": torch.tensor(plain.outlier[0].numel()),
                    "excess": plain.excess.sum(1),
                    "features": torch.stack([pooled.sum(0), patches.sum(0)]),
                    "count": torch.tensor([len(pooled), len(patches)]),
                },
            )
        self.before = summed(sums)
        self.centre = self.before["features"] / self.before["count"].unsqueeze(-1)  # (2, C), of pooled and patches

    def split(self, number: int) -> tuple[Evaluator, Evaluator]:
        """Two evaluators, of `number` of the images and of the others, which have a like share of the outliers.

        Images take turns by how many outliers they have, those after each block from the onset on weighing alike.
        """
        of_all = self.before["outliers"][self.onset :].clamp(min=1)  # (L',)
        shares = [(plain.outlier.sum(-1)[self.onset :].T.cpu() / of_all).sum(-1) for plain in self.baselines]
        mine = torch.cat(shares).tolist() if shares else []
        ranked = sorted(
            (-share, image, process)
            for process, of_process in enumerate(gathered(mine))
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

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Within the context, what several sets of neurons share is computed once, as far as `KEPT` bytes hold it."""
        self.prefix = Prefix(self.tower, KEPT // max(1, len(self.baselines)))
        try:
            yield
        finally:
            self.prefix = Prefix(self.tower)

    def effect(self, neurons: Sequence[Neuron]) -> Effect:
        """What moving these neurons to a register does; the images are run once for each set."""
        moved = frozenset((block, unit) for block, unit, _ in neurons)
        if moved not in self.known:
            self.known[moved] = self._measured(neurons)
        return self.known[moved]

    def _measured(self, neurons: Sequence[Neuron]) -> Effect:
        sums: Sums = {}
        with self.prefix.reused(neurons), patched(self.model, unscored(neurons)):
            for batch, baseline in enumerate(self.baselines):
                self.prefix.begin(batch)
                self._compare(baseline, sums)
        after, before = summed(sums), self.before
        least = MIN_FRACTION * float(before["patches"])  # what is as good as none, divided by, means nothing
        remaining = (after["outliers"] / before["outliers"].clamp(min=least))[self.onset :]
        excess = (after["excess"] / before["excess"].clamp(min=least))[self.onset :]
        cosine = after["cosine"] / before["count"]
        return Effect(
            neurons=len(neurons),
            remaining=float(remaining.max()),
            worst_block=self.onset + int(remaining.argmax()),
            excess=float(excess.max()),
            change_pooled=1 - float(cosine[0]),
            change_patches=1 - float(cosine[1]),
            agreement=float(after["agreed"] / before["count"][0]) if "agreed" in after else None,
        )

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Norms (L, B, N) of the patches, tokens (B, P + N, C) after the last block, and the head's classes (B,)."""
        tower = self.tower
        images = images.to(tower.device, tower.dtype)
        with torch.no_grad(), recorded_norms(tower) as recorded, recorded_tokens(tower, -1) as last:
            scores = tower.run(images) if self.head is None else self.head(self.model, images)
        if len(recorded) != tower.depth:
            raise ValueError(
                f"the head ran {len(recorded)} blocks of a tower of {tower.depth}: it must run the model that it is "
                "given, once, as `lambda model, images: model(images)` does"
            )
        norms = torch.stack(recorded)
        check_finite(norms, images)
        patches = tower.patches(images)
        classes = None if self.head is None else _classes(scores, len(images))
        return norms[..., patches], last[0][:, : patches.stop].float(), classes

    def _baseline(self, packed: tuple[PackedImage, ...], seed: int) -> Baseline:
        """What the plain model makes of a batch."""
        images = _unpacked(packed)
        norms, tokens, classes = self._run(images)
        limit = self.detection.rule.limit(norms)
        outlier = norms > limit  # (L, B, N)
        counted = ~ignored_patches(self.detection.ignored, self.tower.grid(images)).to(norms.device)
        number = min(NORMAL_PATCHES, max(1, norms.shape[-1] // 2))
        order = torch.rand(norms.shape[-1], generator=torch.Generator().manual_seed(seed)).to(norms.device)
        sampled = order.expand(len(images), -1).masked_fill(outlier.any(0), -1).topk(number).indices
        outlier = outlier & counted
        return Baseline(
            images=packed,
            limit=limit,
            counted=counted,
            outlier=outlier,
            excess=self._excess(norms, outlier),
            sampled=sampled,
            features=self._features(tokens, sampled),
            classes=classes,
        )

    def _features(self, tokens: Tensor, sampled: Tensor) -> Tensor:
        """The pooled token and the sampled patches (B, K), as (B, 1 + K, C)."""
        num_prefix = self.tower.num_prefix
        patches = tokens.gather(1, (sampled + num_prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        pooled = tokens[:, :1] if num_prefix else patches.mean(1, keepdim=True)
        return torch.cat([pooled, patches], 1)

    def _excess(self, norms: Tensor, outlier: Tensor) -> Tensor:
        """The excess (L, B) of norms (L, B, N), summed over the plain model's outliers (see `Effect`)."""
        return ((norms / self.detection.rule.normal(norms) - 1).clamp(min=0) * outlier).sum(-1)

    def _compare(self, plain: Baseline, sums: Sums) -> None:
        """Add to the sums how the patched model differs from the plain one on a batch."""
        norms, tokens, classes = self._run(_unpacked(plain.images))
        norms = self.prefix.finish(norms)
        # By both limits: norms may grow evenly, so that none stands out, or even out, so that small ones do.
        outlier = norms > torch.maximum(plain.limit, self.detection.rule.limit(norms))
        before, after = (
            torch.cat([features[:, :1] - self.centre[0].to(features), features[:, 1:] - self.centre[1].to(features)], 1)
            for features in (plain.features, self._features(tokens, plain.sampled))
        )
        cosine = F.cosine_similarity(before, after, dim=-1)  # (B, 1 + K)
        added = {
            "outliers": (outlier & plain.counted).sum((1, 2)),
            "excess": self._excess(norms, plain.outlier).sum(1),
            "cosine": torch.stack([cosine[:, 0].sum(), cosine[:, 1:].sum()]),
        }
        if plain.classes is not None and classes is not None:
            added["agreed"] = (plain.classes == classes).sum()
        add(sums, added)


def _unpacked(packed: Sequence[PackedImage]) -> Tensor:
    """A batch (B, 3, h, w)."""
    (images,) = batched((each.image for each in packed), len(packed))
    return images


def _classes(scores: Tensor, num_images: int) -> Tensor:
    """The best class (B,) of each image, by scores (B, classes)."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != num_images:
        what = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"the head must give scores ({num_images}, classes) for {num_images} images, got {what}")
    return scores.argmax(-1)
