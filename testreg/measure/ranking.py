"""Rank MLP neurons by what they do at outliers, in one pass over images (arXiv 2506.08010, Algorithm 1).

*Outliers* are patch tokens with huge norms. A *neuron* is an input channel of an MLP's second linear; its activation is
the value of this channel at a token.

Which tokens are outliers is known only after the detection block has run, the block after which they are detected. But
the neurons that cause them are in this block and in earlier ones. So the pass (of the scores "activation" and
"contribution"; "attribution" has `testreg.measure.attribution`) keeps the input of every MLP, which is four times
smaller than its hidden activations. It recomputes the hidden activations afterwards, only at the outliers and at a few
normal tokens. This takes about the time of a forward, and the memory of one batch.

Only sums over images are kept (`Statistics`). So the sums of several processes, or of an interrupted run and its
continuation, can be added up.
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

NORMAL_TOKENS = 8  # how many normal tokens are sampled from each image, to compare outliers with
SPARSE = 0.5  # the paper's released code takes an activation for silent if its magnitude is below this
SELECTIVE = 0.8  # a neuron is selective if at least this share of its squared activation is at outliers
RELEVANT_SHARE = 0.1  # a neuron is relevant if it has at least this share of the best score


@dataclass
class Statistics(ABC):
    """Sums over images, for each half of the images apart. A subclass for each score adds the sums that it needs.

    What is measured at outliers (but energies) is first averaged over the outliers of an image, and then summed over
    the images with outliers. So each image counts once, however many outliers it has (Algorithm 1).

    Shapes: S = 2 halves, L blocks, H neurons, C width. `total` and `half` return sums without the dimension S.
    """

    num_with_outliers: Tensor  # (S,), how many images have outliers
    num_outliers: Tensor  # (S,)
    num_images: Tensor  # (S,)
    num_patches: Tensor  # (S,)
    per_neuron: ClassVar[tuple[str, ...]]
    """The names of the sums that have a value for each neuron, (S, L, H)."""

    @classmethod
    def zeros(cls, tower: Tower) -> Self:
        """The sums over no images."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(cls.per_neuron, (2, tower.depth, tower.mlp_width))
        shapes["direction"] = (2, tower.width)
        return cls(**{each.name: torch.zeros(shapes.get(each.name, (2,))) for each in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __add__(self, other: Self) -> Self:
        ours, theirs = self.tensors(), other.tensors()
        return type(self)(**{name: ours[name] + theirs[name] for name in ours})

    def total(self) -> Self:
        """The sums over all images, without the dimension S."""
        return type(self)(**{name: value.sum(0) for name, value in self.tensors().items()})

    def half(self, index: int) -> Self:
        """The sums over one half of the images, without the dimension S."""
        return type(self)(**{name: value[index] for name, value in self.tensors().items()})

    @abstractmethod
    def scores(self, tower: Tower) -> Tensor:
        """The scores (L, H) of the neurons. The sums must have no dimension S."""

    @property
    def selectivity(self) -> Tensor:
        """The share (L, H) of each neuron's squared activation that is at outliers, in images that have outliers.

        It is zero where it is not measured. The sums must have no dimension S.
        """
        return torch.zeros_like(getattr(self, self.per_neuron[0]))


@dataclass
class AttributionSums(Statistics):
    """The sums for the score "attribution": the share of the outliers' excess norm that a neuron causes, times its
    selectivity.

    The excess norm is how far the norms of outliers are above normal. A neuron's share of it is what outliers would
    lose, to first order, if the neuron were as active at them as at normal patches (see `testreg.measure.attribution`).
    Neurons score high if they write the outliers, or trigger the neurons that write them. Neurons score low if they are
    active everywhere, or fire only because there are outliers.
    """

    share: Tensor  # (S, L, H), the share of the outliers' excess norm that is attributed to a neuron
    energy_at_outliers: Tensor  # (S, L, H), the squared activation, summed over outliers
    energy: Tensor  # (S, L, H), the squared activation, summed over all patches
    per_neuron = ("share", "energy_at_outliers", "energy")

    def scores(self, tower: Tower) -> Tensor:
        return self.selectivity * self.share / self.num_with_outliers.clamp(min=1)

    @property
    def selectivity(self) -> Tensor:
        return self.energy_at_outliers / self.energy.clamp(min=1e-12)


@dataclass
class ActivationSums(Statistics):
    """The sums for the score "activation": the mean |activation| at outliers (Algorithm 1)."""

    magnitude: Tensor  # (S, L, H), the |activation| at outliers
    per_neuron = ("magnitude",)

    def scores(self, tower: Tower) -> Tensor:
        return self.magnitude / self.num_with_outliers.clamp(min=1)


@dataclass
class ContributionSums(Statistics):
    """The sums for the score "contribution": the fraction of the difference between outliers and normal tokens that a
    neuron writes.

    The difference is the mean outlier minus the mean normal token, after the detection block. The score is what the
    neuron adds along its direction, more at outliers than at normal tokens, divided by the length of the difference. So
    the scores of everything that writes to the residual stream sum to one. A neuron scores zero if it writes in another
    direction, or is as active at normal tokens.
    """

    activation: Tensor  # (S, L, H), the activation at outliers, with its sign
    normal_activation: Tensor  # (S, L, H), the activation, summed over sampled normal tokens
    direction: Tensor  # (S, C), the mean outlier minus the mean normal token, after the detection block
    num_normal: Tensor  # (S,), how many normal tokens were sampled
    per_neuron = ("activation", "normal_activation")

    def scores(self, tower: Tower) -> Tensor:
        with_outliers, num_normal = self.num_with_outliers.clamp(min=1), self.num_normal.clamp(min=1)
        direction = self.direction / with_outliers
        with autocast_off(direction.device):
            along = torch.stack([direction @ _write_directions(block) for block in tower.blocks])  # (L, H)
        along /= direction.square().sum().clamp(min=1e-12)
        return (self.activation / with_outliers - self.normal_activation / num_normal) * along


SUMS: dict[Score, type[Statistics]] = {
    "attribution": AttributionSums,
    "activation": ActivationSums,
    "contribution": ContributionSums,
}
"""For each score, the class of the sums that it is computed from."""


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
    """The sums that `score` needs (`SUMS`), over a batch of images (B, 3, h, w); they are on the CPU.

    Args:
        numbers: the number of each image. It decides to which half the image belongs, and which of its normal tokens
            are sampled.
        norms: the norms (L, B, T) of the tokens after each block, if they are known. The score "attribution" then runs
            only the images that have outliers; the other scores do not use them.

    Raises:
        ValueError: norms are not finite; the model cannot be differentiated, as "attribution" needs.
    """
    # Among the first images, only those with even numbers rank neurons. So halving the number divides them evenly.
    half_of_image = torch.tensor(numbers, device=tower.device) // 2 % 2
    in_half = torch.stack([half_of_image == 0, half_of_image == 1]).float()  # (S, B), 1 where an image is in a half
    if score == "attribution":
        return _attribution_statistics(tower, images, in_half, detection, norms)
    with (
        recorded_norms(tower, images) as block_norms,
        recorded_tokens(tower, images, detection.block) as block_tokens,
        _recorded_mlp_inputs(tower, images, sparsity_filter) as (inputs, is_sparse),
    ):
        tower.run(images)
    norms = torch.stack(block_norms)
    check_finite(norms, images)
    num_prefix, patches = tower.num_prefix, tower.patches(images)
    norms, tokens = norms[..., : patches.stop], block_tokens[0][:, : patches.stop]  # (L, B, T), (B, T, C)
    include_prefix = score == "activation"  # prefix tokens may be outliers, as in the paper's released code
    outlier = detection.outliers(norms, num_prefix, tower.grid(images), include_prefix=include_prefix)  # (L, B, T)
    detected = outlier[detection.block]  # (B, T)
    num_detected = detected.sum(-1)  # (B,)

    normal = torch.zeros_like(detected)
    normal[:, patches] = _sample_normal(outlier[..., patches].any(0), numbers, seed)
    image, token = (detected | normal).nonzero(as_tuple=True)  # (n,) each, of the n tokens that are looked at
    # Weights by which activations are summed: at outliers, and at normal tokens.
    at_outliers = in_half[:, image] * detected[image, token] / num_detected[image].clamp(min=1)  # (S, n)
    at_normal = in_half[:, image] * normal[image, token]  # (S, n)
    # Weights by which tokens are summed to the mean outlier minus the mean normal token of an image.
    of_mean_normal = normal / normal.sum(-1, keepdim=True).clamp(min=1)
    of_mean_outlier = detected / num_detected.clamp(min=1).unsqueeze(-1)
    of_difference = of_mean_outlier - of_mean_normal * (num_detected > 0).unsqueeze(-1)  # (B, T)

    statistics = SUMS[score].zeros(tower)
    for i, block in enumerate(tower.blocks):
        hidden = _hidden_at(block, [each[image, token] for each in inputs[i]]).float()  # (n, H)
        with autocast_off(norms.device):
            if isinstance(statistics, ActivationSums):
                magnitude = hidden.abs() * torch.cat(is_sparse[i], -1)[image] if sparsity_filter else hidden.abs()
                statistics.magnitude[:, i] = at_outliers @ magnitude
            elif isinstance(statistics, ContributionSums):
                statistics.activation[:, i] = at_outliers @ hidden
                statistics.normal_activation[:, i] = at_normal @ hidden
    if isinstance(statistics, ContributionSums):
        with autocast_off(norms.device):
            statistics.direction[:] = in_half @ torch.einsum("bt,btc->bc", of_difference, tokens.float())
            statistics.num_normal[:] = in_half @ normal.sum(-1).float()
    _fill_counts(statistics, in_half, detected[:, patches], num_detected > 0)
    return statistics


def _attribution_statistics(
    tower: Tower, images: Tensor, in_half: Tensor, detection: Detection, norms: Tensor | None
) -> Statistics:
    """The sums for the score "attribution", over a batch of images."""
    attribution = attribution_of(tower, images, detection, norms=norms)
    statistics = AttributionSums.zeros(tower)
    with autocast_off(tower.device):
        for name in statistics.per_neuron:
            getattr(statistics, name)[:] = torch.einsum("sb,blh->slh", in_half.cpu(), getattr(attribution, name))
    _fill_counts(statistics, in_half, attribution.outlier[detection.block], attribution.outlier.any(0).any(-1))
    return statistics


def _fill_counts(statistics: Statistics, in_half: Tensor, outlier: Tensor, has_outliers: Tensor) -> None:
    """Fill in how many images and patches there are, and how many have or are outliers.

    Args:
        in_half: 1 where an image is in a half, (S, B).
        outlier: whether a patch is an outlier after the detection block, (B, N).
        has_outliers: whether an image counts as one with outliers, (B,).
    """
    with autocast_off(outlier.device):
        statistics.num_with_outliers[:] = in_half @ has_outliers.float()
        statistics.num_outliers[:] = in_half @ outlier.sum(-1).float()
        statistics.num_images[:] = in_half.sum(-1)
        statistics.num_patches[:] = in_half.sum(-1) * outlier.shape[-1]


def _sample_normal(outlier: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Sample up to `NORMAL_TOKENS` patches of each image that are no outliers, as a mask like `outlier` (B, N).

    Each image has a random generator with a seed of its own, so the sample depends neither on batches nor on processes.
    """
    generators = (torch.Generator().manual_seed(seed + (number << 32)) for number in numbers)
    random = torch.stack([torch.rand(outlier.shape[1], generator=generator) for generator in generators])
    random = random.to(outlier.device).masked_fill(outlier, -1)  # so that outliers come last
    count = min(NORMAL_TOKENS, outlier.shape[1])
    sampled = torch.zeros_like(outlier).scatter_(1, random.topk(count, dim=1).indices, True)
    return sampled & ~outlier


@contextmanager
def _recorded_mlp_inputs(
    tower: Tower, images: Tensor, sparsity_filter: bool
) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Within the context, a forward fills two lists, which have a list for each block with a tensor for each MLP.

    The first has the inputs (B, T, C) of the MLPs. If an MLP is no module of its own, its hidden activations (B, T, H)
    take the place of its input. The second is filled with `sparsity_filter` alone: it tells whether a neuron is silent
    at half of an image's tokens or more, (B, H).
    """
    inputs: list[list[Tensor]] = [[] for _ in tower.blocks]
    is_sparse: list[list[Tensor]] = [[] for _ in tower.blocks]
    mlps = [(index, mlp) for index, block in enumerate(tower.blocks) for mlp in block.mlps]

    def record(number: int, tokens: Tensor) -> None:
        index, _ = mlps[number]
        inputs[index].append(tower.arranged(tokens, images))

    def record_sparse(number: int, hidden: Tensor) -> None:
        index, mlp = mlps[number]
        hidden = tower.arranged(hidden, images)[..., mlp.first :]
        is_sparse[index].append((hidden.abs() < SPARSE).float().mean(1) >= 0.5)

    with (
        recording_inputs([mlp.module or mlp.fc2 for _, mlp in mlps], record),
        recording_inputs([mlp.fc2 for _, mlp in mlps] if sparsity_filter else [], record_sparse),
    ):
        yield inputs, is_sparse


def _hidden_at(block: Block, selected: Sequence[Tensor]) -> Tensor:
    """The hidden activations (n, H) of a block at n tokens, from the inputs (n, C) of each of its MLPs."""
    return torch.cat([_mlp_hidden_at(*each) for each in zip(block.mlps, selected, strict=True)], -1)


def _mlp_hidden_at(mlp: Mlp, selected: Tensor) -> Tensor:
    """The hidden activations (n, H) of one MLP at n tokens: the input of its second linear when the MLP is run."""
    if mlp.module is None:
        return selected[:, mlp.first :]
    recorded: list[Tensor] = []
    with recording_inputs([mlp.fc2], lambda index, hidden: recorded.append(hidden)):
        mlp.module(selected.unsqueeze(0))
    return recorded[0].squeeze(0)


# From sums to a ranking -----------------------------------------------------------------------------------------------


def _write_directions(block: Block) -> Tensor:
    """The direction in which each neuron writes to the residual stream, (C, H): its column of fc2, times LayerScale."""
    columns = []
    for mlp in block.mlps:
        scale = 1.0 if mlp.scale is None else mlp.scale.detach().float().unsqueeze(-1)
        written = mlp.columns.detach()
        if type(written).dequantize is not Tensor.dequantize:  # torchao's weights support no arithmetic
            written = written.dequantize()
        columns.append(written.float() * scale)
    return torch.cat(columns, -1).cpu()


def best_neurons(
    scores: Tensor, last: int, count: int, *, at_least: float = 0.0, without: Collection[Neuron] = ()
) -> tuple[Neuron, ...]:
    """The best neurons of the blocks up to `last`, best first, by their scores (L, H).

    Args:
        count: how many neurons; fewer are returned if fewer have a positive score.
        at_least: neurons that score less than this fraction of the best score are left out.
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
    """How far two rankings of the neurons in the blocks up to `last` agree on which neurons are the best.

    The best n neurons by the mean of both scores are looked for among the best 2n neurons of each ranking. (2n, because
    neurons with nearly equal scores change places by chance.)

    Args:
        first, second: the scores (L, H) by one half of the images and by the other.
        count: the number n; None takes all relevant neurons, which score at least a tenth of the best.

    Returns:
        The share of the n neurons that are among the 2n, averaged over both rankings; and n.
    """
    mean = (first + second) / 2
    if count is None:
        highest = mean[: last + 1].max()
        count = int((mean[: last + 1] >= RELEVANT_SHARE * highest).sum()) if highest > 0 else 1
    best_by_mean = {neuron[:2] for neuron in best_neurons(mean, last, count)}
    common = [best_by_mean & {neuron[:2] for neuron in best_neurons(each, last, 2 * count)} for each in (first, second)]
    return sum(map(len, common)) / (2 * count), count
