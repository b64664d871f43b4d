"""Segmentation by attention: do the patches that CLS attends to cover the object?

This is the task ImageNet-segmentation of arXiv 2012.09838.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from testreg.evaluation.bootstrap import Array, Scores, mean_iou_of, mean_of, ratio_of
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.figures import Panel, picture_of_rows
from testreg.evaluation.libraries import library
from testreg.evaluation.overlap import IGNORED, overlap
from testreg.evaluation.pixel_maps import Map, MapFile, mapped_images, one_split
from testreg.evaluation.preparing import AS_THEY_ARE, Fit, Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.files import plain
from testreg.measure.attention import attention_to_patches
from testreg.neurons import AnyNeurons


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    block: int = -1,
    size: int = 224,
    align: bool = True,
    foreground: str | None = None,
    ignore: int | None = None,
    **settings: Any,
) -> Result:
    """Segmentation by attention: mIoU of background and foreground, pixel accuracy, and mean average precision.

    The attention of CLS to the patches is averaged over heads, resized to the mask (bilinear), and scaled to [0, 1].
    Pixels whose attention exceeds the mean over the image's pixels (without `ignore`) are predicted as foreground.

    Args:
        data: a folder with images/ and annotations/, masks/, semantic/ or labels/ (if there are several, the first in
            this order that holds masks; if there are splits, val), or ImageNet-segmentation (gtsegs_ijcv.mat).
        block: the block whose attention is taken; negative numbers count from the end.
        size: side of the square that images and masks are resized to, in pixels.
        align: squash images and masks in the same way. If not, images are cropped but masks are squashed, as in the
            released code; unless images are square, the masks then do not lie where the objects are.
        foreground: the values of masks that are foreground, FIRST-LAST; None for all but 0.
        ignore: the value of pixels in masks that are left out.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    first, last = _range(foreground)
    samples = random_subset(one_split(mapped_images(data)), settings_.num_images, settings_.seed)
    fit: Fit = "squash" if align else "crop"
    truths: list[Array] = []
    for sample in samples:
        mask = torch.from_numpy(sample.target.read())[None]
        values = Square(AS_THEY_ARE, size).fitted(mask, nearest=True)[0].numpy()
        truth = ((values >= first) & (values <= last)).astype(np.int8)
        truths.append(np.where(values == ignore, IGNORED, truth) if ignore is not None else truth)
    if not any((truth == 1).any() for truth in truths):
        raise ValueError(f"no mask has foreground: a value of {foreground or 'more than 0'} (--foreground)")
    counted = sum(int((truth != IGNORED).sum()) for truth in truths)
    share = sum(int((truth == 1).sum()) for truth in truths) / counted
    folder = _folder_of(samples)
    evaluation = Evaluation("attention-seg", model, data, settings_, neurons=neurons, against=against, image_size=size)

    def compute(variant: Variant, images: Tensor) -> dict[str, Tensor]:
        attention = attention_to_patches(variant.tower, images, block).mean(1)  # (B, N)
        return {"attention": attention.unflatten(1, variant.tower.grid(images))}

    features: dict[str, Features] = {}
    scores: dict[str, Scores] = {}
    for variant in evaluation.variants:
        prepare = Square(normalisation_of(variant.transform), size, fit)
        features[variant.name] = evaluation.features(variant, samples, prepare, compute, {"block": block})
        scores[variant.name] = score([each["attention"] for each in features[variant.name]], truths)

    def panels(i: int) -> list[Panel]:
        pixels = Square(AS_THEY_ARE, size, fit).fitted(tv.pil_to_tensor(samples[i].open())).permute(1, 2, 0).numpy()
        drawn_maps = {name: scaled(each[i]["attention"], size).numpy() for name, each in features.items()}
        maps = [Panel(name, values, colours="inferno") for name, values in drawn_maps.items()]
        return [Panel("image", pixels), Panel("truth", pixels, over=truths[i], limits=(-1, 1)), *maps]

    return evaluation.result(
        scores,
        {
            "images": len(samples),
            "block": block,
            "size": size,
            "align": "squashed alike" if align else "image cropped, mask squashed (as released)",
            "foreground": foreground or "all but 0",
            "ignore": ignore,
        },
        details={"foreground_share": share, "masks": folder},
        notes=[f"foreground: {100 * share:.1f} % of the pixels that count, of {len(samples)} masks in {plain(folder)}"],
        pictures={"attention": lambda: picture_of_rows(panels, len(samples), "attention of CLS")},
    )


def _folder_of(samples: Sequence[Sample[Map]]) -> str:
    """The folder that holds all masks, or the file of ImageNet-segmentation, which holds all of them."""
    files = {str(sample.target.file.parent) for sample in samples if isinstance(sample.target, MapFile)}
    return os.path.commonpath(files) if files else samples[0].target.name.partition(",")[0]


def _range(foreground: str | None) -> tuple[int, int]:
    """The first and the last value of masks that are foreground, from "FIRST-LAST"."""
    if foreground is None:
        return 1, np.iinfo(np.int32).max
    first, _, last = foreground.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ValueError(f"foreground must be FIRST-LAST, two values of masks, got {foreground!r}")
    return int(first), int(last)


def scaled(attention: Tensor, size: int) -> Tensor:
    """The attention to patches (rows, columns) resized to (size, size) pixels, and scaled to [0, 1]."""
    full = F.interpolate(attention.float()[None, None], (size, size), mode="bilinear")[0, 0].clamp(min=0)
    return (full - full.min()) / (full.max() - full.min()).clamp(min=1e-12)


def score(attention: list[Tensor], truths: list[Array]) -> Scores:
    """The metrics of attention maps (rows, columns) against true masks (size, size), one for each map.

    Masks have 1 for foreground, 0 for background, and -1 for pixels that are left out. The mean average precision
    leaves out images that have no foreground or no background.
    """
    precision = library("sklearn.metrics").average_precision_score
    rows, precisions = [], []
    for each, truth in zip(attention, truths, strict=True):
        full = scaled(each, truth.shape[0]).numpy()
        counts = truth != IGNORED
        values, true = full[counts], truth[counts] == 1
        rows.append(overlap(full > values.mean(), truth, 2))
        is_mixed = true.any() and not true.all()
        labels, ranked = np.concatenate([~true, true]), np.concatenate([1 - values, values])
        precisions.append(precision(labels, ranked) if is_mixed else np.nan)
    intersections, unions, pixels = (np.stack(each) for each in zip(*rows, strict=True))
    return {
        "miou": mean_iou_of(intersections, unions),
        "pixel_accuracy": ratio_of(intersections.sum(1), pixels),
        "map": mean_of(precisions),
    }
