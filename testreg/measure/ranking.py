"""Rank MLP neurons by what they do at outlier tokens, in one pass over images (arXiv 2506.08010, Algorithm 1).

Outlier tokens are known only once the forward has passed the block that shows them; the neurons that make them live
before it. So the pass keeps the *input* of every MLP, four times smaller than its hidden activation, and recomputes
the hidden activation afterwards, at the outlier tokens and a few normal ones only. The cost is about that of the plain
forward, the memory that of one batch.

Only sums over images are kept, so that those of several processes, or of the parts of an interrupted run, add up.
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
SELECTIVE = 0.8  # a neuron is selective if at least this share of its squared activation is at outliers
MATTERS = 0.1  # of the best score: where neurons with less stand in the ranking does not matter


@dataclass
class Statistics(ABC):
    """Sums over each half of the images; a subclass adds those that its score needs.

    A figure of outliers is the mean over the outliers of an image, summed over the images that have any. So each image
    counts once, however many outliers it has (Algorithm 1).

    Shapes: S = 2 halves, L blocks, H neurons, C width.
    """

    num_with_outliers: Tensor  # (S,), images with an outlier
    num_outliers: Tensor  # (S,)
    num_images: Tensor  # (S,)
    num_patches: Tensor  # (S,)
    of_neurons: ClassVar[tuple[str, ...]]
    """The names of the sums that are (S, L, H)."""

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
    """For "attribution": the share of the outliers' excess norm that a neuron makes, times its selectivity.

    The first is the share that outliers would lose, to first order, if the neuron had the activation at them that it
    has at normal patches (see `testreg.measure.attribution`). Neurons score high that write the outliers or trigger
    those that do. Neurons score low that are active everywhere, or that fire because of outliers.
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

    The scores of everything that writes to the residual stream sum to one. Neurons that write in another direction, or
    that are as active at normal tokens, score zero.
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
"""The sums that each score is computed from."""


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
    """The sums that `score` needs (`SUMS`), over one batch (B, 3, h, w), on the CPU.

    Args:
        numbers: one for each image, which decides to which half it belongs and which of its normal tokens are sampled.
        norms: the norms (L, B, T) of the tokens after each block, if they are known; "attribution" then runs only the
            images that have outliers.

    Raises:
        ValueError: norms are not finite; the model cannot be differentiated, as "attribution" needs.
    """
    half_of_image = torch.tensor(numbers, device=tower.device) // 2 % 2
    half = torch.stack([half_of_image == 0, half_of_image == 1]).float()  # (S, B)
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
        hidden = _hidden_at(block, [each[image, token] for each in inputs[i]]).float()  # (n, H)
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
    """Fill in the numbers of images and patches.

    Args:
        half: which half each image belongs to, (S, B).
        outlier: which patches are outliers, (B, N).
        with_outliers: which images have outliers, (B,).
    """
    with autocast_off(outlier.device):
        statistics.num_with_outliers[:] = half @ with_outliers.float()
        statistics.num_outliers[:] = half @ outlier.sum(-1).float()
        statistics.num_images[:] = half.sum(-1)
        statistics.num_patches[:] = half.sum(-1) * outlier.shape[-1]


def _sample_normal(outlier: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Sample up to NORMAL_TOKENS patches of each image, as a mask (B, N), from those that are not outliers (B, N).

    Each image has its own generator, so that the sample depends neither on batches nor on processes.
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
    """The directions (C, H) in which the neurons write to the residual stream: columns of fc2, times LayerScale."""
    columns = []
    for mlp in block.mlps:
        scale = 1.0 if mlp.scale is None else mlp.scale.detach().float().unsqueeze(-1)
        written = mlp.columns.detach()
        if type(written).dequantize is not Tensor.dequantize:  # torchao's weights support no arithmetic
            written = written.dequantize()
        columns.append(written.float() * scale)
    return torch.cat(columns, -1).cpu()


def best(
    scores: Tensor, last: int, count: int, *, at_least: float = 0.0, without: Collection[Neuron] = ()
) -> tuple[Neuron, ...]:
    """The best `count` neurons of the blocks up to `last`, by scores (L, H); fewer if fewer have a positive score.

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
        A share and a number n, which is `count`, or how many neurons score a tenth of the best. The best n neurons by
        both halves together are compared with the best 2n by each half: the share is how many of the n are among these,
        averaged over the halves. (2n, because neurons with nearly equal scores change places by chance.)
    """
    mean = (first + second) / 2
    if count is None:
        largest = mean[: last + 1].max()
        count = int((mean[: last + 1] >= MATTERS * largest).sum()) if largest > 0 else 1
    together = {neuron[:2] for neuron in best(mean, last, count)}
    common = [together & {neuron[:2] for neuron in best(each, last, 2 * count)} for each in (first, second)]
    return sum(map(len, common)) / (2 * count), count
