"""Rank MLP neurons by what they do at outlier tokens, in one pass over images (arXiv 2506.08010, Algorithm 1).

Outlier tokens are known only once the forward has passed the block that shows them; the neurons that make them live
before it. So the pass keeps the *input* of every MLP, four times smaller than its hidden activation, and recomputes
the hidden activation afterwards, at the outlier tokens and a few normal ones only. The cost is about that of the plain
forward, the memory that of one batch.

What is kept are sums over images: those of parts of the images, of several processes or of an interrupted run add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from testreg.families import Block, Mlp, Tower
from testreg.measure.attribution import attribution_of
from testreg.measure.hooks import recorded_norms, recorded_tokens, recording_inputs
from testreg.measure.outliers import Detection, autocast_off, check_finite
from testreg.measure.score import Score
from testreg.neurons import Neuron

NORMAL_TOKENS = 8  # sampled from each image, for comparison
SPARSE = 0.5  # activations below it count as silent for the released code's sparsity filter
SELECTIVE = 0.8  # of a neuron's squared activation at outliers: it does hardly anything elsewhere
MATTERS = 0.1  # of the best score: below it, a neuron's place in the ranking is of no consequence


@dataclass
class Statistics(ABC):
    """Sums over images, apart for two halves of them; those that a score needs are added by a subclass. S = 2 halves, L
    blocks, H neurons, C width.

    What is measured at outliers is the mean over the outliers of an image, summed over the images that have any: images
    count alike, however many outliers they have (Algorithm 1).
    """

    num_with_outliers: Tensor  # (S,), images with an outlier
    num_outliers: Tensor  # (S,)
    num_images: Tensor  # (S,)
    num_patches: Tensor  # (S,)
    of_neurons: ClassVar[tuple[str, ...]]
    """Which of the sums are (S, L, H)."""

    @classmethod
    def zeros(cls, tower: Tower) -> Self:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(cls.of_neurons, (2, tower.depth, tower.mlp_width))
        shapes["direction"] = (2, tower.width)
        return cls(**{each.name: torch.zeros(shapes.get(each.name, (2,))) for each in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __add__(self, other: Self) -> Self:
        mine, theirs = self.tensors(), other.tensors()
        return type(self)(**{name: mine[name] + theirs[name] for name in mine})

    def total(self) -> Self:
        """The sums over all images, without the axis of halves."""
        return type(self)(**{name: value.sum(0) for name, value in self.tensors().items()})

    def half(self, index: int) -> Self:
        """The sums over one half of the images, without the axis of halves."""
        return type(self)(**{name: value[index] for name, value in self.tensors().items()})

    @abstractmethod
    def scores(self, tower: Tower) -> Tensor:
        """The scores (L, H), from sums without the axis of halves."""

    @property
    def selectivity(self) -> Tensor:
        """Shares (L, H) of the neurons' squared activations that are at outliers, in images that have any, from sums
        without the axis of halves; zero where that is not measured."""
        return torch.zeros_like(getattr(self, self.of_neurons[0]))


@dataclass
class AttributionSums(Statistics):
    """For "attribution": what the outliers would lose of their excess norm, to first order, if the neuron behaved at
    them as it does at normal patches, as a share of it, times the share of the neuron's squared activation that is at
    outliers (see `testreg.measure.attribution`).

    It finds neurons that trigger others as well as those that write, and neither those that are busy everywhere nor
    those that fire at outliers because of them.
    """

    share: Tensor  # (S, L, H), share of the outliers' excess norm that is attributed to a neuron
    energy_at_outliers: Tensor  # (S, L, H), squared activation at outliers
    energy: Tensor  # (S, L, H), squared activation at all patches
    of_neurons = ("share", "energy_at_outliers", "energy")

    def scores(self, tower: Tower) -> Tensor:
        return self.selectivity * self.share / self.num_with_outliers.clamp(min=1)

    @property
    def selectivity(self) -> Tensor:
        return self.energy_at_outliers / self.energy.clamp(min=1e-12)


@dataclass
class ActivationSums(Statistics):
    """For "activation": mean |activation| at outliers (Algorithm 1)."""

    magnitude: Tensor  # (S, L, H), |activation| at outliers
    of_neurons = ("magnitude",)

    def scores(self, tower: Tower) -> Tensor:
        return self.magnitude / self.num_with_outliers.clamp(min=1)


@dataclass
class ContributionSums(Statistics):
    """For "contribution": what the neuron adds at outliers, beyond what it adds at normal tokens, along the direction
    in which outliers differ from normal tokens, as a fraction of that difference.

    The shares of all that writes to the residual stream sum to one. Neurons that write elsewhere, or are loud
    everywhere, have none.
    """

    activation: Tensor  # (S, L, H), activation at outliers, with its sign
    normal_activation: Tensor  # (S, L, H), activation summed over sampled normal tokens
    direction: Tensor  # (S, C), mean outlier minus mean normal token, after the detection block
    num_normal: Tensor  # (S,), sampled normal tokens
    of_neurons = ("activation", "normal_activation")

    def scores(self, tower: Tower) -> Tensor:
        with_outliers, num_normal = self.num_with_outliers.clamp(min=1), self.num_normal.clamp(min=1)
        direction = self.direction / with_outliers
        with autocast_off(direction.device):
            along = torch.stack([direction @ _columns(block) for block in tower.blocks])  # (L, H)
        along /= direction.square().sum().clamp(min=1e-12)
        return (self.activation / with_outliers - self.normal_activation / num_normal) * along


SUMS: dict[Score, type[Statistics]] = {
    "attribution": AttributionSums,
    "activation": ActivationSums,
    "contribution": ContributionSums,
}
"""What each score is computed from."""


@torch.no_grad()
def statistics_of(
    tower: Tower,
    images: Tensor,
    numbers: Sequence[int],
    detection: Detection,
    *,
    score: Score,
    sparsity_filter: bool = False,
    seed: int = 0,
    norms: Tensor | None = None,
) -> Statistics:
    """What `score` needs (`SUMS`) of one batch (B, 3, h, w), on the CPU. The images' numbers decide on halves and
    normal tokens.

    Args:
        norms: those of the tokens (L, B, T) after each block, if they are known; "attribution" then runs images with
            outliers alone.

    Raises:
        ValueError: norms are not finite; the model cannot be differentiated, as "attribution" needs.
    """
    which = torch.tensor(numbers, device=tower.device) // 2 % 2
    half = torch.stack([which == 0, which == 1]).float()  # (S, B)
    if score == "attribution":
        return _attribution_statistics(tower, images, half, detection, norms)
    with (
        recorded_norms(tower, images) as block_norms,
        recorded_tokens(tower, images, detection.block) as block_tokens,
        _recorded_mlp_inputs(tower, images, sparsity_filter) as (inputs, sparse),
    ):
        tower.run(images)
    norms = torch.stack(block_norms)
    check_finite(norms, images)
    num_prefix, patches = tower.num_prefix, tower.patches(images)
    norms, tokens = norms[..., : patches.stop], block_tokens[0][:, : patches.stop]  # (L, B, T), (B, T, C)
    include_prefix = score == "activation"  # as in the released code
    outlier = detection.outliers(norms, num_prefix, tower.grid(images), include_prefix=include_prefix)  # (L, B, T)
    detected = outlier[detection.block]
    per_image = detected.sum(-1)  # (B,)

    normal = torch.zeros_like(detected)
    normal[:, patches] = _sample_normal(outlier[..., patches].any(0), numbers, seed)
    image, token = (detected | normal).nonzero(as_tuple=True)  # (n,) each
    at_outliers = half[:, image] * detected[image, token] / per_image[image].clamp(min=1)  # (S, n)
    at_normal = half[:, image] * normal[image, token]
    mean_normal = normal / normal.sum(-1, keepdim=True).clamp(min=1)
    mean_outlier = detected / per_image.clamp(min=1).unsqueeze(-1)
    difference = mean_outlier - mean_normal * (per_image > 0).unsqueeze(-1)  # (B, T)

    statistics = SUMS[score].zeros(tower)
    for i, block in enumerate(tower.blocks):
        hidden = _hidden_at(block, [each[image, token] for each in inputs[i]]).float()  # (n, H), as the model has them
        with autocast_off(norms.device):
            if isinstance(statistics, ActivationSums):
                magnitude = hidden.abs() * torch.cat(sparse[i], -1)[image] if sparsity_filter else hidden.abs()
                statistics.magnitude[:, i] = at_outliers @ magnitude
            elif isinstance(statistics, ContributionSums):
                statistics.activation[:, i] = at_outliers @ hidden
                statistics.normal_activation[:, i] = at_normal @ hidden
    if isinstance(statistics, ContributionSums):
        with autocast_off(norms.device):
            statistics.direction[:] = half @ torch.einsum("bt,btc->bc", difference, tokens.float())
            statistics.num_normal[:] = half @ normal.sum(-1).float()
    _count(statistics, half, detected[:, patches], per_image > 0)
    return statistics


def _attribution_statistics(
    tower: Tower, images: Tensor, half: Tensor, detection: Detection, norms: Tensor | None
) -> Statistics:
    attribution = attribution_of(tower, images, detection, norms=norms)
    statistics = AttributionSums.zeros(tower)
    with autocast_off(tower.device):
        for name in statistics.of_neurons:
            getattr(statistics, name)[:] = torch.einsum("sb,blh->slh", half.cpu(), getattr(attribution, name))
    _count(statistics, half, attribution.outlier[detection.block], attribution.outlier.any(0).any(-1))
    return statistics


def _count(statistics: Statistics, half: Tensor, outlier: Tensor, with_outliers: Tensor) -> None:
    """Fill in the numbers of images and patches, from which patches (B, N) are outliers and which images (B,) count."""
    with autocast_off(outlier.device):
        statistics.num_with_outliers[:] = half @ with_outliers.float()
        statistics.num_outliers[:] = half @ outlier.sum(-1).float()
        statistics.num_images[:] = half.sum(-1)
        statistics.num_patches[:] = half.sum(-1) * outlier.shape[-1]


def _sample_normal(outlier: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Up to NORMAL_TOKENS patches of each image that are outliers (B, N) after no block, as a mask (B, N).

    Each image has its own generator, so that neither batches nor processes change what is sampled.
    """
    generators = (torch.Generator().manual_seed(seed + (number << 32)) for number in numbers)
    order = torch.stack([torch.rand(outlier.shape[1], generator=generator) for generator in generators])
    order = order.to(outlier.device).masked_fill(outlier, -1)
    count = min(NORMAL_TOKENS, outlier.shape[1])
    chosen = torch.zeros_like(outlier).scatter_(1, order.topk(count, dim=1).indices, True)
    return chosen & ~outlier


@contextmanager
def _recorded_mlp_inputs(
    tower: Tower, images: Tensor, sparsity_filter: bool
) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Within the context, a forward records the inputs (B, T, C) of the MLPs of each block.

    Where an MLP is no module, its hidden activation (B, T, H) is recorded instead. With `sparsity_filter`, it is also
    recorded which neurons (B, H) of each MLP are silent on half of an image's tokens.
    """
    inputs: list[list[Tensor]] = [[] for _ in tower.blocks]
    sparse: list[list[Tensor]] = [[] for _ in tower.blocks]
    mlps = [(index, mlp) for index, block in enumerate(tower.blocks) for mlp in block.mlps]

    def record(number: int, tokens: Tensor) -> None:
        index, _ = mlps[number]
        inputs[index].append(tower.arranged(tokens, images))

    def record_sparse(number: int, hidden: Tensor) -> None:
        index, mlp = mlps[number]
        hidden = tower.arranged(hidden, images)[..., mlp.first :]
        sparse[index].append((hidden.abs() < SPARSE).float().mean(1) >= 0.5)

    with (
        recording_inputs([mlp.module or mlp.fc2 for _, mlp in mlps], record),
        recording_inputs([mlp.fc2 for _, mlp in mlps] if sparsity_filter else [], record_sparse),
    ):
        yield inputs, sparse


def _hidden_at(block: Block, selected: Sequence[Tensor]) -> Tensor:
    """Hidden activations (n, H) of a block at n tokens, from the inputs (n, C) of each of its MLPs."""
    return torch.cat([_mlp_hidden_at(*each) for each in zip(block.mlps, selected, strict=True)], -1)


def _mlp_hidden_at(mlp: Mlp, selected: Tensor) -> Tensor:
    """Hidden activations (n, H) of one MLP: the input of its second linear when it is run."""
    if mlp.module is None:
        return selected[:, mlp.first :]
    kept: list[Tensor] = []
    with recording_inputs([mlp.fc2], lambda index, hidden: kept.append(hidden)):
        mlp.module(selected.unsqueeze(0))
    return kept[0].squeeze(0)


# From sums to a ranking -----------------------------------------------------------------------------------------------


def _columns(block: Block) -> Tensor:
    """What one unit of each neuron's activation adds to the residual stream, (C, H), LayerScale included."""
    columns = []
    for mlp in block.mlps:
        scale = 1.0 if mlp.scale is None else mlp.scale.detach().float().unsqueeze(-1)
        written = mlp.columns.detach()
        if type(written).dequantize is not Tensor.dequantize:  # torchao's weights take part in no arithmetic
            written = written.dequantize()
        columns.append(written.float() * scale)
    return torch.cat(columns, -1).cpu()


def best(
    scores: Tensor, last: int, count: int, *, at_least: float = 0.0, without: Collection[Neuron] = ()
) -> tuple[Neuron, ...]:
    """The best `count` neurons of the blocks up to `last`, by scores (L, H), that are positive.

    Args:
        at_least: leave out those with less than this fraction of the best score.
        without: neurons that are left out, whatever they score.
    """
    scores = scores.clone()
    for block, unit, _ in without:
        scores[block, unit] = 0.0
    values, order = scores[: last + 1].flatten().sort(descending=True, stable=True)
    keep = int(((values > 0) & (values >= at_least * values[0])).sum().clamp(max=count))
    width = scores.shape[1]
    return tuple(
        (index // width, index % width, value)
        for index, value in zip(order[:keep].tolist(), values[:keep].tolist(), strict=True)
    )


def overlap(first: Tensor, second: Tensor, last: int, count: int | None = None) -> tuple[float, int]:
    """How far two rankings, by scores (L, H) of disjoint images, agree on which neurons are the best.

    Returns:
        The share of the best n neurons, by both together, that a ranking has among its best 2n, in the mean: neurons
        that score nearly alike change places whatever the images. And n: `count`, or those that score a tenth of the
        best.
    """
    mean = (first + second) / 2
    if count is None:
        largest = mean[: last + 1].max()
        count = int((mean[: last + 1] >= MATTERS * largest).sum()) if largest > 0 else 1
    together = {neuron[:2] for neuron in best(mean, last, count)}
    common = [together & {neuron[:2] for neuron in best(each, last, 2 * count)} for each in (first, second)]
    return sum(map(len, common)) / (2 * count), count
