"""Batches that a probe is fitted on: features of augmented images, made anew each time, or those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from testreg.evaluation.features import Features
from testreg.evaluation.run import Column, Run
from testreg.evaluation.samples import Sample
from testreg.io.processes import gathered, rank, world_size
from testreg.io.progress import progress_bar

Augment = Callable[[Sample[Any]], tuple[Tensor, Tensor]]
"""The model's input (3, h, w) of a sample, and its target; what it draws at random, it draws from torch."""
Batch = tuple[dict[str, Tensor], Tensor]
"""Features by name (B, ...), and targets (B, ...), on the device of the model."""


def augmented_batches(
    run: Run,
    column: Column,
    samples: Sequence[Sample[Any]],
    augment: Augment,
    compute: Callable[[Column, Tensor], Mapping[str, Tensor]],
    *,
    iterations: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Features of images that are augmented anew for each batch, the same images and augmentations in all columns.

    Processes share a batch out, and each gets all of it, so that they all fit the same probe.
    """
    draws = _draws(len(samples), iterations, batch_size, run.settings.seed)
    loader = DataLoader(
        _Augmented(samples, augment, draws, run.settings.seed),
        batch_size=None,
        num_workers=run.settings.workers,
        generator=torch.Generator(),
    )
    device = column.tower.device
    with column.state(), column.tower.evaluating(), _bar(run, column, iterations) as bar:
        for images, targets in loader:
            share = torch.arange(len(images)).tensor_split(world_size())[rank()]
            with torch.no_grad():
                own = [compute(column, part) for part in images[share].split(run.settings.batch_size) if len(part)]
            parts = gathered([{name: values.cpu() for name, values in each.items()} for each in own])
            found = [each for part in parts for each in part]
            yield {name: torch.cat([each[name] for each in found]).to(device) for name in found[0]}, targets.to(device)
            bar.update()


def kept_batches(
    run: Run, column: Column, features: Features, targets: Sequence[Tensor], *, iterations: int, batch_size: int
) -> Iterator[Batch]:
    """Features that are kept, in the order in which `augmented_batches` would take the images."""
    device = column.tower.device
    with _bar(run, column, iterations) as bar:
        for numbers in _draws(len(features), iterations, batch_size, run.settings.seed):
            found = [features[int(i)] for i in numbers]
            stacked = {name: torch.stack([each[name] for each in found]).to(device).float() for name in found[0]}
            yield stacked, torch.stack([targets[int(i)] for i in numbers]).to(device)
            bar.update()


def _bar(run: Run, column: Column, iterations: int) -> Any:
    return progress_bar(f"{run.task}, {column.name}, fitting", iterations, run.settings.progress, unit="batch")


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
