"""Choose register neurons by measuring the patched model, on images that did not rank them.

A ranking says which neurons *may* be the cause. What decides is the patched model: whether the outliers are gone, after
every block, and whether everything else stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.families import Tower
from testreg.io.images import batched
from testreg.io.processes import Sums, add, gathered, summed
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.outliers import MIN_FRACTION, Detection, check_finite, ignored_patches
from testreg.neurons import Neuron, RegisterNeurons
from testreg.register import patch, unpatch

Head = Callable[[nn.Module, Tensor], Tensor]

TOLERANCE = 0.02  # of the outliers' excess norm: sets that differ by less remove them equally well
MAX_NEURONS = 512  # in a set that is measured; InternViT-6B needed 300
MAX_MEASUREMENTS = 64  # of sets of neurons, in one selection
NORMAL_PATCHES = 64  # of an image, whose change is measured


@dataclass(frozen=True)
class Effect:
    """What moving some neurons does, on held-out images."""

    neurons: int
    remaining: float
    """Outliers left after the block where most are, of the onset and those behind it, as a fraction of those before.
    What is left exceeds the limit of its image both as the plain and as the patched model sees it."""
    worst_block: int
    """That block."""
    excess: float
    """What is left, after the detection block, of the norm by which the plain model's outliers exceed what is normal in
    their image (median + 5 robust sigma), in units of that; as a fraction of that before. Unlike a count, it tells
    whether neurons were left out that matter."""
    change_pooled: float
    """1 - cosine of the last block's CLS token, or of the mean of the normal patches where there is none, without and
    with registers. What all images have in common is subtracted first: it would hide any change."""
    change_patches: float
    """The same, of normal patches."""
    agreement: float | None
    """Fraction of the images that the user's head gives the same class as before; None without a head."""

    @property
    def change(self) -> float:
        return max(self.change_pooled, self.change_patches)


def worst_of(effects: Sequence[Effect]) -> Effect:
    """Figure by figure the worst, of one set of neurons at several image sizes."""
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
    """A batch, and what the plain model makes of it. L blocks, B images, N patches, K of them sampled, C width."""

    images: Tensor  # (B, 3, h, w)
    limit: Tensor  # (L, B, 1), norm above which a patch is an outlier
    counted: Tensor  # (N,), patches that may be outliers
    outlier: Tensor  # (B, N), after the detection block
    sampled: Tensor  # (B, K), indices of normal patches
    features: Tensor  # (B, 1 + K, C), of the pooled token and of these, after the last block
    answer: Tensor | None  # (B,), class that the user's head says


class Evaluator:
    """Images that did not rank the neurons, and what the plain model makes of them.

    Outliers are counted after the onset and after every block behind it, new ones too. In front of the onset they are
    not: early blocks have high norms of their own there, a bright patch say, which mean nothing, and which no neuron
    of a later block reaches. Nothing is missed, since an outlier that arises earlier and lasts is there after the onset
    as well. And since the count begins at the same block for all sets of neurons, none looks better for beginning late:
    all outliers between the onset and its first neuron are left.

    Args:
        images: tensors (3, h, w), few enough to be kept.
        onset: the block after which the outliers are there.
        head: model, images (B, 3, h, w) on the model's device and in its dtype -> scores (B, classes).

    Raises:
        ValueError: norms are not finite; the head does not run the model once, or does not give scores. So do its
            methods.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        images: Sequence[Tensor],
        detection: Detection,
        onset: int,
        *,
        batch_size: int,
        head: Head | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tower, self.detection, self.onset, self.head = model, tower, detection, onset, head
        sums: Sums = {}
        self.batches = [self._look(batch, sums, seed) for batch in batched(images, batch_size)]
        self.before = summed(sums)
        self.grid = next(grid for grid in gathered(tower.grid(images[0][None]) if images else None) if grid)
        self.centre = self.before["features"] / self.before["count"].unsqueeze(-1)  # (2, C), of pooled and patches

    @property
    def num_images(self) -> int:
        return int(self.before["count"][0])

    @property
    def outlier_fraction(self) -> float:
        """Of the patches, after the detection block."""
        return float(self.before["outliers"][self.detection.block] / self.before["patches"])

    def effect(self, neurons: Sequence[Neuron]) -> Effect:
        """What moving these neurons does."""
        sums: Sums = {}
        with _patched(self.model, neurons):
            for plain in self.batches:
                self._compare(plain, sums)
        after, before = summed(sums), self.before
        remaining = after["outliers"] / before["outliers"].clamp(min=MIN_FRACTION * float(before["patches"]))
        remaining = remaining[self.onset :]
        cosine = after["cosine"] / before["count"]
        return Effect(
            neurons=len(neurons),
            remaining=float(remaining.max()),
            worst_block=self.onset + int(remaining.argmax()),
            excess=float(after["excess"] / before["excess"].clamp(min=1e-12)),
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
        rows, columns = tower.grid(images)
        end = tower.num_prefix + rows * columns
        answer = None if self.head is None else _classes(scores, len(images))
        return norms[..., tower.num_prefix : end], last[0][:, :end].float(), answer

    def _look(self, images: Tensor, sums: Sums, seed: int) -> Baseline:
        norms, tokens, answer = self._run(images)
        block, grid = self.detection.block, self.tower.grid(images)
        limit = self.detection.rule.limit(norms)
        outlier = norms > limit  # (L, B, N)
        counted = ~ignored_patches(self.detection.ignored, grid).to(norms.device)
        number = min(NORMAL_PATCHES, max(1, norms.shape[-1] // 2))
        order = torch.rand(norms.shape[-1], generator=torch.Generator().manual_seed(seed)).to(norms.device)
        sampled = order.expand(len(images), -1).masked_fill(outlier.any(0), -1).topk(number).indices
        plain = Baseline(
            images=images,
            limit=limit,
            counted=counted,
            outlier=outlier[block] & counted,
            sampled=sampled,
            features=self._features(tokens, sampled),
            answer=answer,
        )
        pooled, patches = plain.features[:, 0], plain.features[:, 1:].flatten(0, 1)
        add(
            sums,
            {
                "outliers": (outlier & counted).sum((1, 2)),
                "patches": torch.tensor(norms[0].numel()),
                "excess": self._excess(norms, plain),
                "features": torch.stack([pooled.sum(0), patches.sum(0)]),
                "count": torch.tensor([len(pooled), len(patches)]),
            },
        )
        return plain

    def _features(self, tokens: Tensor, sampled: Tensor) -> Tensor:
        """(B, 1 + K, C): the pooled token, and the sampled patches (B, K)."""
        num_prefix = self.tower.num_prefix
        patches = tokens.gather(1, (sampled + num_prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        pooled = tokens[:, :1] if num_prefix else patches.mean(1, keepdim=True)
        return torch.cat([pooled, patches], 1)

    def _excess(self, norms: Tensor, plain: Baseline) -> Tensor:
        """Sum over the plain model's outliers of how far norms (L, B, N) exceed the normal, in units of that."""
        norms = norms[self.detection.block]
        return (norms / self.detection.rule.normal(norms) - 1).clamp(min=0)[plain.outlier].sum()

    def _compare(self, plain: Baseline, sums: Sums) -> None:
        norms, tokens, answer = self._run(plain.images)
        # By both limits: norms may grow evenly, so that none stands out, or even out, so that small ones do.
        outlier = norms > torch.maximum(plain.limit, self.detection.rule.limit(norms))
        before, after = (
            torch.cat([features[:, :1] - self.centre[0].to(features), features[:, 1:] - self.centre[1].to(features)], 1)
            for features in (plain.features, self._features(tokens, plain.sampled))
        )
        cosine = F.cosine_similarity(before, after, dim=-1)  # (B, 1 + K)
        added = {
            "outliers": (outlier & plain.counted).sum((1, 2)),
            "excess": self._excess(norms, plain),
            "cosine": torch.stack([cosine[:, 0].sum(), cosine[:, 1:].sum()]),
        }
        if plain.answer is not None and answer is not None:
            added["agreed"] = (plain.answer == answer).sum()
        add(sums, added)


def _classes(scores: Tensor, num_images: int) -> Tensor:
    """Of scores (B, classes), the best class (B,) of each image."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != num_images:
        what = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"the head must give scores ({num_images}, classes) for {num_images} images, got {what}")
    return scores.argmax(-1)


@contextmanager
def _patched(model: nn.Module, neurons: Sequence[Neuron]) -> Iterator[None]:
    patch(model, RegisterNeurons(tuple(neurons)))
    try:
        yield
    finally:
        unpatch(model)


# The choice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    neurons: tuple[Neuron, ...]
    effect: Effect
    curve: tuple[Effect, ...]
    """Of the best 1, 2, 4, ... of the ranking, and of the sizes between which the choice was made."""
    dropped: tuple[Neuron, ...]
    """Among the best of the ranking, but of no effect on outliers."""


def select(
    ranking: Sequence[Neuron],
    measure: Callable[[Sequence[Neuron]], Effect],
    *,
    target: float,
    max_change: float | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Selection:
    """The fewest neurons that remove the outliers.

    The best 1, 2, 4, ... of the ranking are measured until outliers are down to `target` and twice as many neurons
    take less than `TOLERANCE` more of their excess norm; then the smallest such number is found by bisection. Last,
    neurons that can stay where they are, all together costing less than that, are dropped: those that fire at outliers
    without causing them.

    Args:
        target: outliers that may be left after any block, as a fraction of those before. If no set reaches it, the one
            that comes closest is chosen.
        max_change: sets that change pooled or patch features more (1 - cosine) are not chosen.
        out_of_time: asked before each measurement but the first; the search ends when it says so, with the best so far.

    Raises:
        ValueError: even the first neuron changes more than `max_change`.
    """
    count = 0

    def is_over() -> bool:
        return count >= MAX_MEASUREMENTS or out_of_time()

    def measured(neurons: Sequence[Neuron]) -> Effect:
        nonlocal count
        count += 1
        return measure(neurons)

    def is_allowed(effect: Effect) -> bool:
        return max_change is None or effect.change <= max_change

    curve = [measured(ranking[:1])]
    if not is_allowed(curve[0]):
        raise ValueError(
            f"the first neuron alone changes features by {curve[0].change:.2g}: more than max_change={max_change:g}"
        )

    def bisect(low: int, high: int, is_enough: Callable[[Effect], bool]) -> None:
        """Measure the sizes between, towards the first that is enough."""
        while high - low > 1 and not is_over():
            middle = (low + high) // 2
            curve.append(measured(ranking[:middle]))
            low, high = (low, middle) if is_enough(curve[-1]) else (middle, high)

    while curve[-1].neurons < len(ranking) and not is_over():
        curve.append(measured(ranking[: 2 * curve[-1].neurons]))
        before, last = curve[-2:]
        if not is_allowed(last):
            bisect(before.neurons, last.neurons, lambda effect: not is_allowed(effect))
            break
        if before.remaining <= target and before.excess - last.excess < TOLERANCE:
            break
    best = min(filter(is_allowed, curve), key=lambda effect: (max(effect.remaining, target), effect.excess))

    def is_as_good(effect: Effect) -> bool:
        removes_as_much = effect.remaining <= max(target, best.remaining) and effect.excess <= best.excess + TOLERANCE
        return removes_as_much and is_allowed(effect)

    high = min(effect.neurons for effect in curve if is_as_good(effect))
    bisect(max((effect.neurons for effect in curve if effect.neurons < high), default=0), high, is_as_good)
    chosen = min(filter(is_as_good, curve), key=lambda effect: effect.neurons)

    size, kept = chosen.neurons, list(ranking[: chosen.neurons])
    untried = [kept] if len(kept) > 1 else []
    while untried and not is_over():
        chunk = untried.pop()
        without = [neuron for neuron in kept if neuron not in chunk]
        if without and is_as_good(effect := measured(without)):
            kept, chosen = without, effect
        elif len(chunk) > 1:
            untried += [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]  # the worse half first
    return Selection(
        neurons=tuple(kept),
        effect=chosen,
        curve=tuple(sorted(curve, key=lambda effect: effect.neurons)),
        dropped=tuple(neuron for neuron in ranking[:size] if neuron not in kept),
    )
