"""Batches that a probe is fitted on: features of augmented images, made anew each time, or those that are kept."""

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
"""The model's input (3, h, w) of a sample, and its target; what it draws at random, it draws from torch."""
Batch = tuple[dict[str, Tensor], Tensor]
"""Features by name (B, ...), and targets (B, ...), on the device of the model."""


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
    """Features of images that are augmented anew for each batch, the same images and augmentations in all columns.

    Processes share a batch out, and each gets all of it, so that they all fit the same probe.
    """
    draws = _draws(len(samples), iterations, batch_size, evaluation.settings.seed)
    loader = DataLoader(
        _Augmented(samples, augment, draws, evaluation.settings.seed),
        batch_size=None,
        num_workers=evaluation.settings.workers,
        generator=torch.Generator(),
    )
    device = variant.tower.device
    with variant.state(), variant.tower.evaluating(), _bar(evaluation, variant, iterations) as bar:
        for images, targets in loader:
            share = torch.arange(len(images)).tensor_split(world_size())[rank()]
            with torch.no_grad():
                own = [
                    compute(variant, part) for part in images[share].split(evaluation.settings.batch_size) if len(part)
                ]
            parts = all_gather([{name: values.cpu() for name, values in each.items()} for each in own])
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
    """Features that are kept, in the order in which `augmented_batches` would take the images."""
    device = variant.tower.device
    with _bar(evaluation, variant, iterations) as bar:
        for numbers in _draws(len(features), iterations, batch_size, evaluation.settings.seed):
            batch = [features[int(i)] for i in numbers]
            stacked = {name: torch.stack([each[name] for each in batch]).to(device).float() for name in batch[0]}
            yield stacked, torch.stack([targets[int(i)] for i in numbers]).to(device)
            bar.update()


def _bar(evaluation: Evaluation, variant: Variant, iterations: int) -> Any:
    return progress_bar(
        f"{evaluation.task}, {variant.name}, fitting", iterations, evaluation.settings.progress, unit="batch"
    )


def _draws(count: int, iterations: int, batch_size: int, seed: int) -> np.ndarray[Any, Any]:
    """The numbers of the samples of each batch (iterations, batch_size): all in random order, again and again."""
    random = np.random.default_rng(seed)
    epochs = -(-iterations * batch_size // count)
    order = np.concatenate([random.permutation(count) for _ in range(epochs)])
    return order[: iterations * batch_size].reshape(iterations, batch_size)


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """The batches of augmented images and their targets."""

    def __init__(
        self, samples: Sequence[Sample[Any]], augment: Augment, draws: np.ndarray[Any, Any], seed: int
    ) -> None:
        self.samples, self.augment, self.draws, self.seed = samples, augment, draws, seed

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed * 1_000_003 + index)  # in every process and column the same
            made = [self.augment(self.samples[int(i)]) for i in self.draws[index]]
        return torch.stack([image for image, _ in made]), torch.stack([target for _, target in made])
