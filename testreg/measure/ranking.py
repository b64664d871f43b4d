"""Rank MLP neurons by what they do at outlier tokens, in one pass over images (arXiv 2506.08010, Algorithm 1).

Outlier tokens are known only once the forward has passed the block that shows them; the neurons that make them live
before it. So the pass keeps the *input* of every MLP, four times smaller than its hidden activation, and recomputes
the hidden activation afterwards, at the outlier tokens and a few normal ones only. The cost is about that of the plain
forward, the memory that of one batch.

What is kept are sums over images: those of parts of the images, of several processes or of an interrupted run add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from testreg.families import Block, Mlp, Tower
from testreg.measure.hooks import recorded_norms, recorded_tokens, recording_inputs
from testreg.measure.outliers import Detection, check_finite, exactly
from testreg.neurons import Neuron

Score = Literal["contribution", "write", "contrast", "activation"]

NORMAL_TOKENS = 8  # sampled from each image, for comparison
SPARSE = 0.5  # activations below it count as silent for the released code's sparsity filter
MATTERS = 0.1  # of the best score: below it, a neuron's place in the ranking is of no consequence


@dataclass
class Statistics:
    """Sums over images, apart for two halves of them. S = 2 halves, L blocks, H neurons, C width.

    Those at outliers sum, over the images that have any, the image's mean: images count alike, however many outliers
    they have (Algorithm 1).
    """

    magnitude: Tensor  # (S, L, H), mean |activation| at the outliers
    activation: Tensor  # (S, L, H), its mean with sign
    normal_magnitude: Tensor  # (S, L, H), sum over sampled normal tokens
    normal_activation: Tensor  # (S, L, H)
    normal_square: Tensor  # (S, L, H)
    direction: Tensor  # (S, C), mean outlier minus mean normal token, after the detection block
    median_norm: Tensor  # (S, L), of the patches
    num_normal: Tensor  # (S,), as the others
    num_with_outliers: Tensor
    num_outliers: Tensor
    num_images: Tensor
    num_patches: Tensor

    @classmethod
    def zeros(cls, tower: Tower) -> Statistics:
        width = len(tower.blocks[0].mlps[0].columns)
        neurons, blocks = (2, tower.depth, tower.mlp_width), (2, tower.depth)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("magnitude", "activation"), neurons)
        shapes |= dict.fromkeys(("normal_magnitude", "normal_activation", "normal_square"), neurons)
        shapes |= {"direction": (2, width), "median_norm": blocks}
        return cls(**{each.name: torch.zeros(shapes.get(each.name, (2,))) for each in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __add__(self, other: Statistics) -> Statistics:
        mine, theirs = self.tensors(), other.tensors()
        return Statistics(**{name: mine[name] + theirs[name] for name in mine})

    def _over_halves(self, reduce: Callable[[Tensor], Tensor]) -> Statistics:
        return Statistics(**{name: reduce(value) for name, value in self.tensors().items()})

    def total(self) -> Statistics:
        """Without the axis of halves, as in `half`."""
        return self._over_halves(lambda value: value.sum(0))

    def half(self, index: int) -> Statistics:
        return self._over_halves(lambda value: value[index])


@torch.no_grad()
def statistics_of(
    tower: Tower,
    images: Tensor,
    numbers: Sequence[int],
    detection: Detection,
    *,
    sparsity_filter: bool = False,
    include_prefix: bool = False,
    seed: int = 0,
) -> Statistics:
    """The statistics of one batch (B, 3, h, w), on the CPU. The images' numbers decide on halves and normal tokens.

    Raises:
        ValueError: norms are not finite.
    """
    with (
        recorded_norms(tower) as block_norms,
        recorded_tokens(tower, detection.block) as block_tokens,
        _recorded_mlp_inputs(tower, sparsity_filter) as (inputs, sparse),
    ):
        tower.run(images)
    norms, tokens = torch.stack(block_norms), block_tokens[0]  # (L, B, T), (B, T, C)
    check_finite(norms, images)
    grid, num_prefix = tower.grid(images), tower.num_prefix
    norms, tokens = norms[..., : num_prefix + grid[0] * grid[1]], tokens[:, : num_prefix + grid[0] * grid[1]]
    patches = norms[..., num_prefix:]
    outlier = detection.outliers(norms, num_prefix, grid, include_prefix=include_prefix)  # (L, B, T)
    detected = outlier[detection.block]
    numbers_ = torch.tensor(numbers, device=norms.device)
    half = torch.stack([numbers_ // 2 % 2 == 0, numbers_ // 2 % 2 == 1]).float()  # (S, B)
    per_image = detected.sum(-1)  # (B,)

    normal = torch.zeros_like(detected)
    normal[:, num_prefix:] = _sample_normal(outlier[..., num_prefix:].any(0), numbers, seed)
    image, token = (detected | normal).nonzero(as_tuple=True)  # (n,) each
    at_outliers = half[:, image] * detected[image, token] / per_image[image].clamp(min=1)  # (S, n)
    at_normal = half[:, image] * normal[image, token]
    mean_normal = normal / normal.sum(-1, keepdim=True).clamp(min=1)
    contrast = detected / per_image.clamp(min=1).unsqueeze(-1) - mean_normal * (per_image > 0).unsqueeze(-1)  # (B, T)

    statistics = Statistics.zeros(tower)
    for i, block in enumerate(tower.blocks):
        hidden = _hidden_at(block, [each[image, token] for each in inputs[i]]).float()  # (n, H), as the model has them
        magnitude = hidden.abs()
        counted = magnitude * torch.cat(sparse[i], -1)[image] if sparsity_filter else magnitude
        with exactly(norms.device):
            statistics.magnitude[:, i] = at_outliers @ counted
            statistics.activation[:, i] = at_outliers @ hidden
            statistics.normal_magnitude[:, i] = at_normal @ magnitude
            statistics.normal_activation[:, i] = at_normal @ hidden
            statistics.normal_square[:, i] = at_normal @ hidden.square()
    with exactly(norms.device):
        statistics.direction[:] = half @ torch.einsum("bt,btc->bc", contrast, tokens.float())
        statistics.median_norm[:] = half @ patches.median(-1).values.T
        statistics.num_normal[:] = half @ normal.sum(-1).float()
        statistics.num_with_outliers[:] = half @ (per_image > 0).float()
        statistics.num_outliers[:] = half @ detected[:, num_prefix:].sum(-1).float()
        statistics.num_images[:] = half.sum(-1)
        statistics.num_patches[:] = half.sum(-1) * patches.shape[-1]
    return statistics


def _sample_normal(outlier: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """A mask (B, N) of up to NORMAL_TOKENS patches an image that are outliers (B, N) at no block.

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
    tower: Tower, sparsity_filter: bool
) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Inputs (B, T, C) of each block's MLPs; of one that is no module, the hidden activation (B, T, H) itself.

    With `sparsity_filter` also, for each MLP, which neurons (B, H) are silent on half of an image's tokens.
    """
    inputs: list[list[Tensor]] = [[] for _ in tower.blocks]
    sparse: list[list[Tensor]] = [[] for _ in tower.blocks]
    mlps = [(index, mlp) for index, block in enumerate(tower.blocks) for mlp in block.mlps]

    def record(number: int, tokens: Tensor) -> None:
        index, _ = mlps[number]
        inputs[index].append(tower.batch_first(tokens))

    def record_sparse(number: int, hidden: Tensor) -> None:
        index, mlp = mlps[number]
        hidden = tower.batch_first(hidden)[..., mlp.first :]
        sparse[index].append((hidden.abs() < SPARSE).float().mean(1) >= 0.5)

    with (
        recording_inputs([mlp.module or mlp.fc2 for _, mlp in mlps], record),
        recording_inputs([mlp.fc2 for _, mlp in mlps] if sparsity_filter else [], record_sparse),
    ):
        yield inputs, sparse


def _hidden_at(block: Block, selected: Sequence[Tensor]) -> Tensor:
    """Inputs (n, C) of each of the block's MLPs -> hidden activations (n, H)."""
    return torch.cat([_mlp_hidden_at(*each) for each in zip(block.mlps, selected, strict=True)], -1)


def _mlp_hidden_at(mlp: Mlp, selected: Tensor) -> Tensor:
    """The MLP is run, and the input of its second linear kept."""
    if mlp.module is None:
        return selected[:, mlp.first :]
    kept: list[Tensor] = []
    with recording_inputs([mlp.fc2], lambda index, hidden: kept.append(hidden)):
        mlp.module(selected.unsqueeze(0))
    return kept[0].squeeze(0)


# From sums to a ranking -----------------------------------------------------------------------------------------------


def scores(statistics: Statistics, tower: Tower, score: Score) -> Tensor:
    """Scores (L, H) from statistics without the axis of halves.

    - "contribution": what the neuron adds at outliers, beyond what it adds at normal tokens, along the direction in
      which outliers differ from normal tokens, as a fraction of that difference. The shares of all that writes to the
      residual stream sum to one. Neurons that write elsewhere, or are loud everywhere, have none.
    - "write": the norm of what it adds in excess of normal tokens, in any direction, over the block's median norm.
    - "contrast": mean |activation| at outliers less that at normal tokens, in units of the latter's spread.
    - "activation": mean |activation| at outliers (Algorithm 1).
    """
    with_outliers, num_normal = statistics.num_with_outliers.clamp(min=1), statistics.num_normal.clamp(min=1)
    magnitude = statistics.magnitude / with_outliers
    if score == "activation":
        return magnitude
    normal_magnitude = statistics.normal_magnitude / num_normal
    if score == "contrast":
        variance = statistics.normal_square / num_normal - normal_magnitude.square()
        spread = variance.clamp(min=0).sqrt()
        # A neuron that happens to be silent at all sampled tokens has no spread, and would outdo every other.
        return (magnitude - normal_magnitude) / spread.clamp(min=1e-6).maximum(spread.median(-1, keepdim=True).values)
    columns = [_columns(block) for block in tower.blocks]  # (C, H) each
    if score == "write":
        median_norm = statistics.median_norm / statistics.num_images.clamp(min=1)
        norms = torch.stack([each.norm(dim=0) for each in columns])
        return (magnitude - normal_magnitude) * norms / median_norm.unsqueeze(-1)
    direction = statistics.direction / with_outliers
    with exactly(direction.device):
        along = torch.stack([direction @ each for each in columns]) / direction.square().sum().clamp(
            min=1e-12
        )  # (L, H)
    return (statistics.activation / with_outliers - statistics.normal_activation / num_normal) * along


def _columns(block: Block) -> Tensor:
    """(C, H): what one unit of each neuron's activation adds to the residual stream, LayerScale included."""
    columns = []
    for mlp in block.mlps:
        scale = 1.0 if mlp.scale is None else mlp.scale.detach().float().unsqueeze(-1)
        written = mlp.columns.detach()
        if type(written).dequantize is not Tensor.dequantize:  # torchao's weights take part in no arithmetic
            written = written.dequantize()
        columns.append(written.float() * scale)
    return torch.cat(columns, -1).cpu()


def best(scores: Tensor, last: int, count: int, *, at_least: float = 0.0) -> tuple[Neuron, ...]:
    """The best `count` neurons of the blocks up to `last`, by scores (L, H), that are positive.

    Args:
        at_least: leave out those with less than this fraction of the best score.
    """
    values, order = scores[: last + 1].flatten().sort(descending=True, stable=True)
    keep = int(((values > 0) & (values >= at_least * values[0])).sum().clamp(max=count))
    width = scores.shape[1]
    return tuple(
        (index // width, index % width, value)
        for index, value in zip(order[:keep].tolist(), values[:keep].tolist(), strict=True)
    )


def overlap(first: Tensor, second: Tensor, last: int, count: int | None = None) -> tuple[float, int]:
    """How far two rankings, by scores (L, H) of disjoint images, agree: the share of the best that both have.

    Returns:
        The share, and the number of neurons compared: `count`, or those that score a tenth of the best in the mean.
    """
    if count is None:
        mean = (first + second)[: last + 1]
        count = int((mean >= MATTERS * mean.max()).sum()) if mean.max() > 0 else 1
    found = [{neuron[:2] for neuron in best(each, last, count)} for each in (first, second)]
    return len(found[0] & found[1]) / count, count
