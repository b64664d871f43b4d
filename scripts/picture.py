"""The picture of the README: a pretrained network, the same with planted register neurons, and that one patched.

    python scripts/picture.py ../shared/models/vit-small-saliency ../shared/images -o docs/planted.png

The network has no outliers of its own. Register neurons are planted into it, so that the untouched network is the truth
that a patch should restore. Whatever the picture is shown with must call it planted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from planting.pretrained import plant_into
from torch import Tensor, nn

import testreg
from testreg.demo.run import PHOTOGRAPHS
from testreg.io.sources import image_paths
from testreg.measure.maps import image_batch

ROWS = ("untouched", "planted", "planted and patched")
SHOWN = ("astronaut", "camera", "coffee", "rocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pretrained network without outliers")
    parser.add_argument("images", help="photographs that say what is planted; they are not shown")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--mechanism", default="triggers")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("-o", "--output", required=True)
    asked = parser.parse_args()
    coarse = testreg.load_model(asked.model)  # at its own size, where planting is quicker
    fine = testreg.load_model(asked.model, image_size=asked.image_size)
    model = coarse.model
    photographs = image_batch(model, [PHOTOGRAPHS / f"{name}.jpg" for name in SHOWN], fine.transform)
    untouched = maps_of(model, photographs)
    paths = image_paths(Path(asked.images))[: asked.num_images]
    planted = plant_into(model, image_batch(model, paths, coarse.transform), mechanism=asked.mechanism)
    broken = maps_of(model, photographs)
    with testreg.patched(model, planted.neurons):
        restored = maps_of(model, photographs)
    picture(photographs, [untouched, broken, restored]).savefig(asked.output, dpi=110)
    for row, (norms, dense) in zip(ROWS, (untouched, broken, restored), strict=True):
        ratio = norms.flatten(1).amax(1) / norms.flatten(1).median(1).values
        same = torch.cosine_similarity(dense, untouched[1], dim=1).mean()
        print(f"{row}: largest over median norm {ratio.max():.1f}, features' cosine to the untouched {same:.3f}")


def maps_of(model: nn.Module, photographs: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (B, h, w) after the block before the last, and features (B, C, h, w) behind the final norm."""
    return testreg.features(model, photographs, -2).norm(dim=1), testreg.features(model, photographs, norm=True)


def picture(photographs: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Figure:
    """A row for the photographs and one for each state of the network; norms and features of each photograph."""
    count, colours = len(photographs), colouring(rows[0][1])
    figure = Figure(figsize=(2.3 * count, 5.8), layout="constrained")
    grid = figure.add_gridspec(1 + len(rows), 2 * count, height_ratios=(1.8, *[1] * len(rows)))
    for i, photograph in enumerate(photographs):
        low, high = photograph.amin(), photograph.amax()
        draw(figure.add_subplot(grid[0, 2 * i : 2 * i + 2]), ((photograph - low) / (high - low)).permute(1, 2, 0))
        for row, (name, (norms, dense)) in enumerate(zip(ROWS, rows, strict=True), start=1):
            left, right = (figure.add_subplot(grid[row, 2 * i + side]) for side in (0, 1))
            draw(left, norms[i], "norms" if row == 1 else "", vmin=0)
            draw(right, colours(dense[i]), "features" if row == 1 else "")
            if i == 0:
                left.set_ylabel(name.replace(" and ", "\nand "), fontsize=9)
    return figure


def draw(axes: Axes, pixels: Tensor, title: str = "", **options: Any) -> None:
    axes.imshow(pixels, **options)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)


def colouring(dense: Tensor) -> Callable[[Tensor], Tensor]:
    """Colours of features (C, h, w): their three principal components in the untouched network."""
    tokens = dense.permute(0, 2, 3, 1).flatten(0, 2)
    mean = tokens.mean(0)
    components = torch.pca_lowrank(tokens, 3, niter=4)[2]
    scores = (tokens - mean) @ components
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    return lambda each: (((each.permute(1, 2, 0) - mean) @ components - low) / (high - low)).clamp(0, 1)


if __name__ == "__main__":
    main()
