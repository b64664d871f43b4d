"""Linear classification, as in DINOv2's evaluation.

52 probes (linear classifiers on frozen features) are fitted at once, and the one that is best on val is reported.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from testreg.evaluation.bootstrap import Scores
from testreg.evaluation.classification import BLOCKS, features, global_features, top_1_and_5
from testreg.evaluation.evaluation import Evaluation, Model, Settings
from testreg.evaluation.fitting import augmented_batches, kept_batches
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.pixel_maps import two_splits
from testreg.evaluation.preparing import Normalisation, normalisation_of, pixels_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.neurons import AnyNeurons

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for batches of 256 images; they are scaled with the size of the batch."""


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    iterations: int = 12_500,
    fit_batch: int = 1024,
    augment: bool = True,
    size: int = 224,
    **settings: Any,
) -> Result:
    """Linear classification: the top-1 and top-5 accuracy on val of the best of 52 probes.

    A probe reads the CLS tokens of the last block or of the last four, with or without the mean of the patches. Each of
    these four choices is fitted with 13 learning rates, by SGD with momentum 0.9 and a cosine schedule. As in DINOv2's
    evaluation, the probe is chosen on val itself: the accuracies of all models are a little too high.

    Args:
        data: an ImageFolder with train/ and val/, a folder of parquet files, or hf-dataset:NAME.
        iterations: steps in which the probes are fitted.
        fit_batch: images in a step.
        augment: crop and flip the training images at random, and compute their features anew in each step; if not,
            features are computed once and cached.
        size: side of the model's input in pixels. With `augment`, training images are cropped at random; all others are
            resized so that their short side is 256 / 224 of the size, and the middle is cropped.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    labelled = labelled_images(data)
    splits = two_splits(labelled.splits, data)
    train, val = (random_subset(samples, settings_.num_images, settings_.seed) for samples in splits)
    classes = 1 + max(sample.target for sample in (*train, *val))
    evaluation = Evaluation("linear", model, data, settings_, neurons=neurons, against=against, image_size=size)
    truth = torch.tensor([sample.target for sample in val])
    scores: dict[str, Scores] = {}
    best_probe: dict[str, str] = {}
    for variant in evaluation.variants:
        schedule = {"iterations": iterations, "batch_size": fit_batch}
        if augment:
            batches = augmented_batches(
                evaluation, variant, train, _Crop(normalisation_of(variant.transform), size), features, **schedule
            )
        else:
            cached = global_features(evaluation, variant, train, size)
            batches = kept_batches(
                evaluation, variant, cached, [torch.tensor(each.target) for each in train], **schedule
            )
        val_features = global_features(evaluation, variant, val, size)
        with torch.random.fork_rng():
            torch.manual_seed(settings_.seed)
            probes = Probes(val_features[0]["cls"].shape[-1], classes, fit_batch).to(variant.tower.device)
        probes.fit(batches, iterations)
        inputs = {name: val_features.stacked(name).to(variant.tower.device) for name in ("cls", "mean")}
        by_probe = {name: top_1_and_5(logits.cpu(), truth) for name, logits in probes(inputs).items()}
        best_probe[variant.name] = max(by_probe, key=lambda name: by_probe[name]["top1"].value)
        scores[variant.name] = by_probe[best_probe[variant.name]]
    return evaluation.result(
        scores,
        {
            "train": len(train),
            "images": len(val),
            "iterations": iterations,
            "fit_batch": fit_batch,
            "augment": augment,
            "size": size,
            "chosen": "the best of 52 probes on val",
        },
        details={"chosen": best_probe},
    )


class Probes(nn.Module):
    """The linear classifiers, one for each learning rate and each choice of input tokens.

    Args:
        width: channels C of a token.
        classes: how many classes there are.
        batch_size: images in a step, which learning rates are scaled with.
    """

    def __init__(self, width: int, classes: int, batch_size: int) -> None:
        super().__init__()
        self.inputs = list(product(RATES, (1, BLOCKS), (False, True)))  # (learning rate, blocks, whether with the mean)
        self.heads = nn.ModuleList(nn.Linear(width * (n + mean), classes) for _, n, mean in self.inputs)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.scale = batch_size / 256

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name of the probe: logits (B, classes)} for the features "cls" (B, 4, C) and "mean" (B, C)."""
        cls, mean = features["cls"], features["mean"]
        logits_of = {}
        for (rate, blocks, with_mean), head in zip(self.inputs, self.heads, strict=True):
            tokens = cls[:, :blocks].flatten(1)
            name = f"rate {rate:g}, {blocks} block{'s' * (blocks > 1)}{', with mean patch' * with_mean}"
            logits_of[name] = head(torch.cat([tokens, mean], 1) if with_mean else tokens)
        return logits_of

    def fit(self, batches: Any, iterations: int) -> None:
        """Fit all probes to the batches (see `fitting.Batch`), then freeze them."""
        groups = [
            {"params": head.parameters(), "lr": rate * self.scale}
            for (rate, _, _), head in zip(self.inputs, self.heads, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=0)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = torch.stack([F.cross_entropy(logits, targets) for logits in self(inputs).values()]).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.requires_grad_(False)


class _Crop:
    """The augmentation of DINOv2's linear evaluation: a random crop, which is flipped half of the time."""

    def __init__(self, normalise: Normalisation, side: int) -> None:
        self.normalise = normalise
        resize = v2.RandomResizedCrop(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        self.crop = v2.Compose([resize, v2.RandomHorizontalFlip()])

    def __call__(self, sample: Sample[int]) -> tuple[Tensor, Tensor]:
        return self.normalise(self.crop(pixels_of(sample.open())).clamp(0, 1)), torch.tensor(sample.target)
