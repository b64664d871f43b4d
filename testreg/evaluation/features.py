"""Computes a model's features of images once, and caches them on disk.

The features of 16 images are in one file (a chunk). If several processes run, each computes some of the chunks; a run
that was interrupted computes only the chunks that are missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from testreg.evaluation.preparing import Preparation
from testreg.evaluation.samples import Sample
from testreg.files import replacing
from testreg.io.processes import all_gather, rank, world_size

CHUNK = 16  # images in a file of the cache

Compute = Callable[[Tensor], Mapping[str, Tensor]]
"""Maps images (B, 3, h, w) to the named tensors (B, ...) that are cached."""


def cache_folder() -> Path:
    """The default folder of cached features."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "testreg" / "evaluation"


class Features:
    """The cached features of a sequence of images: item i is {name: tensor} of image i, read from disk on demand."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self._files[index // CHUNK]
        return {name: file.get_tensor(f"{index}/{name}") for name in self._names}

    def stacked(self, name: str) -> Tensor:
        """The tensor of that name of all images, stacked: (n, ...)."""
        return torch.stack([self._files[i // CHUNK].get_tensor(f"{i}/{name}") for i in range(self.count)])

    @cached_property
    def _files(self) -> list[Any]:
        return [safe_open(chunk_file(self.folder, first), "pt") for first in range(0, self.count, CHUNK)]

    @cached_property
    def _names(self) -> list[str]:
        return [key.partition("/")[2] for key in self._files[0].keys() if key.startswith("0/")]  # noqa: SIM118


def chunk_file(folder: Path, first: int) -> Path:
    """The file of the chunk whose first image has the index `first`."""
    return folder / f"{first:07}.safetensors"


def extract(
    folder: Path,
    samples: Sequence[Sample[Any]],
    prepare: Preparation,
    compute: Compute,
    *,
    batch_size: int,
    workers: int,
    on_images: Callable[[int], object],
) -> Features:
    """Compute the features of all samples that `folder` does not have yet, and return the features of all.

    If several processes run, this process computes only its share, then waits for the others.

    Args:
        folder: the cache's folder for exactly these samples, this preparation and this model.
        batch_size: how many images of one shape are computed at a time.
        workers: processes that read and prepare images.
        on_images: is called with the number of images that were just found or computed, to show progress.

    Raises:
        OSError: an image cannot be read, or the folder cannot be written.
        ValueError: features are not finite.
        RuntimeError: another process has ended.
    """
    own_chunks = range(rank() * CHUNK, len(samples), world_size() * CHUNK)
    sizes = {first: min(CHUNK, len(samples) - first) for first in own_chunks}
    missing = [first for first in own_chunks if not _is_whole(chunk_file(folder, first))]
    on_images(sum(sizes.values()) - sum(sizes[first] for first in missing))
    numbers = [number for first in missing for number in range(first, first + sizes[first])]
    images = iter(
        DataLoader(
            _PreparedImages(samples, prepare),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            generator=torch.Generator(),  # without one, the loader would change the global random state
        )
    )
    for first in missing:
        chunk = {number: next(images) for number in range(first, first + sizes[first])}
        tensors: dict[str, Tensor] = {}
        for batch in _batches(chunk, batch_size):
            computed = compute(torch.stack([chunk[number] for number in batch]))
            for name, values in computed.items():
                if values.is_floating_point() and not values.isfinite().all():
                    raise ValueError(f"the {name} of the model are not finite: run it in float32 or bfloat16")
                rows = values.cpu()
                tensors |= {f"{number}/{name}": rows[i].contiguous().clone() for i, number in enumerate(batch)}
            on_images(len(batch))
        with replacing(chunk_file(folder, first)) as temporary:
            save_file(tensors, temporary)
    all_gather(None)  # waits until all processes have written their chunks
    return Features(folder, len(samples))


class _PreparedImages(Dataset[Tensor]):
    """The model's inputs (3, h, w) of samples."""

    def __init__(self, samples: Sequence[Sample[Any]], prepare: Preparation) -> None:
        self.samples, self.prepare = samples, prepare

    def __getitem__(self, index: int) -> Tensor:
        return self.prepare(self.samples[index].open())


def _batches(images: Mapping[int, Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of at most `batch_size` images of the same shape, until all images have been named."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, image in images.items():
        by_shape.setdefault(tuple(image.shape), []).append(number)
    for numbers in by_shape.values():
        yield from (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size))


def _is_whole(file: Path) -> bool:
    """Whether a chunk's file exists and is readable; a damaged one counts as missing."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False
