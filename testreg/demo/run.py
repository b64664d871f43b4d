"""`testreg demo`: calibrates, patches and compares the small model that comes with the package, without a download.

Register neurons were *planted* into the demo model, so it is known which neurons calibration should find.
"""

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
IMAGE_SIZE, CROP_SIZE = 128, 96  # pixels of the images that are drawn, and of the crops that calibration gets
STRIDE = 32  # pixels between crops: it gives 80 crops, enough to choose neurons on some and verify them on others


@dataclass(frozen=True)
class Demo:
    """The results of the demo."""

    planted: dict[int, list[int]]
    """The neurons that were planted before the model was trained, and make its outliers: `{block: [units]}`."""
    neurons: RegisterNeurons
    """The neurons that calibration found."""
    before: Maps
    """Maps of the photographs without registers."""
    after: Maps
    """Maps of the photographs with registers."""
    picture: Figure
    """The photographs with the maps before and after, drawn."""

    @property
    def recovered(self) -> int:
        """How many of the planted neurons calibration found."""
        chosen = self.neurons.by_block()
        return sum(unit in chosen.get(block, ()) for block, units in self.planted.items() for unit in units)


def run_demo(*, progress: bool = True) -> Demo:
    """Calibrate the demo model without telling which neurons were planted, patch it, and draw it before and after."""
    model = demo_model(IMAGE_SIZE)
    neurons = calibrate(model, crops(photographs(2 * CROP_SIZE), CROP_SIZE, STRIDE), progress=progress)
    images = photographs(IMAGE_SIZE)
    patch(model, neurons)
    block = neurons.calibration.detection_block
    assert block is not None  # a calibration that has run always sets it
    before, after = maps_before_and_after(model, images, block=block)
    picture = figure(images, before, after, "testreg's demo model: trained on CIFAR-10 around planted outliers")
    return Demo(planted_neurons(), neurons, before, after, picture)


def photographs(size: int) -> Tensor:
    """The five public-domain photographs of the package, squashed to squares: (5, 3, size, size) in [-1, 1]."""
    from torchvision.transforms.v2 import functional as tv

    images = [tv.pil_to_tensor(open_image(path)) for path in image_paths(PHOTOGRAPHS)]
    return torch.stack([tv.resize(image, [size, size], antialias=True) for image in images]).float() / 127.5 - 1


def crops(images: Tensor, size: int, stride: int) -> Tensor:
    """All square crops (n, 3, size, size) of images (B, 3, h, w), `stride` pixels apart."""
    windows = images.unfold(2, size, stride).unfold(3, size, stride)  # (B, 3, rows, columns, size, size)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def planted_neurons() -> dict[int, list[int]]:
    """The neurons that were planted into the demo model, `{block: [units]}`."""
    planted = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))["testreg"]
    return {planted["block"]: planted["units"]}
