"""Samples of data sets: a sample is an image and its truth (a label, boxes, a mask or depth)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from testreg.io.decoding import FORMATS, decoded
from testreg.io.sources import EXTENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
S = TypeVar("S")
V = TypeVar("V")

ORIENTATION = 0x0112  # the EXIF tag that says how a photograph is rotated; from 5 on, rows and columns are swapped


class Reader(Protocol):
    """An image in a data set that is not a file of its own."""

    def read(self) -> Any:
        """The image, as `testreg.io.decoding.decoded` takes it: e.g. bytes or an array."""


@dataclass(frozen=True)
class Row:
    """An image in a row of a Hugging Face dataset."""

    rows: Any
    """The dataset, set up to return images as bytes."""
    index: int
    column: str

    def read(self) -> Any:
        return self.rows[self.index][self.column]


@dataclass(frozen=True)
class Sample(Generic[T]):
    """An image and its truth."""

    name: str
    """Identifies the image and its version: features are cached under this name."""
    image: Path | Reader
    """The path of the image, or a `Reader` of it."""
    target: T
    """The truth: a label, boxes, a mask or depth."""

    def open(self) -> Image:
        """The image as RGB.

        Raises:
            OSError: the image cannot be read.
        """
        return decoded(self.image if isinstance(self.image, Path) else self.image.read())


def sample_of_file(image: Path, target: T) -> Sample[T]:
    """A sample with an image file. The sample's name changes when the file changes, so that no old features are used.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not image.is_file():
        raise FileNotFoundError(f"there is no image {image}")
    state = image.stat()
    return Sample(f"{image.resolve()} {state.st_size} {state.st_mtime_ns}", image, target)


def size_of(file: Path) -> tuple[int, int]:
    """Height and width of an image file after the rotation that its EXIF tag asks for. Only the header is read.

    Raises:
        OSError: the file is not a readable image.
    """
    width, height = _read(file, lambda image: image.size)
    return (width, height) if is_turned(file) else (height, width)


def is_turned(file: Path) -> bool:
    """Whether the EXIF tag of an image file swaps rows and columns."""
    return _read(file, lambda image: image.getexif().get(ORIENTATION, 1)) >= 5


def _read(file: Path, read: Callable[[Image], V]) -> V:
    """Open an image file and return what `read` reads of it; all errors become an OSError."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as image:
            return read(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{file} is not a readable image: {error}") from error


def images_under(folder: Path) -> list[Path]:
    """The paths of all image files in a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def random_subset(samples: Sequence[S], count: int | None, seed: int) -> list[S]:
    """At most `count` of the samples, drawn at random with a seed, in their original order; None for all."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), count))]
