"""Planted models: random Vision Transformers in which the register neurons are known, because they were set by hand.

No pretrained weights are needed to show the mechanism, or to test whether calibration finds its cause. The weights of
a randomly initialised model are edited so that, as in large pretrained models,

- channel 0 of the residual stream holds a patch's brightness, the others its texture. The norm in front of the MLP
  turns that into a detector of bright, featureless patches: what little texture there is makes channel 0 stand out;
- a few neurons of a middle block fire above a threshold of that channel, and all write one direction, far longer than
  a normal token;
- in later blocks half of the heads attend to that direction from everywhere.

A planted model is a synthetic one: it proves the mechanics, not that patching helps a trained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from testreg.families import Tower, find_part, find_tower, listed
from testreg.outliers import token_norms

SINK_LOGIT = 8.0  # attention logit of an outlier, above that of normal tokens


@dataclass(frozen=True)
class Planted:
    """What was planted."""

    neurons: dict[int, list[int]]
    decoys: dict[int, list[int]]


@torch.no_grad()
def plant(
    model: nn.Module,
    images: Tensor,
    *,
    layer: int | None = None,
    num_neurons: int = 6,
    outlier_fraction: float = 0.02,
    norm_ratio: float = 10.0,
    decoys: bool = False,
    seed: int = 0,
) -> Planted:
    """Plant register neurons into a randomly initialised `model`, in place.

    Args:
        images: (B, 3, h, w), preprocessed for the model; they set the detector's threshold.
        layer: the block that makes the outliers; None for the one in the middle.
        outlier_fraction: share of the images' patches that become outliers.
        norm_ratio: norm of an outlier over the median norm.
        decoys: also plant a neuron that is loud on every token, and one that fires at the outliers but writes nothing:
            a ranking by activation alone takes them for register neurons.

    Raises:
        ValueError: too few blocks, or an MLP without a first linear of the hidden width (SwiGLU).
    """
    tower = find_tower(model)
    layer = tower.depth // 2 if layer is None else layer
    if not 0 < layer < tower.depth - 1:
        raise ValueError(f"layer must leave a block before and after it, got {layer} of {tower.depth} blocks")
    block = tower.blocks[layer]
    up = find_part(block.module, tower.family.up)
    mlp = block.mlps[0]
    if up is None or up.out_features != tower.mlp_width or mlp.module is None:
        raise ValueError(f"planting needs a plain MLP, which {type(block.module).__name__} has not")
    if not isinstance(tower.embedding, nn.Conv2d):
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    for scale in (each.scale for block in tower.blocks for each in block.mlps if each.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower.embedding, images, generator)

    units = torch.randperm(tower.mlp_width, generator=generator)[: num_neurons + 2 * decoys].tolist()
    planted, extra = units[:num_neurons], units[num_neurons:]
    for unit in units:  # silent, so that the detector is measured without them
        up.weight[unit] = 0.0
        up.bias[unit] = -10.0
        mlp.columns[:, unit] = 0.0

    brightness, norms = _measure(tower, mlp.module, images)
    width = brightness.shape[-1]
    patches = brightness[:, tower.num_prefix :, 0]  # (B, N), channel 0 of the MLP's input
    threshold = patches.flatten().quantile(1 - outlier_fraction)
    steepness = 4.0 / (patches[patches > threshold].mean() - threshold)
    direction = _direction(width, generator)  # (C,)
    length = norm_ratio * norms[layer, :, tower.num_prefix :].median() / (4.0 * num_neurons)
    for unit in planted:
        gain = float(0.75 + 0.5 * torch.rand((), generator=generator))  # so that no two neurons score alike
        up.weight[unit, 0] = gain * steepness
        up.bias[unit] = -gain * steepness * threshold
        mlp.columns[:, unit] = length * direction
    if decoys:
        loud, idle = extra
        up.bias[loud] = 30.0
        mlp.columns[:, loud] = 1e-2 * length * _direction(width, generator)
        up.weight[idle, 0] = 2 * steepness
        up.bias[idle] = -2 * steepness * threshold
    for each in tower.blocks[layer + 1 :]:
        _attend(tower, each.module, direction)
    return Planted({layer: planted}, {layer: extra} if decoys else {})


def _separate_brightness(embedding: nn.Conv2d, images: Tensor, generator: torch.Generator) -> None:
    """Channel 0 of the patch embedding sees the mean of the pixels, the others filters of zero mean."""
    weight = embedding.weight  # (C, 3, p, p)
    filters = torch.randn(weight.shape, generator=generator)
    filters -= filters.mean((2, 3), keepdim=True)
    filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
    filters[0] = 1.0 / filters[0].numel()
    weight.copy_(filters)
    # The texture of a typical patch gets unit variance: far above what random blocks and positions add to it.
    tokens = nn.functional.conv2d(images.to(weight), weight, stride=tuple(embedding.stride)).flatten(2)  # (B, C, N)
    scale = 1.0 / tokens[:, 1:].std(1).median()
    weight[1:] *= scale
    weight[0] *= 2.0 / tokens[:, 0].abs().median()
    if embedding.bias is not None:  # a share that all tokens have, so that texture alone makes no outlier
        embedding.bias.zero_()
        embedding.bias[1] = len(weight) ** 0.5


def _measure(tower: Tower, mlp: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The input (B, T, C) of the MLP, and the norms (L, B, T) of all blocks' outputs."""
    inputs: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(tower.batch_first(args[0])))
    try:
        norms = token_norms(tower, images)
    finally:
        handle.remove()
    return inputs[0].float(), norms


def _direction(width: int, generator: torch.Generator) -> Tensor:
    """A random unit vector (C,) that LayerNorm keeps (zero mean) and the detector does not see (channel 0 is zero)."""
    direction = torch.randn(width, generator=generator)
    direction[0] = 0.0
    direction[1:] -= direction[1:].mean()
    return direction / direction.norm()


def _attend(tower: Tower, block: nn.Module, direction: Tensor) -> None:
    """Make the first half of the heads attend to `direction` from every token."""
    paths = [path for path in listed(tower.family.query_key) if find_part(block, (path,)) is not None]
    weights = [find_part(block, (path,)) for path in paths]
    biases = [find_part(block, (path.removesuffix("weight") + "bias",)) for path in paths]
    width = len(direction)
    if len(paths) == 1:  # packed: rows of query, key, value
        weights = list(weights[0].split(width)[:2])
        biases = list(biases[0].split(width)[:2])
    # The norm in front brings an outlier, which is almost all `direction`, to sqrt(C) * direction. With queries of
    # ones and keys of a * direction, a head of size h and scale h^-0.5 gives it the logit h^0.5 * a * sqrt(C).
    half = width // 2
    head_size = width // find_part(block, tower.family.num_heads)
    strength = SINK_LOGIT / math.sqrt(head_size * width)
    (query, key), (query_bias, _) = weights, biases
    query[:half] = 0.0
    query_bias[:half] = 1.0
    key[:half] = strength * direction.to(key)
