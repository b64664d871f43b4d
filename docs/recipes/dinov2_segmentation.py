"""Segmentation with a linear head on DINOv2's patches: python dinov2_segmentation.py MODEL IMAGES MASKS [NEURONS]

IMAGES and MASKS are folders with the same names; a mask is a picture whose values are classes.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import testreg


def dense(model: nn.Module, images: Path) -> Tensor:
    """Features (B, C, h, w) as DINOv2's heads take them: behind the final norm, without CLS and register."""
    return testreg.features(model, images, norm=True)


def read_masks(folder: Path, grid: tuple[int, int]) -> Tensor:
    """Classes (B, h, w), one for each patch. The masks are taken to be squares, as the model's images are cropped."""
    rows, columns = grid
    masks = [Image.open(path).resize((columns, rows), Image.Resampling.NEAREST) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).long()


def fit(features: Tensor, classes: Tensor, steps: int = 300) -> nn.Conv2d:
    """A 1x1 convolution from features (B, C, h, w) to the logits of classes (B, h, w)."""
    head = nn.Conv2d(features.shape[1], int(classes.max()) + 1, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), classes).backward()
        optimizer.step()
    return head


def main(name: str, images: str, masks: str, neurons: str | None = None) -> float:
    model = timm.create_model(name, pretrained=True).eval()
    testreg.patch(model, neurons)  # None: the bundled list of the checkpoint
    features = dense(model, Path(images))
    classes = read_masks(Path(masks), (features.shape[2], features.shape[3]))
    head = fit(features, classes)
    accuracy = float((head(features).argmax(1) == classes).float().mean())
    print(f"{accuracy:.1%} of the patches are right, on the images of the training")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
