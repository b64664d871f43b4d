"""Planted models: random Vision Transformers in which the register neurons are known, because they were set by hand.

No pretrained weights are needed to show the mechanism, or to test whether calibration finds its cause. The weights of
a randomly initialised model are edited so that, as in large pretrained models,

- channel 0 of the residual stream holds a patch's brightness, the others its texture. The norm in front of the MLP
  turns that into a detector of bright, featureless patches: what little texture there is makes channel 0 stand out;
- a few neurons of a middle block fire above a threshold of that channel, and all write one direction, far longer than
  a normal token. A third of them may lie in the block before, and do the same to dark patches;
- in later blocks half of the heads attend to that direction from everywhere.

Five decoys can be planted too. No outlier is their doing, but each looks like a register neuron to some score:

- `loud` is large on every token, and writes little;
- `idle` fires at the bright outliers, and writes nothing;
- `companion` fires with the planted neurons, and writes up to half of what a normal one has, in its own direction;
- `echo`, in the block behind the first outliers, fires because of them, and writes far more than a normal token has,
  but across their direction, so that they hardly grow;
- `trap`, in block 0, tells how bright the brighter third of the patches is. It is loudest at those that become
  outliers; to move it takes from the others what they hold.

And a position may be an artefact: its embedding makes the patch there an outlier in every image, without any neuron.

A planted model is a synthetic one: it proves the mechanics, not that patching helps a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from testreg.families import Tower, find_part, find_tower
from testreg.measure.outliers import token_norms

SINK_LOGIT = 8.0  # attention logit of an outlier, above that of normal tokens
ACTIVATION = 4.0  # of a neuron of gain 1 at the outliers, on average
SILENT = -10.0  # a bias with which a neuron never fires
LOUD_ACTIVATION = 30.0
TRAP_FRACTION = 1 / 3
# What decoys write, in norms of a normal token; of companion and trap, at the patch where they are loudest, since
# they would make outliers themselves if they wrote more. The echo: in norms of an outlier.
LOUD, COMPANION, TRAP, ECHO = 0.2, 1.0, 0.5, 0.3


class Parts(NamedTuple):
    """Where a family's blocks keep what planting writes to, as dotted names: the first that exists, where several."""

    fc1: tuple[str, ...]
    query_key: tuple[str, ...]
    """One packed weight (3C, C), or the weights of query and key."""
    num_heads: tuple[str, ...]


_TIMM = Parts(("mlp.fc1",), ("attn.qkv.weight",), ("attn.num_heads",))
_CLIP = Parts(("mlp.fc1",), ("self_attn.q_proj.weight", "self_attn.k_proj.weight"), ("self_attn.num_heads",))
_VIT = Parts(
    ("mlp.fc1", "intermediate.dense"),  # the latter, here and below, in transformers 4
    (
        *("attention.q_proj.weight", "attention.k_proj.weight"),
        *("attention.attention.query.weight", "attention.attention.key.weight"),
    ),
    (
        *("attention.num_attention_heads", "attention.num_heads"),
        "attention.attention.num_attention_heads",
    ),
)
PARTS = {
    "timm VisionTransformer": _TIMM,
    "timm Eva": _TIMM,
    "transformers ViT": _VIT,
    "transformers DeiT": _VIT,
    "transformers Dinov2": _VIT,
    "transformers Dinov2WithRegisters": _VIT,
    "transformers DINOv3ViT": _VIT._replace(fc1=("mlp.up_proj",)),
    "transformers CLIP": _CLIP,
    "transformers SigLIP": _CLIP,
    "open_clip VisionTransformer": Parts(("mlp.c_fc",), ("attn.in_proj_weight",), ("attn.num_heads",)),
    "torchvision VisionTransformer": Parts(
        ("mlp.0",), ("self_attention.in_proj_weight",), ("self_attention.num_heads",)
    ),
}
"""By the name of the family."""


@dataclass(frozen=True)
class Planted:
    """What was planted."""

    neurons: dict[int, list[int]]
    named_decoys: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Block and unit of each."""

    @property
    def decoys(self) -> dict[int, list[int]]:
        units: dict[int, list[int]] = {}
        for block, unit in self.named_decoys.values():
            units.setdefault(block, []).append(unit)
        return units


@torch.no_grad()
def plant(
    model: nn.Module,
    images: Tensor,
    *,
    block: int | None = None,
    num_neurons: int = 6,
    two_blocks: bool = False,
    outlier_fraction: float = 0.02,
    norm_ratio: float = 20.0,
    decoys: bool = False,
    fixed_position: tuple[int, int] | None = None,
    seed: int = 0,
) -> Planted:
    """Plant register neurons into a randomly initialised `model`, in place.

    Args:
        images: (B, 3, h, w), preprocessed for the model; they set the detectors' thresholds.
        block: the one that makes the outliers; None for the one in the middle.
        num_neurons: 0 for a model without outliers; it may have decoys.
        two_blocks: a third of the neurons are in the block before, and make a third of the outliers.
        outlier_fraction: share of the images' patches that become outliers.
        norm_ratio: norm of an outlier over the median norm. Above 3 * num_neurons or so, each neuron by itself makes
            an outlier, so that none can be left out of a patch.
        decoys: also plant the five decoys.
        fixed_position: row and column of a patch whose position embedding makes it an outlier.

    Raises:
        ValueError: too few blocks; a family that `PARTS` does not list, or an MLP without a first linear of the hidden
            width (SwiGLU); a `fixed_position` without a learned position embedding, or with a norm behind it, which
            takes its length away (CLIP).
    """
    tower = find_tower(model)
    block = tower.depth // 2 if block is None else block
    if not 0 < block < tower.depth - 1:
        raise ValueError(f"block must leave one before and one after it, got {block} of {tower.depth} blocks")
    if two_blocks and num_neurons < 2:
        raise ValueError(f"one neuron a block is the least, got {num_neurons} for two blocks")
    if tower.family.name not in PARTS:
        raise ValueError(f"planting does not know {tower.family.name}: it needs a row in PARTS")
    parts = PARTS[tower.family.name]
    mlps = [_Mlp.of(tower, parts, index) for index in range(tower.depth)]
    if not isinstance(tower.embedding, nn.Conv2d):
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    for scale in (mlp.scale for each in tower.blocks for mlp in each.mlps if mlp.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower.embedding, images, generator)
    direction, *others = _directions(6, tower.embedding.out_channels, generator)  # (C,) each
    loud, companion, echo, trap, position = others
    if fixed_position is not None:
        _raise_position(tower, images, fixed_position, norm_ratio * position)

    num_dark = max(1, num_neurons // 3) if two_blocks else 0
    free = [_shuffled(tower.mlp_width, generator) for _ in mlps]
    bright = [next(free[block]) for _ in range(num_neurons - num_dark)]
    dark = [next(free[block - 1]) for _ in range(num_dark)]
    behind = block if two_blocks else block + 1
    homes = {"loud": block, "idle": block, "companion": block, "echo": behind, "trap": 0} if decoys else {}
    named = {name: (index, next(free[index])) for name, index in homes.items()}
    for index, unit in [*((block, unit) for unit in bright), *((block - 1, unit) for unit in dark), *named.values()]:
        mlps[index].set(unit)  # silent, so that detectors are measured without those that are planted later

    if decoys:
        seen = _look(tower, mlps, 0, images)
        reads, bias = seen.detector(TRAP_FRACTION)
        mlps[0].set(named["trap"][1], reads, bias, TRAP * seen.norm / seen.loudest(reads, bias) * trap)
    if dark:
        seen = _look(tower, mlps, block - 1, images, sign=-1)
        reads, bias = seen.detector(outlier_fraction / 3)
        _plant_group(mlps[block - 1], dark, reads, bias, norm_ratio * seen.norm * direction, generator)
    seen = _look(tower, mlps, block, images)
    reads, bias = seen.detector(outlier_fraction * (2 / 3 if dark else 1))
    _plant_group(mlps[block], bright, reads, bias, norm_ratio * seen.norm * direction, generator)
    if decoys:
        mlps[block].set(named["loud"][1], bias=LOUD_ACTIVATION, writes=LOUD * seen.norm / LOUD_ACTIVATION * loud)
        mlps[block].set(named["idle"][1], 2 * reads, 2 * bias)
        writes = COMPANION * seen.norm / seen.loudest(reads, bias) * companion
        mlps[block].set(named["companion"][1], reads, bias, writes)
        # The norm in front brings an outlier, which is almost all `direction`, to sqrt(C) * direction; a patch at the
        # limit, of twice the normal norm, to 0.9 of that. It must not become an outlier by the echo.
        reads = 10 * ACTIVATION / math.sqrt(len(direction)) * direction
        writes = ECHO * norm_ratio * seen.norm / ACTIVATION * echo
        mlps[behind].set(named["echo"][1], reads, -9 * ACTIVATION, writes)
    if num_neurons:
        for each in tower.blocks[block + 1 :]:
            _attend(each.module, parts, direction)
    return Planted(({block - 1: dark} if dark else {}) | ({block: bright} if bright else {}), named)


@dataclass(frozen=True)
class _Mlp:
    """Of one block, where neurons are set."""

    module: nn.Module
    fc1: nn.Linear
    columns: Tensor  # (C, H)

    @classmethod
    def of(cls, tower: Tower, parts: Parts, index: int) -> _Mlp:
        block = tower.blocks[index]
        fc1, mlp = find_part(block.module, parts.fc1), block.mlps[0]
        if fc1 is None or fc1.out_features != tower.mlp_width or mlp.module is None:
            raise ValueError(f"planting needs a plain MLP, which {type(block.module).__name__} has not")
        return cls(mlp.module, fc1, mlp.columns)

    def set(
        self, unit: int, reads: Tensor | float = 0.0, bias: Tensor | float = SILENT, writes: Tensor | float = 0.0
    ) -> None:
        """A neuron that is the activation of reads @ input + bias, and adds so many times `writes`."""
        self.fc1.weight[unit] = reads
        self.fc1.bias[unit] = bias
        self.columns[:, unit] = writes


@dataclass(frozen=True)
class _Seen:
    """What an MLP sees of brightness, or of darkness: then `sign` is -1."""

    brightness: Tensor  # (B * N,), sign * channel 0 of its input
    norm: Tensor  # the median one of a patch behind its block
    sign: int
    width: int

    def detector(self, fraction: float) -> tuple[Tensor, Tensor]:
        """Weights (C,) and bias of a neuron that fires at that fraction of the patches, on average at ACTIVATION."""
        threshold = self.brightness.quantile(1 - fraction)
        steepness = ACTIVATION / (self.brightness[self.brightness > threshold].mean() - threshold)
        reads = torch.zeros(self.width)
        reads[0] = self.sign * steepness
        return reads, -steepness * threshold

    def loudest(self, reads: Tensor, bias: Tensor) -> Tensor:
        """The largest activation of such a neuron."""
        return reads[0].abs() * self.brightness.max() + bias


def _look(tower: Tower, mlps: list[_Mlp], index: int, images: Tensor, sign: int = 1) -> _Seen:
    inputs: list[Tensor] = []
    record = lambda module, args: inputs.append(tower.batch_first(args[0]).float())
    with mlps[index].module.register_forward_pre_hook(record):
        norms = token_norms(tower, images)[index, :, tower.num_prefix :]
    patches = inputs[0][:, tower.num_prefix :]  # (B, N, C)
    return _Seen(sign * patches[..., 0].flatten(), norms.median(), sign, patches.shape[-1])


def _plant_group(
    mlp: _Mlp, units: list[int], reads: Tensor, bias: Tensor, writes: Tensor, generator: torch.Generator
) -> None:
    """Neurons that together add `writes` (C,) to the tokens at which they fire."""
    for unit in units:
        gain = float(0.75 + 0.5 * torch.rand((), generator=generator))  # so that no two neurons score alike
        mlp.set(unit, gain * reads, gain * bias, writes / (ACTIVATION * len(units)))


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    return iter(torch.randperm(count, generator=generator).tolist())


def _separate_brightness(embedding: nn.Conv2d, images: Tensor, generator: torch.Generator) -> None:
    """Channel 0 of the patch embedding sees the mean of the pixels, the others filters of zero mean."""
    weight = embedding.weight  # (C, 3, p, p)
    filters = torch.randn(weight.shape, generator=generator)
    filters -= filters.mean((2, 3), keepdim=True)
    filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
    filters[0] = 1.0 / filters[0].numel()
    weight.copy_(filters)
    # Texture must be far above what random blocks and positions add to it, and must make no outlier by itself. The
    # norm in front of the blocks sees to the latter, where there is one; else all tokens get a share of the norm, and
    # only the richest texture has as much.
    tokens = nn.functional.conv2d(images.to(weight), weight, stride=tuple(embedding.stride)).flatten(2)  # (B, C, N)
    scale = 1.0 / tokens[:, 1:].std(1).flatten().quantile(0.5 if embedding.bias is None else 0.99)
    weight[1:] *= scale
    weight[0] *= 2.0 / tokens[:, 0].abs().median()
    if embedding.bias is not None:
        embedding.bias.zero_()
        embedding.bias[1] = len(weight) ** 0.5


def _directions(count: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Random unit vectors (C,), at right angles, that LayerNorm keeps (zero mean) and no detector sees (channel 0 is
    zero)."""
    directions = torch.randn(width, count, generator=generator)
    directions[0] = 0.0
    directions[1:] -= directions[1:].mean(0)
    return list(torch.linalg.qr(directions).Q.T)


def _raise_position(tower: Tower, images: Tensor, position: tuple[int, int], offset: Tensor) -> None:
    """Add `offset` (C,), in norms of a normal token, to the position embedding at a row and column."""
    if tower.entry_norm is not None:
        raise ValueError(f"no position stands out behind the norm in front of the blocks of {tower.family.name}")
    rows, columns = tower.grid(images)
    count, width = rows * columns, len(offset)
    shapes = [(number, width) for number in range(count, count + tower.num_prefix + 1)]
    in_blocks = {id(each) for block in tower.blocks for each in block.module.parameters()}
    tables = [p for p in tower.module.parameters() if p.shape[-2:] in shapes and id(p) not in in_blocks]
    if not tables:
        raise ValueError(f"{tower.family.name} has no position embedding that is learned")
    row, column = position
    norm = token_norms(tower, images)[0, :, tower.num_prefix :].median()
    tables[0][..., row * columns + column - count, :] += norm * offset  # patches come last


def _attend(block: nn.Module, parts: Parts, direction: Tensor) -> None:
    """Make the first half of the heads attend to `direction` from every token."""
    paths = [path for path in parts.query_key if find_part(block, path) is not None]
    weights = [find_part(block, path) for path in paths]
    biases = [find_part(block, path.removesuffix("weight") + "bias") for path in paths]
    width = len(direction)
    if len(paths) == 1:  # packed: rows of query, key, value
        weights = list(weights[0].split(width)[:2])
        biases = list(biases[0].split(width)[:2])
    # The norm in front brings an outlier, which is almost all `direction`, to sqrt(C) * direction. With queries of
    # ones and keys of a * direction, a head of size h and scale h^-0.5 gives it the logit h^0.5 * a * sqrt(C).
    half = width // 2
    head_size = width // find_part(block, parts.num_heads)
    strength = SINK_LOGIT / math.sqrt(head_size * width)
    (query, key), (query_bias, _) = weights, biases
    query[:half] = 0.0
    query_bias[:half] = 1.0
    key[:half] = strength * direction.to(key)
