"""Linear segmentation with the protocol of Denoising-ViT (arXiv 2401.02957), which Jiang et al. use.

A linear layer predicts the class of each patch, and its predictions are resized to pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from testreg.evaluation.bootstrap import Array, Scores, mean_iou_of, ratio_of
from testreg.evaluation.dense import dense_features, resized
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.figures import Panel, evenly_spaced, picture_of_rows
from testreg.evaluation.fitting import Batch, augmented_batches, kept_batches
from testreg.evaluation.overlap import IGNORED, overlap
from testreg.evaluation.pixel_maps import Map, mapped_images, two_splits
from testreg.evaluation.preparing import Normalisation, Square, normalisation_of, pixels_of, resized_within
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.io.progress import progress_bar
from testreg.neurons import AnyNeurons

STRIDE = 2 / 3  # the distance from one window to the next, as a share of the window's side
MAX_ASPECT_RATIO = 4  # the longer side of a resized image over its shorter one, at most
MAX_CLASS_SHARE = 0.75  # the share of a training crop's labelled pixels that no class should reach


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    size: int = 512,
    iterations: int = 40_000,
    warm_up: int = 1_500,
    fit_batch: int = 16,
    augment: bool = True,
    classes: int | None = None,
    ignore: int = 0,
    **settings: Any,
) -> Result:
    """Linear segmentation: mIoU and pixel accuracy on val of a 1x1 convolution on the patches of the last block.

    Batch norm and the convolution are fitted by cross entropy with AdamW (learning rate 1e-3, weight decay 1e-4), a
    linear warm-up and a linear decay. An image of val is resized so that its short side is `size` (less if the long
    side would exceed 4 times that), and cut into square windows of that side; where windows overlap, their logits are
    averaged.

    Args:
        data: ADE20k (images/training, annotations/training, ...), or images and masks in other folders.
        size: side of training crops and of windows, in pixels.
        iterations: steps in which the probe is fitted.
        warm_up: steps of the warm-up.
        fit_batch: crops in a step.
        augment: take training crops at random scales and places, flip them and change their colours at random, and
            compute their features anew in each step; if not, the features of the middle of each image are computed once
            and cached.
        classes: how many classes there are; masks have their values from 0 on, without `ignore`. None for the values
            that occur in masks.
        ignore: the value of pixels in masks that are left out: 0 in ADE20k.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(mapped_images(data), data)
    train, val = (random_subset(samples, settings_.num_images, settings_.seed) for samples in splits)
    values = class_values([*train, *val], classes, ignore, settings_.progress)
    evaluation = Evaluation("segment", model, data, settings_, neurons=neurons, against=against, image_size=size)
    class_numbers = {value: i for i, value in enumerate(values)}
    scores: dict[str, Scores] = {}
    predicted: dict[str, dict[int, Array]] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    for variant in evaluation.variants:
        normalise = normalisation_of(variant.transform)
        schedule = {"iterations": iterations, "batch_size": fit_batch}
        if augment:
            crop = _Crop(normalise, size, class_numbers)
            batches = augmented_batches(evaluation, variant, train, crop, _crops, **schedule)
        else:
            square = Square(normalise, size, "crop")
            cached = evaluation.features(variant, train, square, _kept_crops, {})
            targets = [square.fitted(as_target(each.target, class_numbers)[None], nearest=True)[0] for each in train]
            batches = kept_batches(evaluation, variant, cached, targets, **schedule)
        windows = evaluation.features(
            variant, val, _ShortSideResized(normalise, size), lambda c, x: _kept_windows(c, x, size), {}
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings_.seed)
            head = nn.Sequential(
                nn.BatchNorm2d(windows[0]["patches"].shape[1]),
                nn.Conv2d(windows[0]["patches"].shape[1], len(values), 1),
            ).to(variant.tower.device)
        patch = variant.tower.patch_size
        fit(head, batches, iterations, warm_up, (size, size), patch)
        rows, shown = [], set(evenly_spaced(len(val)))
        predicted[variant.name] = {}
        for i, (features, sample) in enumerate(zip(windows, val, strict=True)):
            truth = as_target(sample.target, class_numbers).numpy()
            labels = predict(head, features["patches"].to(variant.tower.device), truth.shape, size, patch)
            rows.append(overlap(labels, truth, len(values)))
            if i in shown:
                predicted[variant.name][i] = labels
        intersections, unions, pixels = (np.stack(each) for each in zip(*rows, strict=True))
        scores[variant.name] = {
            "miou": mean_iou_of(intersections, unions),
            "pixel_accuracy": ratio_of(intersections.sum(1), pixels),
        }
        sums = zip(values, intersections.sum(0).tolist(), unions.sum(0).tolist(), strict=True)
        per_class[variant.name] = {str(value): both / any_ if any_ else None for value, both, any_ in sums}

    def panels(i: int) -> list[Panel]:
        image = np.asarray(val[i].open())
        maps = {"truth": as_target(val[i].target, class_numbers).numpy()} | {
            name: each[i] for name, each in predicted.items()
        }
        limits = (0.0, float(len(values)))
        return [
            Panel("image", image),
            *(Panel(n, each, colours="nipy_spectral", limits=limits) for n, each in maps.items()),
        ]

    return evaluation.result(
        scores,
        {
            "train": len(train),
            "images": len(val),
            "classes": len(values),
            "ignore": ignore,
            "size": size,
            "iterations": iterations,
            "warm_up": warm_up,
            "fit_batch": fit_batch,
            "augment": augment,
        },
        details={"iou_per_class": per_class},
        pictures={"masks": lambda: picture_of_rows(panels, len(val), "linear segmentation")},
    )


def class_values(samples: Sequence[Sample[Map]], classes: int | None, ignore: int, progress: bool) -> list[int]:
    """The values in masks that stand for classes, sorted. The class number of a value is its index in this list.

    Raises:
        ValueError: a mask has a value that is no class, or no mask has a class.
    """
    values_present: set[int] = set()
    allowed = None if classes is None else {*range(classes + (0 <= ignore <= classes))} - {ignore}
    with progress_bar("masks", len(samples), progress) as bar:
        for sample in samples:
            values_here = {int(value) for value in np.unique(sample.target.read())} - {ignore}
            if allowed is not None and (unknown := values_here - allowed):
                raise ValueError(
                    f"{sample.target.name} has the value {min(unknown)}, which is none of the {classes} classes (nor "
                    f"{ignore}, which is ignored)"
                )
            values_present |= values_here
            bar.update()
    if not values_present:
        raise ValueError(f"no mask has a class: all values are {ignore}, which is ignored")
    return sorted(values_present if allowed is None else allowed)


def as_target(mask: Map, class_numbers: dict[int, int]) -> Tensor:
    """The mask as class numbers (h, w), from {value: class number}; pixels with other values are `IGNORED`."""
    values = mask.read()
    target = np.full(values.shape, IGNORED, dtype=np.int64)
    for value, number in class_numbers.items():
        target[values == value] = number
    return torch.from_numpy(target)


def fit(
    head: nn.Module,
    batches: Iterable[Batch],
    iterations: int,
    warm_up: int,
    size: tuple[int, int],
    patch: tuple[int, int],
) -> None:
    """Fit the head to batches of patches (B, C, rows, columns) and targets (B, height, width), then freeze it.

    Args:
        size: height and width of the images in pixels.
        patch: height and width of a patch in pixels.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up if warm_up else 1.0, 1 - step / iterations)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    head.train()
    for features, targets in batches:
        optimizer.zero_grad()
        logits = resized(head(features["patches"]), size, patch)
        # the loss is NaN if all pixels of the batch are ignored
        F.cross_entropy(logits, targets, ignore_index=IGNORED).nan_to_num().backward()
        optimizer.step()
        schedule.step()
    head.eval().requires_grad_(False)


def predict(head: nn.Module, windows: Tensor, shape: tuple[int, ...], size: int, patch: tuple[int, int]) -> Array:
    """The predicted class numbers (h, w) of an image.

    Args:
        windows: the patches of the image's windows, (windows, C, rows, columns).
        shape: the image's height and width.
        size: side of a window in pixels.
    """
    height, width = resized_within(shape, size, MAX_ASPECT_RATIO * size)
    logits = resized(head(windows.float()), (size, size), patch)
    total = logits.new_zeros(logits.shape[1], max(height, size), max(width, size))
    num_windows = logits.new_zeros(total.shape[1:])
    for window, (top, left) in zip(logits, corners(height, width, size), strict=True):
        total[:, top : top + size, left : left + size] += window
        num_windows[top : top + size, left : left + size] += 1
    averaged = (total / num_windows)[None, :, :height, :width]
    full = F.interpolate(averaged, (shape[0], shape[1]), mode="bilinear", align_corners=False)
    return full[0].argmax(0).cpu().numpy()


def corners(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The (top, left) of the windows that cover an image. The last window of a row or column ends with the image."""
    step = int(size * STRIDE)

    def starts(side: int) -> list[int]:
        return sorted({min(first, max(side - size, 0)) for first in range(0, max(side - size, 0) + step, step)})

    return [(top, left) for top in starts(height) for left in starts(width)]


def _crops(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """The patches (B, C, rows, columns) of training crops."""
    return {"patches": dense_features(variant.tower, images)[0]}


def _kept_crops(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """The same in half precision, for the cache."""
    return {"patches": dense_features(variant.tower, images)[0].half()}


def _kept_windows(variant: Variant, images: Tensor, size: int) -> dict[str, Tensor]:
    """The patches (B, windows, C, rows, columns) of all windows of images, in half precision, for the cache."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, max(size - width, 0), 0, max(size - height, 0)))
    parts = [padded[..., top : top + size, left : left + size] for top, left in corners(height, width, size)]
    return {"patches": torch.stack([dense_features(variant.tower, part)[0].half() for part in parts], dim=1)}


class _ShortSideResized:
    """Preparation that resizes the image so that its short side is `size`, or less if its long side would exceed 4
    times that."""

    def __init__(self, normalise: Normalisation, size: int) -> None:
        self.normalise, self.size = normalise, size

    @property
    def key(self) -> str:
        return f"short side {self.size}, at most {MAX_ASPECT_RATIO} to 1, {self.normalise}"

    def __call__(self, image: Any) -> Tensor:
        pixels = pixels_of(image)
        size = resized_within(pixels.shape[-2:], self.size, MAX_ASPECT_RATIO * self.size)
        return self.normalise(tv.resize(pixels, list(size), antialias=True))


class _Crop:
    """Makes a training crop: at a random scale and place, flipped half of the time, with its colours changed at
    random."""

    def __init__(self, normalise: Normalisation, size: int, class_numbers: dict[int, int]) -> None:
        self.normalise, self.size, self.class_numbers = normalise, size, class_numbers
        self.distort = v2.RandomPhotometricDistort(p=0.5)

    def __call__(self, sample: Sample[Map]) -> tuple[Tensor, Tensor]:
        pixels, target = pixels_of(sample.open()), as_target(sample.target, self.class_numbers)
        scale = float(torch.empty(()).uniform_(0.5, 2.0))
        size = list(resized_within(target.shape, round(self.size * scale), round(MAX_ASPECT_RATIO * self.size * scale)))
        pixels = tv.resize(pixels, size, antialias=True)
        target = tv.resize(target[None], size, tv.InterpolationMode.NEAREST)[0]
        top, left = self._place(target)
        pixels, target = (each[..., top : top + self.size, left : left + self.size] for each in (pixels, target))
        if torch.rand(()) < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        missing = (0, self.size - target.shape[1], 0, self.size - target.shape[0])
        return F.pad(self.normalise(self.distort(pixels)), missing), F.pad(target, missing, value=IGNORED)

    def _place(self, target: Tensor) -> tuple[int, int]:
        """A random top and left of the crop. Up to ten places are tried until no class takes most of the crop."""
        height, width = target.shape
        for _ in range(10):
            top, left = (int(torch.randint(max(side - self.size, 0) + 1, ())) for side in (height, width))
            part = target[top : top + self.size, left : left + self.size]
            counted = part[part != IGNORED].unique(return_counts=True)[1]
            if len(counted) > 1 and counted.max() / counted.sum() < MAX_CLASS_SHARE:
                break
        return top, left
