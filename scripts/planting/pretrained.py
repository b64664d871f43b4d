"""A pretrained network, into which register neurons are planted: all else in it is real.

The units of a block that the network uses least are replaced: triggers fire at flat patches, as a linear probe of their
MLP's input tells them, and amplifiers at those that have what the triggers wrote. So the untouched network is the truth
that moving them should restore. Where its results are shown, such a network is to be called planted.
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
    written_in,
)
from planting.site import BATCH, Neuron, Site, by_block, silenced
from testreg.measure.hooks import recording_inputs

PROBE_RIDGE = 0.01  # of the probe, as a fraction of the mean eigenvalue of its inputs' covariance

PLANS: dict[Mechanism, tuple[Population, ...]] = {
    "direct": (Population(Writers(5, 6, 20.0)),),
    "triggers": (Population(Writers(3, 2), written_in((5, 6), 3, 25.0)),),
    "spread": (Population(Writers(3, 4), written_in(range(4, 10), 4, 180.0)),),
    "two_populations": (
        Population(Writers(2, 2), written_in((4,), 3, 25.0), share=0.7),
        Population(Writers(6, 2), written_in((8, 9), 3, 10.0), features=("dark", "bright")),
    ),
    "weak": (Population(Writers(3, 2), written_in((5, 6), 3, 3.0)),),
    "rare": (Population(Writers(3, 2), written_in((5, 6), 3, 25.0), one_image_of=20, share=0.75),),
    "fading": (
        Population(
            Writers(3, 2),
            (Writers(4, 2, 2.0), Writers(5, 2, 3.0), Writers(6, 2, 5.0)),
            (Writers(9, 2), Writers(10, 2)),
        ),
    ),
}
"""Of a network of 12 blocks or more."""


@torch.no_grad()
def plant_into(
    model: nn.Module,
    images: Tensor,
    *,
    mechanism: Mechanism = "spread",
    outlier_fraction: float = 0.02,
    seed: int = 0,
) -> Planted:
    """Plant register neurons into a pretrained `model`, in place, and keep all else.

    Args:
        images: (B, 3, h, w), preprocessed for the model; 64 photographs do. They say which units are used least, fit
            the probes and set the thresholds.
        mechanism: what is planted where: `PLANS`.
        outlier_fraction: share of the images' patches that become outliers.
        seed: of what the neurons write.

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
    for neuron in (each for own in neurons for each in own):
        site.set(neuron)
    flatness, brightness = pixels(site)
    wanted = {"bright": flatness + brightness, "dark": flatness - brightness}

    def probe(feature: Feature, inputs: Tensor) -> Tensor:
        return ridge(inputs.flatten(0, 1), wanted[feature].flatten())

    directions = torch.randn(site.width, 2 * len(plan), generator=generator)
    directions = torch.linalg.qr(directions - directions.mean(0)).Q  # LayerNorm keeps what has zero mean
    roles: dict[Neuron, Role] = {}
    for number, (population, own) in enumerate(zip(plan, neurons, strict=True)):
        marker, outlier = directions[:, 2 * number : 2 * number + 2].T
        pair = (marker if population.amplifiers else outlier, outlier)
        with silenced(site.tower, by_block(roles)):
            plant_population(site, population, own, probe, pair, outlier_fraction, generator)
        roles |= own
    return Planted(by_block(neuron for neuron, role in roles.items() if role != "eraser"), roles=roles)


def least_used(site: Site) -> list[Iterator[int]]:
    """The units of each block, from those that write least on the images: mean |activation| times length of column."""
    sums = [torch.zeros(mlp.width) for mlp in site.mlps]

    def record(index: int, hidden: Tensor) -> None:
        sums[index] += hidden[..., site.mlps[index].first :].abs().flatten(0, -2).sum(0)

    with recording_inputs([mlp.fc2 for mlp in site.mlps], record):
        for batch in site.images.split(BATCH):
            site.tower.run(batch)
    lengths = [mlp.columns if mlp.scale is None else mlp.columns * mlp.scale.unsqueeze(-1) for mlp in site.mlps]
    return [iter((used * columns.norm(dim=0)).argsort().tolist()) for used, columns in zip(sums, lengths, strict=True)]


def pixels(site: Site) -> tuple[Tensor, Tensor]:
    """How flat and how bright the patches of the images are, (B, N) each, of mean 0 and deviation 1."""
    size = site.tower.patch_size
    patches = F.unfold(site.images.mean(1, keepdim=True), size, stride=size)  # (B, pixels, N)
    flatness, brightness = -(patches.var(1) + 1e-4).log(), patches.mean(1)
    flatness, brightness = ((each - each.mean()) / each.std() for each in (flatness, brightness))
    return flatness, brightness


def ridge(inputs: Tensor, wanted: Tensor) -> Tensor:
    """The direction (C,) along which inputs (n, C) tell best what is wanted (n,), by ridge regression."""
    centred = inputs - inputs.mean(0)
    covariance = centred.T @ centred / len(centred)
    penalty = PROBE_RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    return torch.linalg.solve(covariance + penalty, centred.T @ (wanted - wanted.mean()) / len(centred))
