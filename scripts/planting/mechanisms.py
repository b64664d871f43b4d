"""Mechanisms of outliers as real networks have them: neurons in several blocks, which work only together.

A neuron *writes* a vector: it adds its activation times this vector (its column of the second linear) to a token. A
*population* is a set of neurons that makes one kind of outlier:

- *Triggers*, in an early block, fire at a few patches, and write a short vector, the marker. It makes no outlier yet.
- *Amplifiers*, in later blocks, fire at patches with the marker, and write another vector, far longer than a normal
  token. Amplifiers in still later blocks also fire at patches that have this vector. So the triggers cause everything;
  but as long as one block of amplifiers is left, there are outliers.
- *Erasers*, in a late block, fire at the outliers and take the long vector away. They are not register neurons.

The mechanisms are (`direct` is in `random_models`):

- `triggers`: two triggers, and six amplifiers in one or two blocks;
- `spread`: four triggers, and four amplifiers in each of four or more blocks, which make outliers of 50 to 120 times
  the median norm;
- `two_populations`: the second population is in later blocks and makes smaller outliers. At half of its patches, the
  outliers of the first population hide what its triggers read, so there it fires only when the first is moved;
- `weak`: outliers of about three times the median norm;
- `rare`: outliers in one image of ten;
- `fading`: outliers that two blocks of erasers remove before the last block.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from planting.site import ACTIVATION, Neuron, Observed, Site, by_block, detector, silenced, threshold, without
from testreg.families import find_tower

Mechanism = Literal["direct", "triggers", "spread", "two_populations", "weak", "rare", "fading"]
Role = Literal["trigger", "amplifier", "eraser"]
Feature = Literal["bright", "dark"]

TRIGGER = 0.3  # length of what a population's triggers write, in norms of a normal token
MARGIN = 3.0  # triggers fire at so many times as many patches as become outliers
RIDGE = 0.05  # what is added to the diagonal of covariances, as a fraction of its mean


@dataclass(frozen=True)
class Planted:
    """The neurons that were planted."""

    neurons: dict[int, list[int]]
    """The register neurons, {block: [units]}: all triggers and amplifiers."""
    named_decoys: dict[str, Neuron] = field(default_factory=dict)
    """{name of a decoy: (block, unit)}."""
    roles: dict[Neuron, Role] = field(default_factory=dict)
    """{register neuron or eraser: its role}."""

    @property
    def decoys(self) -> dict[int, list[int]]:
        """The decoys, {block: [units]}."""
        return by_block(self.named_decoys.values())

    @contextmanager
    def silenced(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the `with` block, register neurons and erasers write nothing: the model is as without the mechanism.

        Decoys and artefacts at fixed positions stay.
        """
        with silenced(find_tower(model), by_block(self.roles)):
            yield model


@dataclass(frozen=True)
class Writers:
    """A group of neurons of one block that fire and write together."""

    block: int
    count: int
    length: float = TRIGGER
    """The length of what they write together, in norms of a normal token."""


@dataclass(frozen=True)
class Population:
    """The neurons that make one kind of outlier."""

    triggers: Writers
    amplifiers: tuple[Writers, ...] = ()
    erasers: tuple[Writers, ...] = ()
    features: tuple[Feature, ...] = ("bright",)
    """The patches at which the triggers fire. If there are several features, the triggers are divided among them."""
    one_image_of: int = 1
    """Outliers are rare: only one image of so many gets the full number of outliers."""
    share: float = 1.0
    """The share of all outliers that this population makes."""
    alone: bool = True
    """Whether the neurons of the populations before it are silent while its thresholds are set."""

    def pick(self, free: Sequence[Iterator[int]]) -> dict[Neuron, Role]:
        """Take the neurons of the population from the free units of each block."""
        groups: list[tuple[Role, Writers]] = [("trigger", self.triggers)]
        groups += [("amplifier", writers) for writers in self.amplifiers]
        groups += [("eraser", writers) for writers in self.erasers]
        return {
            (writers.block, next(free[writers.block])): role for role, writers in groups for _ in range(writers.count)
        }


def populations(
    mechanism: Mechanism, depth: int, generator: torch.Generator, norm_ratio: float | None = None
) -> tuple[Population, ...]:
    """The populations of a mechanism in a model of `depth` blocks.

    Args:
        norm_ratio: norm of an outlier over the median norm; None for the mechanism's default.
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    if depth < 8:
        raise ValueError(f"the mechanism {mechanism!r} needs 8 blocks or more, got {depth}")
    first = 1 + below(2)
    match mechanism:
        case "triggers":
            ratio = norm_ratio or 20.0
            start = first + 1 + below(2)
            blocks = (start, start + 1) if below(2) else (start,)
            return (Population(Writers(first, 2), writers_in_blocks(blocks, 6 // len(blocks), ratio)),)
        case "spread":
            ratio = norm_ratio or 60.0 + 10.0 * below(6)
            blocks = range(first + 1, min(first + 1 + depth // 2, depth - 1))
            return (Population(Writers(first, 4), writers_in_blocks(blocks, 4, ratio)),)
        case "two_populations":
            ratio = norm_ratio or 25.0
            later = depth // 2
            early = Population(Writers(1, 2), writers_in_blocks((3,), 3, ratio), share=0.7)
            late = Population(
                Writers(later, 2),
                writers_in_blocks((later + 1, later + 2), 3, 0.4 * ratio),
                features=("dark", "bright"),
            )
            return early, late
        case "weak":
            return (Population(Writers(first, 2), writers_in_blocks((first + 1, first + 2), 3, norm_ratio or 3.0)),)
        case "rare":
            ratio = norm_ratio or 20.0
            return (
                Population(
                    Writers(first, 2), writers_in_blocks((first + 1, first + 2), 3, ratio), one_image_of=20, share=0.75
                ),
            )
        case "fading":
            ratio = norm_ratio or 10.0
            lengths = (0.2 * ratio, 0.3 * ratio, 0.5 * ratio)
            amplifiers = tuple(Writers(first + 1 + i, 2, length) for i, length in enumerate(lengths))
            erasers = (Writers(depth - 3, 2), Writers(depth - 2, 2))
            return (Population(Writers(first, 2), amplifiers, erasers),)
    raise ValueError(f"unknown mechanism {mechanism!r}: one of {', '.join(typing.get_args(Mechanism))}")


def writers_in_blocks(blocks: Sequence[int], count: int, ratio: float) -> tuple[Writers, ...]:
    """A group of `count` neurons in each block, which together write `ratio` norms of a normal token."""
    return tuple(Writers(block, count, ratio / len(blocks)) for block in blocks)


@torch.no_grad()
def plant_population(
    site: Site,
    population: Population,
    neurons: Mapping[Neuron, Role],
    read: Callable[[Feature, Tensor], Tensor],
    directions: tuple[Tensor, Tensor],
    fraction: float,
    generator: torch.Generator,
) -> None:
    """Set the weights of a population's neurons, which are silent so far.

    Args:
        neurons: the neurons that were picked for the population.
        read: maps a feature and the inputs (B, N, C) of an MLP to the direction (C,) that tells how much of the feature
            an input has.
        directions: the unit vectors (C,) that triggers and that amplifiers write.
        fraction: share of the patches that become outliers.

    Raises:
        ValueError: there are no outliers that erasers could remove.
    """
    marker, outlier = directions
    fraction *= population.share
    one_image_of = population.one_image_of
    without_neurons = site.observe(directions)

    def plant(units: Sequence[Neuron], reads: Tensor, bias: Tensor, writes: Tensor) -> None:
        """Set neurons so that they together add `writes` to the patches at which they fire."""
        for neuron in units:
            gain = float(0.75 + 0.5 * torch.rand((), generator=generator))  # so that no two neurons score alike
            site.set(neuron, gain * reads, gain * bias, writes / (ACTIVATION * len(units)))

    def of(role: Role, block: int) -> list[Neuron]:
        """The population's neurons of a role in a block."""
        return [neuron for neuron, role_ in neurons.items() if role_ == role and neuron[0] == block]

    block, features = population.triggers.block, population.features
    length = population.triggers.length * without_neurons.norms[block].median()
    for number, feature in enumerate(features):
        reads = read(feature, without_neurons.inputs[block])
        if population.alone:
            reads = without(reads, without_neurons.prefix[block])
        values = without_neurons.inputs[block] @ reads
        margin = MARGIN if population.amplifiers else 1.0
        fires_above = threshold(values, margin * fraction / len(features), one_image_of)
        plant(of("trigger", block)[number :: len(features)], *detector(values, reads, fires_above), length * marker)
    with_triggers = site.observe()
    for writers in population.amplifiers:
        block = writers.block
        background, marked = without_neurons.inputs[block], with_triggers.inputs[block]
        change = (marked - background).norm(dim=-1)
        most_changed = change > threshold(change, fraction / one_image_of)
        signals = [(marked - background)[most_changed].mean(0)]
        if block > population.amplifiers[0].block:  # the first amplifiers' vector hides the marker: read that too
            signals.append((site.observe().inputs[block] - background)[most_changed].mean(0))
        reads = _filter(without_neurons, block, signals)
        values = marked @ reads
        # The threshold is between the patches that shall fire and the background, so that the former fire well.
        fires_above = 0.75 * threshold(values, fraction / one_image_of) + 0.25 * (background @ reads).max()
        length = writers.length * without_neurons.norms[block].median()
        plant(of("amplifier", block), *detector(values, reads, fires_above), length * outlier)
    for writers in population.erasers:
        block = writers.block
        full = site.observe(directions)
        excess = (full.along - without_neurons.along)[block, ..., 1]  # (B, N)
        has_outlier = excess > without_neurons.norms[block].median()
        if not has_outlier.any():
            raise ValueError(
                f"no outliers reach block {block} on these images, so none can fade there: try another seed"
            )
        background = without_neurons.inputs[block]
        reads = _filter(without_neurons, block, [(full.inputs[block] - background)[has_outlier].mean(0)])
        bias = -ACTIVATION * (1 + 2 * (background @ reads).mean())
        plant(of("eraser", block), 2 * ACTIVATION * reads, bias, -excess[has_outlier].mean() * outlier)


def _filter(background: Observed, block: int, signals: Sequence[Tensor]) -> Tensor:
    """The direction (C,) along which signals (C,) stand out most from the inputs of a block's MLP (a matched filter).

    The product with each signal is 1, and that with a prefix token is the same as with an average patch.
    """
    covariance = background.inputs[block].flatten(0, 1).T.cov()
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    wanted = torch.stack(list(signals), -1)  # (C, n)
    filters = without(torch.linalg.solve(covariance + ridge, wanted), background.prefix[block])
    return filters @ torch.linalg.solve(wanted.T @ filters, torch.ones(len(signals)))
