"""Plants register neurons into randomly initialised Vision Transformers, by setting weights.

The weights are edited so that, as in large pretrained models:

- Channel 0 of the residual stream holds a patch's brightness, the other channels its texture. After the norm before the
  MLP, channel 0 stands out in bright patches with little texture.
- A few neurons of a middle block fire where that channel is above a threshold, and all write the same vector, which is
  far longer than a normal token. A third of them may be in the block before, and do the same to dark patches. This is
  the mechanism `direct`. In the mechanisms of `planting.mechanisms`, triggers fire in this way, and amplifiers read
  what the triggers write.
- In later blocks, half of the heads attend to the tokens with that vector.

Five decoys can be planted too. They make no outliers, but each looks like a register neuron to some score:

- `loud` has a large activation on every token, and writes little;
- `idle` fires at the bright outliers, and writes nothing;
- `companion` fires together with the planted neurons, and writes a vector of its own, at most as long as a normal
  token;
- `echo`, in the block after the first outliers, fires at outliers and writes a vector far longer than a normal token,
  but orthogonal to the outliers' vector, so that their norm hardly grows;
- `trap`, in block 0, has as activation the brightness of the brighter third of the patches. It is largest at patches
  that become outliers, but moving it takes information from the others.

A fixed position can be made an artefact: its position embedding makes the patch there an outlier in every image,
without any neuron.

A planted model is synthetic: it shows that the mechanics work, not that a patch helps a trained model.
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

NORM_RATIO = 20.0  # norm over the median norm, of the outliers of `direct` and of a fixed position
# Attention logit of an outlier above that of normal tokens. With `direct` (the first), outliers get all attention of a
# head; with other mechanisms about a fifth, so that a register changes little.
SINK_LOGIT, WEAK_SINK_LOGIT = 8.0, 2.5
LOUD_ACTIVATION = 30.0  # of the decoy `loud`
TRAP_FRACTION = 1 / 3  # share of the patches at which `trap` fires
# Length of what decoys write: `loud`, `companion` and `trap` in norms of a normal token, `echo` in norms of an outlier.
# For `companion` and `trap` it is the length where they fire most; with more they would make outliers themselves.
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
        images: preprocessed images (B, 3, h, w), by which thresholds are set.
        mechanism: `direct`, or one of `planting.mechanisms`, which needs 8 blocks or more. `block`, `num_neurons` and
            `two_blocks` are for `direct`; the other mechanisms choose these by the seed.
        block: the block that makes the outliers; None for the one in the middle.
        num_neurons: how many neurons are planted; 0 for a model without outliers, which may have decoys.
        two_blocks: put a third of the neurons into the block before, where they make a third of the outliers.
        outlier_fraction: share of the images' patches that become outliers.
        norm_ratio: norm of an outlier over the median norm; None for the mechanism's default, 20 for `direct`. Above
            about 3 * num_neurons, each neuron of `direct` makes outliers by itself.
        decoys: also plant the five decoys.
        fixed_position: row and column of a patch whose position embedding shall make it an outlier.
        seed: seed of all that is chosen at random.

    Raises:
        ValueError: the model has too few blocks; its family is not in `PARTS`; its MLP has no first linear of the
        hidden
            width (SwiGLU); or a `fixed_position` is given, but the model has no learned position embedding, or a norm
            after it, which would undo it (CLIP).
    """
    site = Site.of(model, images)
    tower = site.tower
    if tower.embedding is None:
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    if mechanism == "direct":
        planted_block = first_outliers = tower.depth // 2 if block is None else block
        plan = _direct(planted_block, tower.depth, num_neurons, two_blocks, norm_ratio or NORM_RATIO)
    else:
        plan = populations(mechanism, tower.depth, generator, norm_ratio)
        planted_block, first_outliers = plan[0].triggers.block, plan[0].amplifiers[0].block
    for scale in (mlp.scale for each in tower.blocks for mlp in each.mlps if mlp.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower, images, generator)
    directions = _directions(6 if mechanism == "direct" else 9, site.width, generator)  # (C,) each
    outlier, position = directions[0], directions[5]
    directions_written = [(outlier, outlier)] * 2  # what triggers and what amplifiers write, for each population
    if mechanism != "direct":
        directions_written = [(directions[6], outlier), (directions[7], directions[8])]
    for marker, outlier_direction in directions_written:
        if marker is not outlier_direction:  # take the marker out of the embedding, so that only triggers write it
            weight = tower.embedding.weight
            weight -= torch.einsum("c,d,d...->c...", marker, marker, weight)
    if fixed_position is not None:
        _raise_position(site, fixed_position, (norm_ratio or NORM_RATIO) * position)

    free = [_shuffled(tower.mlp_width, generator) for _ in tower.blocks]
    neurons = [population.pick(free) for population in plan]
    echo_block = first_outliers if two_blocks else first_outliers + 1
    decoy_blocks = (
        {"loud": planted_block, "idle": planted_block, "companion": planted_block, "echo": echo_block, "trap": 0}
        if decoys
        else {}
    )
    decoys_ = {name: (index, next(free[index])) for name, index in decoy_blocks.items()}
    for neuron in [*(each for population_neurons in neurons for each in population_neurons), *decoys_.values()]:
        site.set(neuron)  # silent at first, so that thresholds are measured without neurons that are set later

    for each in tower.blocks[first_outliers + 1 :] if plan else ():
        _attend(each.module, site.parts, outlier, SINK_LOGIT if mechanism == "direct" else WEAK_SINK_LOGIT)
    if decoys:
        _plant_trap(site, decoys_["trap"], directions[4])
    roles: dict[Neuron, Role] = {}
    for population, population_neurons, pair in zip(plan, neurons, directions_written, strict=False):
        with silenced(tower, by_block(roles) if population.alone else {}):
            plant_population(site, population, population_neurons, _read, pair, outlier_fraction, generator)
        roles |= population_neurons
    if decoys:
        with silenced(tower, by_block(neuron for neuron in roles if neuron[0] >= planted_block)):
            _plant_decoys(site, decoys_, directions, plan, outlier_fraction, norm_ratio or NORM_RATIO)
    return Planted(by_block(neuron for neuron, role in roles.items() if role != "eraser"), decoys_, roles)


def _direct(block: int, depth: int, num_neurons: int, two_blocks: bool, ratio: float) -> tuple[Population, ...]:
    """The populations of `direct`: neurons that fire at some patches, and make them outliers by themselves."""
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
    """The direction (C,) whose product with an input of an MLP tells how much of the feature the patch has."""
    reads = torch.zeros(inputs.shape[-1])
    reads[0] = 1.0 if feature == "bright" else -1.0
    return reads


def _plant_trap(site: Site, trap: Neuron, direction: Tensor) -> None:
    """Set the decoy `trap`."""
    observed = site.observe()
    reads = _read("bright", observed.inputs[0])
    values = observed.inputs[0] @ reads
    reads, bias = detector(values, reads, threshold(values, TRAP_FRACTION))
    loudest = (observed.inputs[0] @ reads).max() + bias
    site.set(trap, reads, bias, TRAP * observed.norms[0].median() / loudest * direction)


def _plant_decoys(
    site: Site,
    decoys_: dict[str, Neuron],
    directions: list[Tensor],
    plan: tuple[Population, ...],
    fraction: float,
    norm_ratio: float,
) -> None:
    """Set all decoys but the trap."""
    outlier, loud, companion, echo, *_ = directions
    planted_block = decoys_["idle"][0]
    observed = site.observe()
    inputs, norm = observed.inputs[planted_block], observed.norms[planted_block].median()
    share, one_image_of = (plan[-1].share, plan[0].one_image_of) if plan else (1.0, 1)
    reads = _read("bright", inputs)
    reads, bias = detector(inputs @ reads, reads, threshold(inputs @ reads, fraction * share, one_image_of))
    loudest = (inputs @ reads).max() + bias
    site.set(decoys_["loud"], bias=LOUD_ACTIVATION, writes=LOUD * norm / LOUD_ACTIVATION * loud)
    site.set(decoys_["idle"], 2 * reads, 2 * bias)
    site.set(decoys_["companion"], reads, bias, COMPANION * norm / loudest * companion)
    # The norm before the MLP maps an outlier, which is almost parallel to `outlier`, to sqrt(C) * outlier, and a patch
    # of twice the normal norm to 0.9 of that. The latter is no outlier, and must not become one by the echo.
    reads = 10 * ACTIVATION / math.sqrt(site.width) * outlier
    site.set(decoys_["echo"], reads, -9 * ACTIVATION, ECHO * norm_ratio * norm / ACTIVATION * echo)


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """The numbers from 0 to count - 1 in random order."""
    return iter(torch.randperm(count, generator=generator).tolist())


def _separate_brightness(tower: Tower, images: Tensor, generator: torch.Generator) -> None:
    """Make channel 0 of the patch embedding the mean of the pixels, and the others random filters of zero mean."""
    embedding = tower.embedding
    assert embedding is not None
    weight = embedding.weight  # (C, 3, p, p), (C, 3, frames, p, p), or of a linear (C, p * p * 3)
    filters = torch.randn(weight.shape, generator=generator)
    filters -= filters.mean(tuple(range(2, weight.ndim)) or 1, keepdim=True)
    filters /= filters.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    filters[0] = 1.0 / filters[0].numel()
    weight.copy_(filters)
    # Texture must be far above what random blocks and positions add, but make no outliers. A norm before the blocks
    # ensures the latter. Without one, a bias gives all tokens a large norm, which texture hardly exceeds.
    tokens = _embedded(tower, images)  # (n, C, N)
    scale = 1.0 / tokens[:, 1:].std(1).flatten().quantile(0.5 if embedding.bias is None else 0.99)
    weight[1:] *= scale
    weight[0] *= 2.0 / tokens[:, 0].abs().median()
    if embedding.bias is not None:
        embedding.bias.zero_()
        embedding.bias[1] = len(weight) ** 0.5


def _embedded(tower: Tower, images: Tensor) -> Tensor:
    """The output of the patch embedding without its bias, (n, C, N), for the n images or frames that it gets."""
    embedding, outputs = tower.embedding, list[Tensor]()
    with recording_outputs([embedding], lambda index, output: outputs.append(output)):
        tower.run(images)
    (output,) = outputs
    if isinstance(embedding, nn.Linear):
        output = output.transpose(1, 2)
    tokens = output.flatten(2)
    return tokens if embedding.bias is None else tokens - embedding.bias.unsqueeze(-1)


def _directions(count: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Random orthonormal vectors (C,) of zero mean, so that LayerNorm keeps them, with 0 in channel 0."""
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
    norm = site.observe().norms[0].median()
    tables[0][..., row * columns + column - count, :] += norm * offset  # counted from the end, where the patches are


def _attend(block: nn.Module, parts: Parts, direction: Tensor, logit: float) -> None:
    """Make the first half of a block's heads attend to tokens along `direction`, whatever the query."""
    paths = [path for path in parts.query_key if find_part(block, path) is not None]
    weights = [find_part(block, path) for path in paths]
    biases = [find_part(block, path.removesuffix("weight") + "bias") for path in paths]
    width = len(direction)
    if len(paths) == 1:  # one weight with the rows of query, key and value
        weights = list(weights[0].split(width)[:2])
        biases = list(biases[0].split(width)[:2])
    # The norm before attention maps an outlier, which is almost parallel to `direction`, to sqrt(C) * direction. With
    # queries of ones and keys of a * direction, a head of size h and scale h^-0.5 has the logit h^0.5 * a * sqrt(C).
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
    """Plant neurons that give a trained register of a random `model` the role of an outlier, in place.

    The neurons fire only at this register and give it a huge norm, and half of the heads of later blocks attend to it.

    Args:
        register: the register's index among the trained registers.
        block, num_neurons, norm_ratio: as in `plant`.

    Raises:
        ValueError: what `plant` raises, or the model has no such register.
    """
    site = Site.of(model, images)
    tower = site.tower
    count, planted_block = tower.num_trained_registers, tower.depth // 2 if block is None else block
    if not 0 <= register < count:
        raise ValueError(f"the model has {count} trained registers, and none with number {register}")
    if not isinstance(tower.embedding, nn.Conv2d):
        raise ValueError(f"planting needs a convolution that embeds the patches, which {tower.family.name} has not")
    generator = torch.Generator().manual_seed(seed)
    for scale in (mlp.scale for each in tower.blocks for mlp in each.mlps if mlp.scale is not None):
        scale.fill_(1.0)
    _separate_brightness(tower, images, generator)  # so that no patch is an outlier by itself
    outlier, *register_directions = _directions(1 + count, site.width, generator)
    (tokens,) = (each for each in tower.module.parameters() if each.shape == (1, count, site.width))
    tokens[0] = site.observe().norms[0].median() * torch.stack(register_directions)  # a random model has them all alike
    free = _shuffled(tower.mlp_width, generator)
    neurons = [(planted_block, next(free)) for _ in range(num_neurons)]
    for neuron in neurons:
        site.set(neuron)
    observed = site.observe()
    inputs, prefix = observed.inputs[planted_block], observed.prefix[planted_block]
    token = tower.num_prefix - count + register
    reads = without(prefix[token], torch.cat([prefix[:token], prefix[token + 1 :]]))
    loudest, at_register = (inputs @ reads).max(), (inputs.mean((0, 1)) + prefix[token]) @ reads
    if at_register <= loudest:
        raise ValueError(f"register {register} does not stand out from the patches in block {planted_block}")
    steepness = 2 * ACTIVATION / (at_register - loudest)
    bias = ACTIVATION - steepness * at_register
    for neuron in neurons:
        writes = norm_ratio * observed.norms[planted_block].median() / (ACTIVATION * num_neurons) * outlier
        site.set(neuron, steepness * reads, bias, writes)
    for each in tower.blocks[planted_block + 1 :]:
        _attend(each.module, site.parts, outlier, SINK_LOGIT)
    return Planted(by_block(neurons))
