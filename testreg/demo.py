"""The main job on a model that needs no download: plant, calibrate, patch, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from testreg.calibrate import calibrate
from testreg.data import image_paths, open_image
from testreg.neurons import RegisterNeurons
from testreg.planted import Planted, plant
from testreg.register import patch
from testreg.viz import Maps, compare, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHOTOGRAPHS = Path(__file__).parent / "photographs"
IMAGE_SIZE = 256


@dataclass(frozen=True)
class Demo:
    planted: Planted
    found: RegisterNeurons
    recovered: int
    """How many planted neurons are among the first of the ranking, as many as were planted."""
    before: Maps
    after: Maps
    picture: Figure


def photographs(size: int = IMAGE_SIZE) -> Tensor:
    """The public-domain photographs that come with the package: (5, 3, size, size), in [-1, 1].

    Their histograms are equalised, so that one threshold of brightness finds a few patches in each of them.
    """
    from torchvision.transforms.v2 import functional as tv

    images = [tv.equalize(tv.pil_to_tensor(open_image(path))) for path in image_paths(PHOTOGRAPHS)]
    return torch.stack([tv.resize(image, [size, size], antialias=True) for image in images]).float() / 127.5 - 1


def run_demo(seed: int = 0) -> Demo:
    """Plant register neurons into a random ViT, let calibration find them without being told, patch and compare."""
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_base_patch16_clip_224",
        img_size=IMAGE_SIZE,
        patch_size=8,
        depth=8,
        embed_dim=128,
        num_heads=4,
        num_classes=0,
    ).eval()
    images = photographs()
    planted = plant(model, images, outlier_fraction=0.01, decoys=True, seed=seed)
    wanted = {(layer, unit) for layer, units in planted.neurons.items() for unit in units}
    found = calibrate(model, images, top_k=len(wanted))
    recovered = len(wanted & {(layer, unit) for layer, unit, _ in found.cut().ranking})
    patch(model, found)
    before, after = compare(model, images, layer=found.calibration["detection_layer"])
    picture = figure(images, before, after, "testreg on a synthetic model (random ViT with planted register neurons)")
    return Demo(planted, found, recovered, before, after, picture)
