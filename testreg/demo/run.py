"""The main job on the model that comes with the package: calibrate, patch, compare. No download is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from testreg.calibration.calibrate import calibrate
from testreg.io.decoding import open_image
from testreg.io.loading import DEMO, demo_model
from testreg.io.sources import image_paths
from testreg.neurons import RegisterNeurons
from testreg.register import patch
from testreg.report.map_figures import Maps, figure, maps_before_and_after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHOTOGRAPHS = Path(__file__).parent / "photographs"
IMAGE_SIZE, CROP_SIZE = 128, 96  # 32 x 32 patches are drawn, 24 x 24 calibrate
STRIDE = 32  # of the crops: 80, which is what it takes to choose neurons on some and to verify them on others


@dataclass(frozen=True)
class Demo:
    """What the demo found and drew."""

    planted: dict[int, list[int]]
    """What makes the outliers, as it was planted before the network was trained around it."""
    neurons: RegisterNeurons
    before: Maps
    after: Maps
    picture: Figure

    @property
    def recovered(self) -> int:
        """How many of the planted neurons were found."""
        chosen = self.neurons.by_block()
        return sum(unit in chosen.get(block, ()) for block, units in self.planted.items() for unit in units)


def run_demo(*, progress: bool = True) -> Demo:
    """Let calibration find the demo model's register neurons without being told, patch them, and compare."""
    model = demo_model(IMAGE_SIZE)
    neurons = calibrate(model, crops(photographs(2 * CROP_SIZE), CROP_SIZE, STRIDE), progress=progress)
    images = photographs(IMAGE_SIZE)
    patch(model, neurons)
    block = neurons.calibration.detection_block
    assert block is not None  # calibration says it
    before, after = maps_before_and_after(model, images, block=block)
    picture = figure(images, before, after, "testreg's demo model: trained on CIFAR-10 around planted outliers")
    return Demo(planted_neurons(), neurons, before, after, picture)


def photographs(size: int) -> Tensor:
    """The public-domain photographs that come with the package: (5, 3, size, size), in [-1, 1]."""
    from torchvision.transforms.v2 import functional as tv

    images = [tv.pil_to_tensor(open_image(path)) for path in image_paths(PHOTOGRAPHS)]
    return torch.stack([tv.resize(image, [size, size], antialias=True) for image in images]).float() / 127.5 - 1


def crops(images: Tensor, size: int, stride: int) -> Tensor:
    """All crops (n, 3, size, size) at a stride of images (B, 3, h, w)."""
    windows = images.unfold(2, size, stride).unfold(3, size, stride)  # (B, 3, rows, columns, size, size)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def planted_neurons() -> dict[int, list[int]]:
    """The register neurons of the demo model, `{block: [units]}`."""
    planted = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))["testreg"]
    return {planted["block"]: planted["units"]}
