"""Random Vision Transformers in which the register neurons are known, because they were set by hand.

No pretrained weights are needed to show the mechanism, or to test whether calibration finds its cause. The weights of
a randomly initialised model are edited so that, as in large pretrained models,

- channel 0 of the residual stream holds a patch's brightness, the others its texture. The norm in front of the MLP
  turns that into a detector of bright, featureless patches: what little texture there is makes channel 0 stand out;
- a few neurons of a middle block fire above a threshold of that channel, and all write one direction, far longer than
  a normal token. A third of them may lie in the block before, and do the same to dark patches. That is the mechanism
  `direct`; those of `planting.mechanisms` have triggers that fire so, and amplifiers that read what these write;
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

import torch
from torch import Tensor, nn

from planting.mechanisms import Feature, Mechanism, Planted, Population, Role, Writers, plant_population, populations
from planting.site import ACTIVATION, Neuron, Parts, Site, by_block, detector, silenced, threshold, without
from testreg.families import Tower, find_part
from testreg.measure.hooks import recording_outputs

NORM_RATIO = 20.0  # of the outliers of `direct`, and of a fixed position
# Attention logit of an outlier, above that of normal tokens. With `direct` outliers get all attention of a head; else a
# few get about a fifth, so that a register changes little.
SINK_LOGIT, WEAK_SINK_LOGIT = 8.0, 2.5
LOUD_ACTIVATION = 30.0
TRAP_FRACTION = 1 / 3
# What decoys write, in norms of a normal token; of companion and trap, at the patch where they are loudest, since
# they would make outliers themselves if they wrote more. The echo: in norms of an outlier.
LOUD, COMPANION, TRAP, ECHO = 0.2, 1.0, 0.5, 0.3


@torch.no_grad()
def plant(
    model: nn.Module,
    images: Tensor,
    *,
    mechanism: Mechanism = "direct",
    block: int | None = None,
    num_neurons: int = 6,
    two_blocks: bool = False,
    outlier_fraction: float = 0.02,
    norm_ratio: float | None = None,
    decoys: bool = False,
    fixed_position: tuple[int, int] | None = None,
    seed: int = 0,
) -> Planted:
    """Plant register neurons into a randomly initialised `model`, in place.

    Args:
        images: (B, 3, h, w), preprocessed for the model; they set the detectors' thresholds.
        mechanism: `block`, `num_neurons` and `two_blocks` belong to `direct`. The others, which `planting.mechanisms`
            describes, choose for themselves, by the seed; they need 8 blocks or more.
        block: the one that makes the outliers; None for the one in the middle.
        num_neurons: 0 for a model without outliers; it may have decoys.
        two_blocks: a third of the neurons are in the block before, and make a third of the outliers.
        outlier_fraction: share of the images' patches that become outliers.
        norm_ratio: norm of an outlier over the median norm; None for that of the mechanism, 20 for `direct`. Above
            3 * num_neurons or so, each neuron of `direct` by itself makes an outlier, so that none can be left out.
        decoys: also plant the five decoys.
        fixed_position: row and column of a patch whose position embedding makes it an outlier.

    Raises:
        ValueError: too few blocks; a family that `PARTS` does not list, or an MLP without a first linear of the hidden
            width (SwiGLU); a `fixed_position` without a learned position embedding, or with a norm behind it, which
            takes its length away (CLIP).
    """
    site = Site.of(model, images)
    tower = site.tower
    if tower.embedding is None:
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    if mechanism == "direct":
        home = first_outliers = tower.depth // 2 if block is None else block
        plan = _direct(home, tower.depth, num_neurons, two_blocks, norm_ratio or NORM_RATIO)
    else:
        plan = populations(mechanism, tower.depth, generator, norm_ratio)
        home, first_outliers = plan[0].triggers.block, plan[0].amplifiers[0].block
    for scale in (mlp.scale for each in tower.blocks for mlp in each.mlps if mlp.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower, images, generator)
    directions = _directions(6 if mechanism == "direct" else 9, site.width, generator)  # (C,) each
    outlier, position = directions[0], directions[5]
    written = [(outlier, outlier)] * 2  # by triggers and by amplifiers, of each population
    if mechanism != "direct":
        written = [(directions[6], outlier), (directions[7], directions[8])]
    for marker, outlier_of_it in written:
        if marker is not outlier_of_it:  # no texture has what triggers write
            weight = tower.embedding.weight
            weight -= torch.einsum("c,d,d...->c...", marker, marker, weight)
    if fixed_position is not None:
        _raise_position(site, fixed_position, (norm_ratio or NORM_RATIO) * position)

    free = [_shuffled(tower.mlp_width, generator) for _ in tower.blocks]
    neurons = [population.pick(free) for population in plan]
    behind = first_outliers if two_blocks else first_outliers + 1
    homes = {"loud": home, "idle": home, "companion": home, "echo": behind, "trap": 0} if decoys else {}
    named = {name: (index, next(free[index])) for name, index in homes.items()}
    for neuron in [*(each for own in neurons for each in own), *named.values()]:
        site.set(neuron)  # silent, so that detectors are measured without those that are planted later

    for each in tower.blocks[first_outliers + 1 :] if plan else ():
        _attend(each.module, site.parts, outlier, SINK_LOGIT if mechanism == "direct" else WEAK_SINK_LOGIT)
    if decoys:
        _plant_trap(site, named["trap"], directions[4])
    roles: dict[Neuron, Role] = {}
    for population, own, pair in zip(plan, neurons, written, strict=False):
        with silenced(tower, by_block(roles) if population.alone else {}):
            plant_population(site, population, own, _read, pair, outlier_fraction, generator)
        roles |= own
    if decoys:
        with silenced(tower, by_block(neuron for neuron in roles if neuron[0] >= home)):
            _plant_decoys(site, named, directions, plan, outlier_fraction, norm_ratio or NORM_RATIO)
    return Planted(by_block(neuron for neuron, role in roles.items() if role != "eraser"), named, roles)


def _direct(block: int, depth: int, num_neurons: int, two_blocks: bool, ratio: float) -> tuple[Population, ...]:
    """Neurons that fire at some patches, and make them outliers themselves."""
    if not 0 < block < depth - 1:
        raise ValueError(f"block must leave one before and one after it, got {block} of {depth} blocks")
    if two_blocks and num_neurons < 2:
        raise ValueError(f"one neuron a block is the least, got {num_neurons} for two blocks")
    num_dark = max(1, num_neurons // 3) if two_blocks else 0
    dark = Population(Writers(block - 1, num_dark, ratio), features=("dark",), share=1 / 3, alone=False)
    share = 2 / 3 if two_blocks else 1.0
    bright = Population(Writers(block, num_neurons - num_dark, ratio), share=share, alone=False)
    return tuple(each for each in (dark, bright) if each.triggers.count)


def _read(feature: Feature, inputs: Tensor) -> Tensor:
    """The direction (C,) along which the input of an MLP has it."""
    reads = torch.zeros(inputs.shape[-1])
    reads[0] = 1.0 if feature == "bright" else -1.0
    return reads


def _plant_trap(site: Site, trap: Neuron, direction: Tensor) -> None:
    seen = site.look()
    reads = _read("bright", seen.inputs[0])
    values = seen.inputs[0] @ reads
    reads, bias = detector(values, reads, threshold(values, TRAP_FRACTION))
    loudest = (seen.inputs[0] @ reads).max() + bias
    site.set(trap, reads, bias, TRAP * seen.norms[0].median() / loudest * direction)


def _plant_decoys(
    site: Site,
    named: dict[str, Neuron],
    directions: list[Tensor],
    plan: tuple[Population, ...],
    fraction: float,
    norm_ratio: float,
) -> None:
    """Set all decoys but the trap."""
    outlier, loud, companion, echo, *_ = directions
    home = named["idle"][0]
    seen = site.look()
    inputs, norm = seen.inputs[home], seen.norms[home].median()
    share, one_image_of = (plan[-1].share, plan[0].one_image_of) if plan else (1.0, 1)
    reads = _read("bright", inputs)
    reads, bias = detector(inputs @ reads, reads, threshold(inputs @ reads, fraction * share, one_image_of))
    loudest = (inputs @ reads).max() + bias
    site.set(named["loud"], bias=LOUD_ACTIVATION, writes=LOUD * norm / LOUD_ACTIVATION * loud)
    site.set(named["idle"], 2 * reads, 2 * bias)
    site.set(named["companion"], reads, bias, COMPANION * norm / loudest * companion)
    # The norm in front brings an outlier, which is almost all `outlier`, to sqrt(C) * outlier; a patch at the limit, of
    # twice the normal norm, to 0.9 of that. It must not become an outlier by the echo.
    reads = 10 * ACTIVATION / math.sqrt(site.width) * outlier
    site.set(named["echo"], reads, -9 * ACTIVATION, ECHO * norm_ratio * norm / ACTIVATION * echo)


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    return iter(torch.randperm(count, generator=generator).tolist())


def _separate_brightness(tower: Tower, images: Tensor, generator: torch.Generator) -> None:
    """Channel 0 of the patch embedding sees the mean of the pixels, the others filters of zero mean."""
    embedding = tower.embedding
    assert embedding is not None
    weight = embedding.weight  # (C, 3, p, p), (C, 3, frames, p, p), or of a linear (C, p * p * 3)
    filters = torch.randn(weight.shape, generator=generator)
    filters -= filters.mean(tuple(range(2, weight.ndim)) or 1, keepdim=True)
    filters /= filters.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    filters[0] = 1.0 / filters[0].numel()
    weight.copy_(filters)
    # Texture must be far above what random blocks and positions add to it, and must make no outlier by itself. The
    # norm in front of the blocks sees to the latter, where there is one; else all tokens get a share of the norm, and
    # only the richest texture has as much.
    tokens = _embedded(tower, images)  # (n, C, N)
    scale = 1.0 / tokens[:, 1:].std(1).flatten().quantile(0.5 if embedding.bias is None else 0.99)
    weight[1:] *= scale
    weight[0] *= 2.0 / tokens[:, 0].abs().median()
    if embedding.bias is not None:
        embedding.bias.zero_()
        embedding.bias[1] = len(weight) ** 0.5


def _embedded(tower: Tower, images: Tensor) -> Tensor:
    """What the patch embedding makes of images or clips, without its bias: (n, C, N), of n that it is called with."""
    embedding, found = tower.embedding, list[Tensor]()
    with recording_outputs([embedding], lambda index, output: found.append(output)):
        tower.run(images)
    (output,) = found
    if isinstance(embedding, nn.Linear):
        output = output.transpose(1, 2)
    tokens = output.flatten(2)
    return tokens if embedding.bias is None else tokens - embedding.bias.unsqueeze(-1)


def _directions(count: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Random unit vectors (C,), at right angles, that LayerNorm keeps (zero mean) and no detector sees (channel 0 is
    zero)."""
    directions = torch.randn(width, count, generator=generator)
    directions[0] = 0.0
    directions[1:] -= directions[1:].mean(0)
    return list(torch.linalg.qr(directions).Q.T)


def _raise_position(site: Site, position: tuple[int, int], offset: Tensor) -> None:
    """Add `offset` (C,), in norms of a normal token, to the position embedding at a row and column."""
    tower = site.tower
    if tower.entry_norm is not None:
        raise ValueError(f"no position stands out behind the norm in front of the blocks of {tower.family.name}")
    rows, columns = tower.grid(site.images)
    count, width = rows * columns, len(offset)
    shapes = [(number, width) for number in range(count, count + tower.num_prefix + 1)]
    in_blocks = {id(each) for block in tower.blocks for each in block.module.parameters()}
    tables = [p for p in tower.module.parameters() if p.shape[-2:] in shapes and id(p) not in in_blocks]
    if not tables:
        raise ValueError(f"{tower.family.name} has no position embedding that is learned")
    row, column = position
    norm = site.look().norms[0].median()
    tables[0][..., row * columns + column - count, :] += norm * offset  # patches come last


def _attend(block: nn.Module, parts: Parts, direction: Tensor, logit: float) -> None:
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
    strength = logit / math.sqrt(head_size * width)
    (query, key), (query_bias, _) = weights, biases
    query[:half] = 0.0
    if query_bias is not None:  # VideoMAE of transformers 4 keeps it elsewhere
        query_bias[:half] = 1.0
    key[:half] = strength * direction.to(key)


@torch.no_grad()
def plant_on_register(
    model: nn.Module,
    images: Tensor,
    *,
    register: int = 0,
    block: int | None = None,
    num_neurons: int = 4,
    norm_ratio: float = NORM_RATIO,
    seed: int = 0,
) -> Planted:
    """Plant neurons that make a trained register of a random `model` what outliers are in others, in place.

    They fire at this register alone, and half of the heads of later blocks attend to it from everywhere.

    Args:
        register: its number among the trained registers.
        block, num_neurons, norm_ratio: as in `plant`.

    Raises:
        ValueError: as `plant`; the model has no such register.
    """
    site = Site.of(model, images)
    tower = site.tower
    count, home = tower.num_trained_registers, tower.depth // 2 if block is None else block
    if not 0 <= register < count:
        raise ValueError(f"the model has {count} trained registers, and none with number {register}")
    if not isinstance(tower.embedding, nn.Conv2d):
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    for scale in (mlp.scale for each in tower.blocks for mlp in each.mlps if mlp.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower, images, generator)  # so that no patch is an outlier by itself
    outlier, *own = _directions(1 + count, site.width, generator)
    (tokens,) = (each for each in tower.module.parameters() if each.shape == (1, count, site.width))
    tokens[0] = site.look().norms[0].median() * torch.stack(own)  # a random model has them all alike
    free = _shuffled(tower.mlp_width, generator)
    neurons = [(home, next(free)) for _ in range(num_neurons)]
    for neuron in neurons:
        site.set(neuron)
    seen = site.look()
    inputs, prefix = seen.inputs[home], seen.prefix[home]
    token = tower.num_prefix - count + register
    reads = without(prefix[token], torch.cat([prefix[:token], prefix[token + 1 :]]))
    loudest, at_register = (inputs @ reads).max(), (inputs.mean((0, 1)) + prefix[token]) @ reads
    if at_register <= loudest:
        raise ValueError(f"register {register} does not stand out from the patches in block {home}")
    steepness = 2 * ACTIVATION / (at_register - loudest)
    bias = ACTIVATION - steepness * at_register
    for neuron in neurons:
        writes = norm_ratio * seen.norms[home].median() / (ACTIVATION * num_neurons) * outlier
        site.set(neuron, steepness * reads, bias, writes)
    for each in tower.blocks[home + 1 :]:
        _attend(each.module, site.parts, outlier, SINK_LOGIT)
    return Planted(by_block(neurons))
