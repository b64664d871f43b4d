"""Images from folders, datasets and iterables, as batches of tensors."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
Images = str | os.PathLike[str] | Iterable[Any]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageBatches:
    """Iterates over batches (B, 3, h, w) of `images`, skipping and counting what cannot be read.

    Args:
        images: a folder (searched with its subfolders), a Dataset or any iterable of PIL images, of tensors (3, h, w),
            or of (image, label) pairs, or a DataLoader or iterable of tensors (B, 3, h, w).
        transform: PIL image -> tensor (3, h, w); needed unless `images` yields tensors.
        num_images: at most so many; of a folder a seeded sample, since folders are sorted by class.
        workers: processes that decode a folder's images.

    Raises:
        FileNotFoundError, ValueError: no folder, or no image in it.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | None = None,
        *,
        batch_size: int = 16,
        num_images: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_images", num_images)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.batch_size, self.limit, self.transform, self.workers = batch_size, num_images, transform, workers
        self.num_read = self.num_skipped = 0
        self.images: Iterable[Any]
        if isinstance(images, str | os.PathLike):
            if transform is None:
                raise ValueError("a folder of images needs a transform from PIL image to tensor")
            paths = image_paths(images)
            random.Random(seed).shuffle(paths)
            self.images = cast("Iterable[Any]", _Files(paths[:num_images], transform))
        else:
            self.images = images
        lengths = [n for n in (_length(self.images), num_images) if n is not None]
        self.length = min(lengths) if lengths else None  # None: an iterator that does not say
        self.source = str(images) if isinstance(images, str | os.PathLike) else type(images).__name__

    def __iter__(self) -> Iterator[Tensor]:
        self.num_read = self.num_skipped = 0
        tensors = itertools.islice(self._tensors(), self.limit)
        while batch := list(itertools.islice(tensors, self.batch_size)):
            self.num_read += len(batch)
            try:
                yield torch.stack(batch)
            except RuntimeError:
                shapes = ", ".join(sorted({str(tuple(image.shape)) for image in batch}))
                raise ValueError(f"images of different shapes ({shapes}) cannot be batched: use batch_size=1") from None
        if not self.num_read:
            skipped = f": all {self.num_skipped} were unreadable" if self.num_skipped else ""
            raise ValueError(f"no image could be read from {self.source}{skipped}")

    def _tensors(self) -> Iterator[Tensor]:
        items: Iterable[Any] = self.images
        if isinstance(items, _Files):
            items = DataLoader(items, batch_size=None, num_workers=self.workers)
        for item in items:
            image = item[0] if isinstance(item, tuple | list) else item
            if image is None:
                self.num_skipped += 1
            elif not isinstance(image, Tensor):
                if self.transform is None:
                    raise ValueError(f"{type(image).__name__} images need a transform to tensors (3, h, w)")
                yield self.transform(image.convert("RGB"))
            elif image.ndim == 4:
                yield from image
            elif image.ndim == 3:
                yield image
            else:
                raise ValueError(f"expected image tensors (3, h, w) or (B, 3, h, w), got {tuple(image.shape)}")


def _length(images: object) -> int | None:
    return len(images) if isinstance(images, Sized) and not isinstance(images, DataLoader) else None


def image_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """All image files under `folder`, sorted.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {folder}")
    return paths


def open_image(path: str | os.PathLike[str]) -> Image:
    """The image at `path` as RGB, turned as its EXIF tag says.

    Raises:
        OSError: the file is missing or no readable image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not a readable image: {error}") from error


class _Files(Dataset[Tensor | None]):
    """Image files as tensors; None for one that cannot be read."""

    def __init__(self, paths: list[Path], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            image = open_image(self.paths[index])
        except OSError:
            return None
        return self.transform(image)
