"""A picture of maps of a few photographs: of the network untouched, planted, and planted and patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import testreg
from restoration.networks import Networks
from testreg.demo.run import PHOTOGRAPHS
from testreg.evaluation.lost import lost
from testreg.families import find_tower
from testreg.files import replacing
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.maps import image_batch
from testreg.measure.tokens import behind_norm, recorded_projections

PHOTOGRAPH_NAMES = ("astronaut", "camera", "coffee", "rocket")  # not used for planting or calibration
SIZE = 448
STATES = ("untouched", "planted", "patched")
GROUPS = ("norms, block before the last", "attention of CLS", "features (PCA)", "LOST")


@dataclass(frozen=True)
class Maps:
    """Maps of a network on B photographs with h x w patches."""

    norms: Tensor
    """The norms of the patches after the last block but one, (B, h, w)."""
    attention: Tensor
    """The attention of CLS to the patches in the last block, mean over heads, (B, h, w)."""
    features: Tensor
    """The patches after the final norm, (B, h, w, C)."""
    boxes: list[list[float]]
    """The boxes of LOST on values of the last block: left, top, right, bottom in patches."""


def save(networks: Networks, file: Path) -> None:
    """Draw the picture and write it."""
    transform = testreg.load_model(networks.name, image_size=SIZE).transform
    paths = [PHOTOGRAPHS / f"{name}.jpg" for name in PHOTOGRAPH_NAMES]
    photographs = image_batch(networks.untouched, paths, transform)
    all_maps = [maps_of(networks.untouched, photographs), maps_of(networks.planted, photographs)]
    with testreg.patched(networks.planted, networks.chosen):
        all_maps.append(maps_of(networks.planted, photographs))
    with replacing(file) as temporary:
        picture(photographs, all_maps).savefig(temporary, format="png", dpi=110)


@torch.no_grad()
def maps_of(model: nn.Module, photographs: Tensor) -> Maps:
    """The maps of a network on photographs (B, 3, h, w)."""
    tower = find_tower(model)
    grid, patches, last = tower.grid(photographs), tower.patches(photographs), tower.depth - 1
    with (
        recorded_norms(tower, photographs) as norms,
        recorded_tokens(tower, photographs, -1) as tokens,
        recorded_projections(tower, [last]) as parts,
    ):
        tower.run(photographs)
    values = parts[last]["v"][:, patches]
    return Maps(
        norms[-2][:, patches].unflatten(1, grid),
        testreg.attention(model, photographs).mean(1),
        behind_norm(tower, tokens[0])[:, patches].unflatten(1, grid),
        [lost(each, grid)[0].tolist() for each in values],
    )


def picture(photographs: Tensor, all_maps: list[Maps]) -> Figure:
    """A figure with a row for each photograph, and for each kind of map the three networks side by side."""
    rows, columns = len(photographs), 1 + len(GROUPS) * len(STATES)
    figure = Figure(figsize=(1.12 * columns, 1.16 * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr]
    parts = figure.subfigures(1, 1 + len(GROUPS), width_ratios=[1, *[len(STATES)] * len(GROUPS)], wspace=0.012)
    colours = colouring(all_maps[0].features)
    pixels = [as_picture(photograph) for photograph in photographs]
    axes = parts[0].subplots(rows, 1)
    parts[0].suptitle(" ", fontsize=9)
    for i in range(rows):
        draw(axes[i], pixels[i], "photograph" if i == 0 else "")
    for part, group in zip(parts[1:], GROUPS, strict=True):
        part.suptitle(group, fontsize=9)
        axes = part.subplots(rows, len(STATES))
        for i in range(rows):
            for axis, state, maps in zip(axes[i], STATES, all_maps, strict=True):
                title = state if i == 0 else ""
                match group:
                    case "attention of CLS":
                        draw(axis, maps.attention[i], title, cmap="inferno", vmin=0)
                    case "features (PCA)":
                        draw(axis, colours(maps.features[i]), title)
                    case "LOST":
                        draw(axis, pixels[i], title)
                        outline(axis, maps.boxes[i], pixels[i].shape[0] / maps.norms.shape[1])
                    case _:
                        draw(axis, maps.norms[i], title, vmin=0)
    return figure


def as_picture(photograph: Tensor) -> np.ndarray:
    """A preprocessed photograph (3, h, w) as a picture (h, w, 3) in [0, 1]."""
    low, high = photograph.amin(), photograph.amax()
    return ((photograph - low) / (high - low)).permute(1, 2, 0).numpy()


def draw(axis: Axes, pixels: object, title: str, **options: object) -> None:
    """Draw a map or photograph without a frame."""
    axis.imshow(np.asarray(pixels), **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    axis.spines[:].set_visible(False)


def outline(axis: Axes, box: list[float], patch: float) -> None:
    """Draw a box, given in patches of `patch` pixels."""
    left, top, right, bottom = (edge * patch for edge in box)
    width, height = right - left, bottom - top
    axis.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="#00e5ff", lw=1.8, clip_on=False))


def colouring(features: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that turns features (h, w, C) into colours: their first three principal components in `features`."""
    tokens = features.flatten(0, 2)
    mean = tokens.mean(0)
    components = torch.linalg.eigh((tokens - mean).T @ (tokens - mean)).eigenvectors[:, -3:].flip(1)
    scores = (tokens - mean) @ components
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    return lambda each: (((each - mean) @ components - low) / (high - low)).clamp(0, 1)
