"""The training batches of a probe (a linear model on a frozen model's features).

`augmented_batches` computes the features of newly augmented images for each batch; `kept_batches` reads cached
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from testreg.evaluation.evaluation import Evaluation, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.samples import Sample
from testreg.io.processes import all_gather, rank, world_size
from testreg.io.progress import progress_bar

Augment = Callable[[Sample[Any]], tuple[Tensor, Tensor]]
"""Makes the model's input (3, h, w) and the target of a sample, augmented with torch's random numbers."""
Batch = tuple[dict[str, Tensor], Tensor]
"""{name: features (B, ...)}, and targets (B, ...), both on the device of the model."""


def augmented_batches(
    evaluation: Evaluation,
    variant: Variant,
    samples: Sequence[Sample[Any]],
    augment: Augment,
    compute: Callable[[Variant, Tensor], Mapping[str, Tensor]],
    *,
    iterations: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Yield the features of `iterations` batches of images, each of which is augmented anew.

    All variants of the model get the same images with the same augmentations. If several processes run, each computes a
    part of a batch, then they exchange the parts: all of them fit the same probe.
    """
    order = _order_of_samples(len(samples), iterations, batch_size, evaluation.settings.seed)
    loader = DataLoader(
        _Augmented(samples, augment, order, evaluation.settings.seed),
        batch_size=None,
        num_workers=evaluation.settings.workers,
        generator=torch.Generator(),
    )
    device = variant.tower.device
    with variant.state(), variant.tower.evaluating(), _bar(evaluation, variant, iterations) as bar:
        for images, targets in loader:
            indices = torch.arange(len(images)).tensor_split(world_size())[rank()]
            with torch.no_grad():
                computed = [
                    compute(variant, part)
                    for part in images[indices].split(evaluation.settings.batch_size)
                    if len(part)
                ]
            parts = all_gather([{name: values.cpu() for name, values in each.items()} for each in computed])
            batch = [each for part in parts for each in part]
            yield {name: torch.cat([each[name] for each in batch]).to(device) for name in batch[0]}, targets.to(device)
            bar.update()


def kept_batches(
    evaluation: Evaluation,
    variant: Variant,
    features: Features,
    targets: Sequence[Tensor],
    *,
    iterations: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Yield `iterations` batches of cached features, in the order in which `augmented_batches` takes the images."""
    device = variant.tower.device
    with _bar(evaluation, variant, iterations) as bar:
        for numbers in _order_of_samples(len(features), iterations, batch_size, evaluation.settings.seed):
            batch = [features[int(i)] for i in numbers]
            stacked = {name: torch.stack([each[name] for each in batch]).to(device).float() for name in batch[0]}
            yield stacked, torch.stack([targets[int(i)] for i in numbers]).to(device)
            bar.update()


def _bar(evaluation: Evaluation, variant: Variant, iterations: int) -> Any:
    """The progress bar of a fit."""
    return progress_bar(
        f"{evaluation.task}, {variant.name}, fitting", iterations, evaluation.settings.progress, unit="batch"
    )


def _order_of_samples(count: int, iterations: int, batch_size: int, seed: int) -> np.ndarray[Any, Any]:
    """The indices of the samples in each batch, (iterations, batch_size): each epoch has all in a new random order."""
    random = np.random.default_rng(seed)
    epochs = -(-iterations * batch_size // count)
    order = np.concatenate([random.permutation(count) for _ in range(epochs)])
    return order[: iterations * batch_size].reshape(iterations, batch_size)


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set of whole batches: item i is batch i, as images (B, 3, h, w) and targets (B, ...)."""

    def __init__(
        self, samples: Sequence[Sample[Any]], augment: Augment, order: np.ndarray[Any, Any], seed: int
    ) -> None:
        self.samples, self.augment, self.order, self.seed = samples, augment, order, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed * 1_000_003 + index)  # the same in all processes and for all variants
            made = [self.augment(self.samples[int(i)]) for i in self.order[index]]
        return torch.stack([image for image, _ in made]), torch.stack([target for _, target in made])
