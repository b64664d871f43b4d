"""Linear depth estimation with the protocol of Denoising-ViT (arXiv 2401.02957), which Jiang et al. use.

A linear layer gives each patch weights over bins of depth, and the predicted depth is the weighted mean of the bins.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from testreg.evaluation.bootstrap import Scores, mean_of
from testreg.evaluation.dense import dense_features, resized
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.figures import Panel, picture_of_rows
from testreg.evaluation.fitting import Batch, augmented_batches, kept_batches
from testreg.evaluation.pixel_maps import DEPTHS, Map, mapped_images, two_splits
from testreg.evaluation.preparing import Normalisation, Uncropped, normalisation_of, pixels_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.neurons import AnyNeurons

BINS, NEAREST, FARTHEST = 256, 1e-3, 10.0  # metres
CROP = (416, 544)  # height and width of training crops
INSIDE_BORDER = (slice(45, 472), slice(43, 608))  # rows and columns of NYU's images inside of their white border
SCORED = (slice(45, 471), slice(41, 601))  # rows and columns of NYU's images that are scored


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    size: int | None = None,
    iterations: int = 38_400,
    warm_up: int = 12_800,
    fit_batch: int = 16,
    every: int = 800,
    augment: bool = True,
    nyu_crop: bool = True,
    unit: float = 1000.0,
    **settings: Any,
) -> Result:
    """Linear depth: RMSE in metres, relative error and delta1 on val.

    A linear layer on each patch of the last block, joined with CLS, gives weights to 256 bins of depth; the prediction
    is the weighted mean of the bins. It is fitted with AdamW (learning rate 5e-3, weight decay 0.01, gradients clipped
    to norm 35), a linear warm-up and a cosine decay, by the scale-invariant loss on logarithms of depth. On val, the
    predictions for the image and for its mirror image are averaged. Metrics are computed for each image, then averaged;
    delta1 is the share of pixels that are wrong by a factor of less than 1.25.

    Args:
        data: NYUd (lists *_train.txt and *_test.txt), or images/ or rgb/ beside depth/ with PNGs of 16 bits.
        size: squash images to a square of that side in pixels; None for their own size.
        iterations: steps in which the probe is fitted.
        warm_up: steps of the warm-up.
        fit_batch: images in a step.
        every: the probe is scored on val every so many steps, and the one with the best relative error is reported, as
            in the protocol.
        augment: rotate, flip and crop (to 416 x 544) training images and change their colours at random, and compute
            their features anew in each step; if not, features of the whole images are computed once and cached.
        nyu_crop: leave out the border of NYU's images of 480 x 640, as the protocol does.
        unit: the value in the PNGs that stands for one metre; the value 0 means unknown depth.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(mapped_images(data, DEPTHS), data)
    train, val = (random_subset(samples, settings_.num_images, settings_.seed) for samples in splits)
    truths = [metres(sample.target, unit) for sample in val]
    scored = [scored_part(truth, nyu_crop, sample.target.name) for truth, sample in zip(truths, val, strict=True)]
    targets = [] if augment else [scored_part(metres(each.target, unit), False, each.target.name) for each in train]
    evaluation = Evaluation("depth", model, data, settings_, neurons=neurons, against=against, image_size=size or "any")
    scores: dict[str, Scores] = {}
    predicted: dict[str, list[Tensor]] = {}
    for variant in evaluation.variants:
        normalise = normalisation_of(variant.transform)
        patch, device = variant.tower.patch_size, variant.tower.device
        whole = Uncropped(normalise, size)
        schedule = {"iterations": iterations, "batch_size": fit_batch}
        if augment:
            crop = _Augment(normalise, unit, nyu_crop, size)
            batches = augmented_batches(evaluation, variant, train, crop, _dense, **schedule)
        else:
            cached = evaluation.features(variant, train, whole, _half_precision, {})
            batches = kept_batches(evaluation, variant, cached, targets, **schedule)
        val_features = evaluation.features(variant, val, whole, _half_precision_with_flip, {})
        with torch.random.fork_rng():
            torch.manual_seed(settings_.seed)
            head = Head(2 * val_features[0]["patches"].shape[1]).to(device)
        best: tuple[float, Head] | None = None
        for _ in fit_in_steps(head, batches, iterations, warm_up, every, size, patch):
            error = score(predict(head, val_features, scored, size, patch), scored)["abs_rel"].value
            if best is None or error < best[0]:
                best = error, copy.deepcopy(head)
        assert best is not None
        predicted[variant.name] = predict(best[1], val_features, scored, size, patch)
        scores[variant.name] = score(predicted[variant.name], scored)

    def panels(i: int) -> list[Panel]:
        maps = {"truth": scored[i]} | {name: each[i] for name, each in predicted.items()}
        limits = (0.0, float(scored[i].max()))
        drawn_maps = [Panel(name, each.numpy(), colours="magma_r", limits=limits) for name, each in maps.items()]
        return [Panel("image", np.asarray(val[i].open())), *drawn_maps]

    return evaluation.result(
        scores,
        {
            "train": len(train),
            "images": len(val),
            "size": size or "native",
            "iterations": iterations,
            "warm_up": warm_up,
            "fit_batch": fit_batch,
            "every": every,
            "augment": augment,
            "nyu_crop": nyu_crop,
            "chosen": "the probe of best relative error on val",
        },
        pictures={"depth": lambda: picture_of_rows(panels, len(val), "linear depth")},
    )


def metres(depth: Map, unit: float) -> Tensor:
    """Depth (h, w) in metres; 0 where it is unknown, or outside of the range of the bins."""
    values = torch.from_numpy(depth.read()).float() / unit
    return values.where((values > NEAREST) & (values < FARTHEST), 0.0)


def scored_part(truth: Tensor, nyu_crop: bool, name: str) -> Tensor:
    """The true depth (h, w), set to 0 (unknown) outside of the part that is scored.

    Raises:
        ValueError: all depth is unknown, or the part is NYU's and the image has another size. `name` is named in it.
    """
    if nyu_crop:
        if tuple(truth.shape) != (480, 640):
            raise ValueError(
                f"{name} has {truth.shape[0]} x {truth.shape[1]} pixels, but what is scored of NYU's images is known "
                "for 480 x 640: switch that off with nyu_crop=False (--no-nyu-crop)"
            )
        cropped = torch.zeros_like(truth)
        cropped[SCORED] = truth[SCORED]
        truth = cropped
    if not truth.any():
        raise ValueError(f"{name} has no depth between {NEAREST} and {FARTHEST:g} m: is unit (--unit) right?")
    return truth


class Head(nn.Module):
    """The probe: a 1x1 convolution that gives weights to bins of depth.

    Args:
        width: channels of a patch joined with CLS, 2 C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, BINS, 1)
        self.register_buffer("centres", torch.linspace(NEAREST, FARTHEST, BINS))

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        """Depth (B, 1, 4 rows, 4 columns) in metres, from patches (B, C, rows, columns) and CLS (B, C).

        There are 4 x 4 values for each patch, since the features are first resized by 4.
        """
        joined = torch.cat([patches, cls[:, :, None, None].expand_as(patches)], dim=1)
        finer = F.interpolate(joined, scale_factor=4, mode="bilinear", align_corners=False)
        weights = self.convolution(finer).relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), self.centres).unsqueeze(1)


def loss_of(depth: Tensor, truth: Tensor, *, with_variance: bool) -> Tensor:
    """The scale-invariant loss of predicted depth (B, h, w), over pixels whose true depth is known (above 0).

    `with_variance`: the full loss; without, only the term of the mean gap, for the first steps.
    """
    known = truth > 0
    gap = (depth[known] + 1e-3).log() - (truth[known] + 1e-3).log()
    squared = 0.15 * gap.mean().square()
    return (squared + gap.var() if with_variance else squared).sqrt()


def on_image(depth: Tensor, shape: Sequence[int], size: int | None, patch: tuple[int, int]) -> Tensor:
    """Resize depth (B, 1, 4 rows, 4 columns) to the pixels (B, h, w) of the images, where `shape` is (..., h, w).

    Args:
        size: side of the square that images were squashed to; None if they kept their size.
        patch: height and width of a patch in pixels.
    """
    height, width = shape[-2:]
    if size is None:
        return resized(depth, (height, width), patch)[:, 0]
    return F.interpolate(resized(depth, (size, size), patch), (height, width), mode="bilinear")[:, 0]


def fit_in_steps(
    head: Head,
    batches: Iterable[Batch],
    iterations: int,
    warm_up: int,
    every: int,
    size: int | None,
    patch: tuple[int, int],
) -> Iterable[int]:
    """Fit the head. After each `every` steps and after the last, yield the step's number, so that it can be scored."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=0.01)

    def rate(step: int) -> float:
        cosine = (1 + float(np.cos(np.pi * step / iterations))) / 2
        return min((step + 1) / warm_up if warm_up else 1.0, 1.0) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step, (features, truth) in enumerate(batches, start=1):
        optimizer.zero_grad()
        depth = on_image(head(features["patches"], features["cls"]), truth.shape, size, patch)
        loss_of(depth, truth, with_variance=step > 100).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 35)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == iterations:
            yield step


@torch.no_grad()
def predict(
    head: Head, val_features: Features, truths: Sequence[Tensor], size: int | None, patch: tuple[int, int]
) -> list[Tensor]:
    """The predicted depth (h, w) in metres of each image, averaged over the image and its mirror image.

    Args:
        val_features: of each image and its mirror image, see `_half_precision_with_flip`.
        truths: the true depth of each image, whose size the prediction gets.
    """
    device, depths = head.convolution.weight.device, []
    for features, truth in zip(val_features, truths, strict=True):
        patches, cls = (features[name].float().to(device) for name in ("patches", "cls"))
        depth = head(patches, cls)  # (2, 1, 4 rows, 4 columns)
        full = on_image(depth, truth.shape, size, patch)
        depths.append(((full[0] + full[1].flip(-1)) / 2).clamp(NEAREST, FARTHEST).cpu())
    return depths


def score(depths: Sequence[Tensor], truths: Sequence[Tensor]) -> Scores:
    """RMSE, relative error and delta1 of predicted depths (h, w), over pixels whose true depth is known.

    They are computed for each image, then averaged.
    """
    errors: list[list[float]] = []
    for depth, truth in zip(depths, truths, strict=True):
        known = truth > 0
        predicted, true = depth[known].double(), truth[known].double()
        ratio = torch.maximum(predicted / true, true / predicted)
        rmse = (predicted - true).square().mean().sqrt()
        errors.append(
            [float(rmse), float(((predicted - true).abs() / true).mean()), float((ratio < 1.25).double().mean())]
        )
    rmse_, relative, delta = zip(*errors, strict=True)
    return {"rmse": mean_of(rmse_), "abs_rel": mean_of(relative), "delta1": mean_of(delta)}


def _dense(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """The patches (B, C, rows, columns) and CLS (B, C) of images."""
    patches, cls = dense_features(variant.tower, images)
    return {"patches": patches, "cls": cls}


def _half_precision(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """The same in half precision, for the cache."""
    return {name: values.half() for name, values in _dense(variant, images).items()}


def _half_precision_with_flip(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """The same for images and their mirror images: (B, 2, ...)."""
    both = [_half_precision(variant, each) for each in (images, images.flip(-1))]
    return {name: torch.stack([each[name] for each in both], dim=1) for name in both[0]}


class _Augment:
    """Makes a training image: rotated a little, flipped, cropped and recoloured at random."""

    def __init__(self, normalise: Normalisation, unit: float, nyu_crop: bool, size: int | None) -> None:
        self.normalise, self.unit, self.nyu_crop, self.size = normalise, unit, nyu_crop, size
        self.colour = v2.ColorJitter(brightness=0.25, contrast=0.1)

    def __call__(self, sample: Sample[Map]) -> tuple[Tensor, Tensor]:
        pixels, truth = pixels_of(sample.open()), metres(sample.target, self.unit)[None]
        if self.nyu_crop:
            pixels, truth = (each[:, INSIDE_BORDER[0], INSIDE_BORDER[1]] for each in (pixels, truth))
        if torch.rand(()) < 0.5:
            angle = float(torch.empty(()).uniform_(-2.5, 2.5))
            pixels = tv.rotate(pixels, angle, tv.InterpolationMode.BILINEAR)
            truth = tv.rotate(truth, angle, tv.InterpolationMode.NEAREST)
        if torch.rand(()) < 0.5:
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        height, width = (min(side, crop) for side, crop in zip(truth.shape[1:], CROP, strict=True))
        top, left = (int(torch.randint(s - c + 1, ())) for s, c in zip(truth.shape[1:], (height, width), strict=True))
        pixels, truth = (each[:, top : top + height, left : left + width] for each in (pixels, truth))
        if self.size is not None:
            pixels = tv.resize(pixels, [self.size, self.size], antialias=True)
            truth = tv.resize(truth, [self.size, self.size], tv.InterpolationMode.NEAREST)
        return self.normalise(self.colour(pixels)), truth[0]
