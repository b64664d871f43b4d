"""Mechanisms as real networks have them: register neurons that work only together, spread over blocks.

A *population* is what makes one kind of outlier:

- *triggers*, in an early block, fire at a few patches, and write a small direction: no outlier yet;
- *amplifiers*, in later blocks, fire at patches that have that direction, and write another one, far longer than a
  normal token. Where a patch has the second direction already, later amplifiers fire by that. So the triggers cause
  everything; and if any block of amplifiers is left, there are outliers;
- *erasers*, in a late block, fire at the outliers and take the second direction away. They are no register neurons.

The mechanisms are:

- `triggers`: two triggers, and six amplifiers in one or two blocks;
- `spread`: four triggers, and four amplifiers in each of four or more blocks, which make outliers of 50 to 120 times
  the median norm;
- `two_populations`: the second lies in later blocks and is smaller. Half of its patches are those of the first, whose
  outliers hide from its triggers what they read: there it shows only when the first is moved;
- `weak`: outliers of about three times the median norm;
- `rare`: outliers in one image of ten;
- `fading`: outliers that are gone before the last block, by two blocks of erasers.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from planting.site import ACTIVATION, Neuron, Seen, Site, by_block, detector, silenced, threshold, without
from testreg.families import find_tower

Mechanism = Literal["direct", "triggers", "spread", "two_populations", "weak", "rare", "fading"]
Role = Literal["trigger", "amplifier", "eraser"]
Feature = Literal["bright", "dark"]

TRIGGER = 0.3  # what the triggers of a population write, in norms of a normal token
MARGIN = 3.0  # patches that triggers fire at, for each that amplifiers make an outlier
RIDGE = 0.05  # added to covariances, as a fraction of their mean eigenvalue


@dataclass(frozen=True)
class Planted:
    """What was planted."""

    neurons: dict[int, list[int]]
    """The register neurons, {block: [units]}: all triggers and amplifiers."""
    named_decoys: dict[str, Neuron] = field(default_factory=dict)
    """Block and unit of each."""
    roles: dict[Neuron, Role] = field(default_factory=dict)
    """Of the register neurons, and of erasers."""

    @property
    def decoys(self) -> dict[int, list[int]]:
        return by_block(self.named_decoys.values())

    @contextmanager
    def silenced(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context the model is what it would be without the mechanism: register neurons and erasers write
        nothing. Decoys and fixed positions stay."""
        with silenced(find_tower(model), by_block(self.roles)):
            yield model


@dataclass(frozen=True)
class Writers:
    """Neurons of one block that do the same."""

    block: int
    count: int
    length: float = TRIGGER
    """What they write together, in norms of a normal token."""


@dataclass(frozen=True)
class Population:
    """What makes one kind of outlier."""

    triggers: Writers
    amplifiers: tuple[Writers, ...] = ()
    erasers: tuple[Writers, ...] = ()
    features: tuple[Feature, ...] = ("bright",)
    """What the triggers fire at; they are shared out among several."""
    one_image_of: int = 1
    """Only one image of so many has its share of them, and others have fewer or none."""
    share: float = 1.0
    """Of the patches that become outliers."""
    alone: bool = True
    """Whether its thresholds are set with those before it silent."""

    def pick(self, free: Sequence[Iterator[int]]) -> dict[Neuron, Role]:
        """As many neurons as it has, of the units of each block that are free."""
        groups: list[tuple[Role, Writers]] = [("trigger", self.triggers)]
        groups += [("amplifier", writers) for writers in self.amplifiers]
        groups += [("eraser", writers) for writers in self.erasers]
        return {(own.block, next(free[own.block])): role for role, own in groups for _ in range(own.count)}


def populations(
    mechanism: Mechanism, depth: int, generator: torch.Generator, norm_ratio: float | None = None
) -> tuple[Population, ...]:
    """The populations of a mechanism in a model of so many blocks; `norm_ratio` None is what the mechanism's is."""

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
            return (Population(Writers(first, 2), written_in(blocks, 6 // len(blocks), ratio)),)
        case "spread":
            ratio = norm_ratio or 60.0 + 10.0 * below(6)
            blocks = range(first + 1, min(first + 1 + depth // 2, depth - 1))
            return (Population(Writers(first, 4), written_in(blocks, 4, ratio)),)
        case "two_populations":
            ratio = norm_ratio or 25.0
            later = depth // 2
            early = Population(Writers(1, 2), written_in((3,), 3, ratio), share=0.7)
            late = Population(
                Writers(later, 2),
                written_in((later + 1, later + 2), 3, 0.4 * ratio),
                features=("dark", "bright"),
            )
            return early, late
        case "weak":
            return (Population(Writers(first, 2), written_in((first + 1, first + 2), 3, norm_ratio or 3.0)),)
        case "rare":
            ratio = norm_ratio or 20.0
            return (
                Population(
                    Writers(first, 2), written_in((first + 1, first + 2), 3, ratio), one_image_of=20, share=0.75
                ),
            )
        case "fading":
            ratio = norm_ratio or 10.0
            lengths = (0.2 * ratio, 0.3 * ratio, 0.5 * ratio)
            amplifiers = tuple(Writers(first + 1 + i, 2, length) for i, length in enumerate(lengths))
            erasers = (Writers(depth - 3, 2), Writers(depth - 2, 2))
            return (Population(Writers(first, 2), amplifiers, erasers),)
    raise ValueError(f"unknown mechanism {mechanism!r}: one of {', '.join(typing.get_args(Mechanism))}")


def written_in(blocks: Sequence[int], count: int, ratio: float) -> tuple[Writers, ...]:
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
    """Set the neurons that were picked for a population, which are silent so far.

    Args:
        read: a feature and the inputs (B, N, C) of an MLP -> the direction (C,) along which these have it.
        directions: what triggers and what amplifiers write, unit vectors (C,).
        fraction: share of the patches that become outliers.

    Raises:
        ValueError: outliers that are to fade do not arise.
    """
    marker, outlier = directions
    fraction *= population.share
    one_image_of = population.one_image_of
    off = site.look(directions)

    def plant(units: Sequence[Neuron], reads: Tensor, bias: Tensor, writes: Tensor) -> None:
        """Neurons that together add `writes` to the patches at which they fire."""
        for neuron in units:
            gain = float(0.75 + 0.5 * torch.rand((), generator=generator))  # so that no two neurons score alike
            site.set(neuron, gain * reads, gain * bias, writes / (ACTIVATION * len(units)))

    def of(role: Role, block: int) -> list[Neuron]:
        return [neuron for neuron, own in neurons.items() if own == role and neuron[0] == block]

    block, features = population.triggers.block, population.features
    length = population.triggers.length * off.norms[block].median()
    for number, feature in enumerate(features):
        reads = read(feature, off.inputs[block])
        if population.alone:
            reads = without(reads, off.prefix[block])
        values = off.inputs[block] @ reads
        margin = MARGIN if population.amplifiers else 1.0
        fires_above = threshold(values, margin * fraction / len(features), one_image_of)
        plant(of("trigger", block)[number :: len(features)], *detector(values, reads, fires_above), length * marker)
    on = site.look()
    for writers in population.amplifiers:
        block = writers.block
        background, marked = off.inputs[block], on.inputs[block]
        change = (marked - background).norm(dim=-1)
        most = change > threshold(change, fraction / one_image_of)
        signals = [(marked - background)[most].mean(0)]
        if block > population.amplifiers[0].block:  # what the first wrote hides what the triggers wrote
            signals.append((site.look().inputs[block] - background)[most].mean(0))
        reads = _filter(off, block, signals)
        values = marked @ reads
        # Between those that are to fire and the background, so that the former all fire well.
        fires_above = 0.75 * threshold(values, fraction / one_image_of) + 0.25 * (background @ reads).max()
        length = writers.length * off.norms[block].median()
        plant(of("amplifier", block), *detector(values, reads, fires_above), length * outlier)
    for writers in population.erasers:
        block = writers.block
        full = site.look(directions)
        excess = (full.along - off.along)[block, ..., 1]  # (B, N)
        fires = excess > off.norms[block].median()
        if not fires.any():
            raise ValueError(
                f"no outliers reach block {block} on these images, so none can fade there: try another seed"
            )
        background = off.inputs[block]
        reads = _filter(off, block, [(full.inputs[block] - background)[fires].mean(0)])
        bias = -ACTIVATION * (1 + 2 * (background @ reads).mean())
        plant(of("eraser", block), 2 * ACTIVATION * reads, bias, -excess[fires].mean() * outlier)


def _filter(background: Seen, block: int, signals: Sequence[Tensor]) -> Tensor:
    """The direction (C,) along which signals (C,) stand out most from the inputs of a block's MLP: a matched filter.

    All signals have 1 of it, and the prefix tokens as much as an average patch.
    """
    covariance = background.inputs[block].flatten(0, 1).T.cov()
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    wanted = torch.stack(list(signals), -1)  # (C, n)
    filters = without(torch.linalg.solve(covariance + ridge, wanted), background.prefix[block])
    return filters @ torch.linalg.solve(wanted.T @ filters, torch.ones(len(signals)))
