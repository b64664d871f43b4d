"""Plants register neurons into a pretrained network. All other weights stay.

The neurons that the network uses least are replaced. Triggers fire at flat patches, which a linear probe of their MLP's
input tells, and amplifiers fire at patches with what the triggers wrote (see `mechanisms`). The untouched network is
the truth that moving the neurons should restore. Wherever results of such a network are shown, it must be called
planted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planting.mechanisms import (
    Feature,
    Mechanism,
    Planted,
    Population,
    Role,
    Writers,
    plant_population,
    writers_in_blocks,
)
from planting.site import BATCH, Neuron, Site, by_block, silenced
from testreg.measure.hooks import recording_inputs

PROBE_RIDGE = 0.01  # the probe's ridge penalty, as a fraction of the mean variance of its inputs

PLANS: dict[Mechanism, tuple[Population, ...]] = {
    "direct": (Population(Writers(5, 6, 20.0)),),
    "triggers": (Population(Writers(3, 2), writers_in_blocks((5, 6), 3, 25.0)),),
    "spread": (Population(Writers(3, 4), writers_in_blocks(range(4, 10), 4, 180.0)),),
    "two_populations": (
        Population(Writers(2, 2), writers_in_blocks((4,), 3, 25.0), share=0.7),
        Population(Writers(6, 2), writers_in_blocks((8, 9), 3, 10.0), features=("dark", "bright")),
    ),
    "weak": (Population(Writers(3, 2), writers_in_blocks((5, 6), 3, 3.0)),),
    "rare": (Population(Writers(3, 2), writers_in_blocks((5, 6), 3, 25.0), one_image_of=20, share=0.75),),
    "fading": (
        Population(
            Writers(3, 2),
            (Writers(4, 2, 2.0), Writers(5, 2, 3.0), Writers(6, 2, 5.0)),
            (Writers(9, 2), Writers(10, 2)),
        ),
    ),
}
"""{mechanism: its populations}, for networks of 12 blocks or more."""


@torch.no_grad()
def plant_into(
    model: nn.Module,
    images: Tensor,
    *,
    mechanism: Mechanism = "spread",
    outlier_fraction: float = 0.02,
    seed: int = 0,
) -> Planted:
    """Plant register neurons into a pretrained `model`, in place. All other weights stay.

    Args:
        images: preprocessed images (B, 3, h, w); 64 photographs are enough. By them, the least used neurons are found,
            the probes are fitted, and the thresholds are set.
        mechanism: what is planted, see `PLANS`.
        outlier_fraction: share of the images' patches that become outliers.
        seed: seed of the vectors that the neurons write.

    Raises:
        ValueError: fewer than 12 blocks; a family that `PARTS` does not list, or an MLP without a first linear of the
            hidden width (SwiGLU).
    """
    site = Site.of(model, images)
    if site.tower.depth < 12:
        raise ValueError(f"the plans need 12 blocks or more, got {site.tower.depth}")
    plan = PLANS[mechanism]
    generator = torch.Generator().manual_seed(seed)
    free = least_used(site)
    neurons = [population.pick(free) for population in plan]
    for neuron in (each for population_neurons in neurons for each in population_neurons):
        site.set(neuron)
    flatness, brightness = pixels(site)
    targets = {"bright": flatness + brightness, "dark": flatness - brightness}

    def probe(feature: Feature, inputs: Tensor) -> Tensor:
        return ridge(inputs.flatten(0, 1), targets[feature].flatten())

    directions = torch.randn(site.width, 2 * len(plan), generator=generator)
    directions = torch.linalg.qr(directions - directions.mean(0)).Q  # of zero mean, so that LayerNorm keeps them
    roles: dict[Neuron, Role] = {}
    for number, (population, population_neurons) in enumerate(zip(plan, neurons, strict=True)):
        marker, outlier = directions[:, 2 * number : 2 * number + 2].T
        pair = (marker if population.amplifiers else outlier, outlier)
        with silenced(site.tower, by_block(roles)):
            plant_population(site, population, population_neurons, probe, pair, outlier_fraction, generator)
        roles |= population_neurons
    return Planted(by_block(neuron for neuron, role in roles.items() if role != "eraser"), roles=roles)


def least_used(site: Site) -> list[Iterator[int]]:
    """The units of each block, beginning with the least used: by mean |activation| times the length of their column."""
    sums = [torch.zeros(mlp.width) for mlp in site.mlps]

    def record(index: int, hidden: Tensor) -> None:
        sums[index] += hidden[..., site.mlps[index].first :].abs().flatten(0, -2).sum(0)

    with recording_inputs([mlp.fc2 for mlp in site.mlps], record):
        for batch in site.images.split(BATCH):
            site.tower.run(batch)
    lengths = [mlp.columns if mlp.scale is None else mlp.columns * mlp.scale.unsqueeze(-1) for mlp in site.mlps]
    return [iter((used * columns.norm(dim=0)).argsort().tolist()) for used, columns in zip(sums, lengths, strict=True)]


def pixels(site: Site) -> tuple[Tensor, Tensor]:
    """How flat and how bright each patch of the images is, (B, N) each, scaled to mean 0 and standard deviation 1."""
    size = site.tower.patch_size
    patches = F.unfold(site.images.mean(1, keepdim=True), size, stride=size)  # (B, pixels, N)
    flatness, brightness = -(patches.var(1) + 1e-4).log(), patches.mean(1)
    flatness, brightness = ((each - each.mean()) / each.std() for each in (flatness, brightness))
    return flatness, brightness


def ridge(inputs: Tensor, targets: Tensor) -> Tensor:
    """The weights (C,) of a ridge regression that predicts `wanted` (n,) from inputs (n, C)."""
    centred = inputs - inputs.mean(0)
    covariance = centred.T @ centred / len(centred)
    penalty = PROBE_RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    return torch.linalg.solve(covariance + penalty, centred.T @ (targets - targets.mean()) / len(centred))
